"""From noise to video: samplers, the chunk-causal stream, its saved state, and where frames go."""
