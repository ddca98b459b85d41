"""Provenance of results, one plotting style, and the driver behind ``make figures``."""
