"""Measurements and predictions, each with the command that makes it."""
