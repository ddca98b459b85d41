"""Weight files of every format, as named tensors of which only what is asked for is read."""
