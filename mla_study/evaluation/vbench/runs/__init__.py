"""Runs: videos looked at, scored by workers, kept, tabled."""
