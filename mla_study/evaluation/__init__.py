"""Measuring the toolkit itself and what it produces: speed, memory, scores."""
