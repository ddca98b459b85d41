"""Training data: the world, folders of videos, prompts alone, recorded trajectories."""
