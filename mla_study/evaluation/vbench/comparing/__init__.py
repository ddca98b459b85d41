"""Finished runs side by side, where their protocols allow it."""
