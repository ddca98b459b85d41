"""Weights in and out: containers of tensors, opened lazily, local or by HTTP byte range."""
