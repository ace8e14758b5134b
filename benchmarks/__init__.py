"""Measurements, each made by one command."""
