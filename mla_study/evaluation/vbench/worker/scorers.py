"""Scorer -> the function that loads it; nothing heavy is imported before one is chosen.

A loader takes the request and gives a function from a driver's line to the answer's fields:
``value``, ``terms``, ``frames``, and where there is something to say ``counted`` and ``more``.
Both raise ValueError with one sentence.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

Line = dict[str, Any]
Scorer = Callable[[Line], Line]
Loader = Callable[[Line], Scorer]

PLACES = {
    "subject_consistency": "pictures",
    "background_consistency": "pictures",
    "aesthetic_quality": "pictures",
    "imaging_quality": "pictures",
    "appearance_style": "pictures",
    "temporal_flickering": "motion",
    "motion_smoothness": "motion",
    "dynamic_degree": "motion",
    "dynamic_degree[raft-small]": "motion",
    "static_filter": "motion",
    "human_action": "content",
    "scene": "content",
    "temporal_style": "content",
    "overall_consistency": "content",
    "object_class": "objects",
    "multiple_objects": "objects",
    "color": "objects",
    "spatial_relationship": "objects",
    "long.split": "long_ops",
    "long.first_frames": "long_ops",
    "long.clip2clip.subject_consistency": "long_features",
    "long.clip2clip.background_consistency": "long_features",
}
"""Scorer -> module of this folder, whose OPERATIONS hold its loader."""


def find(name: str) -> Loader:
    """The loader of a scorer. :raises ValueError: there is none of that name."""
    place = PLACES.get(name)
    if place is None:
        raise ValueError(f"this worker has no scorer {name!r}")
    return importlib.import_module(f".{place}", __package__).OPERATIONS[name]
