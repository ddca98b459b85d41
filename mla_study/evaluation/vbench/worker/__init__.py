"""Run by VBench's own interpreter, as ``python worker REQUEST.json``; imports nothing of ours."""
