"""VBench, short and long: its own code in an environment of its own, resumable, never unlike."""
