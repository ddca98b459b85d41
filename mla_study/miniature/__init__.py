"""The study in miniature: which models are trained, how they are judged, and what comes of it."""
