"""The Wan transformer with dense or latent self-attention, its caches, and conversion."""
