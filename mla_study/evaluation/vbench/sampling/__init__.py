"""Videos sampled from VBench's prompts."""
