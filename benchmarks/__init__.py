"""Measurements; each prints what it ran on and how."""
