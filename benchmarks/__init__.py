"""Measurements, each with its command and its results beside it."""
