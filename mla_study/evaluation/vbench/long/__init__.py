"""VBench's long mode as arithmetic: clips, settings, averages, drift."""
