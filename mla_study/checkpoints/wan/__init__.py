"""Wan checkpoints of every layout: one key table, strict loading, saving, conversion."""
