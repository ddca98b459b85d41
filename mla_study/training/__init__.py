"""Training objectives as pure functions: teacher forcing, consistency, distribution matching."""
