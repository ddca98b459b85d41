"""What VBench 0.1.5 measures: its 16 dimensions, with the constants of its total score.

A *scorer* is what a worker process computes: a dimension, a substitute for one that runs without
VBench's weights (``dynamic_degree[raft-small]``), or an extra (``clip_t``). Substitutes and extras
never enter Quality, Semantic or Total.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mla_study.errors import UserError

VERSION = "0.1.5"
"""Of VBench."""
Group = Literal["quality", "semantic"]
SAMPLES = 5
"""Videos a prompt that the protocol wants."""


@dataclass(frozen=True)
class Dimension:
    """One of VBench's dimensions.

    Attributes:
        low, high: bounds of the normalisation (raw - low) / (high - low), which is not clipped.
        weight: within its group's mean.
        samples: videos a prompt, before the static filter of temporal flickering.
        scale: times a video's value gives VBench's raw score (imaging quality counts to 100).
        clip_seconds: length of the long mode's clips.
        free: scores any clip; the others need a prompt of VBench's.
        detectron2: needs code that no package index carries.
    """

    name: str
    group: Group
    low: float
    high: float
    weight: float = 1.0
    samples: int = SAMPLES
    scale: float = 1.0
    clip_seconds: float = 2.0
    free: bool = False
    detectron2: bool = False


_ALL = (
    Dimension(
        "subject_consistency", "quality", 0.1462, 1.0, free=True
    ),
    Dimension("background_consistency", "quality", 0.2615, 1.0, free=True),
    Dimension(
        "temporal_flickering", "quality", 0.6293, 1.0, samples=25,
        free=True,
    ),
    Dimension(
        "motion_smoothness", "quality", 0.706, 0.9975, free=True
    ),
    Dimension(
        "dynamic_degree", "quality", 0.0, 1.0, weight=0.5, free=True
    ),
    Dimension("aesthetic_quality", "quality", 0.0, 1.0, free=True),
    Dimension(
        "imaging_quality", "quality", 0.0, 1.0, scale=0.01, free=True
    ),
    Dimension("object_class", "semantic", 0.0, 1.0, detectron2=True),
    Dimension("multiple_objects", "semantic", 0.0, 1.0, detectron2=True),
    Dimension("human_action", "semantic", 0.0, 1.0, clip_seconds=10.0),
    Dimension("color", "semantic", 0.0, 1.0, detectron2=True),
    Dimension(
        "spatial_relationship", "semantic", 0.0, 1.0, detectron2=True
    ),
    Dimension("scene", "semantic", 0.0, 0.8222),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855),
    Dimension("temporal_style", "semantic", 0.0, 0.364, clip_seconds=10.0),
    Dimension(
        "overall_consistency", "semantic", 0.0, 0.364,
        clip_seconds=10.0,
    ),
)  # fmt: skip
DIMENSIONS = {dimension.name: dimension for dimension in _ALL}
"""VBench's 16, in its own order, seven of quality first."""

OVERALL_6 = (
    "aesthetic_quality",
    "background_consistency",
    "dynamic_degree",
    "imaging_quality",
    "motion_smoothness",
    "subject_consistency",
)
"""The six that papers on long videos take the plain mean of."""

SUBSTITUTES = {
    "dynamic_degree[raft-small]": "dynamic_degree",
    "imaging_quality[niqe]": "imaging_quality",
    "motion_smoothness[rife]": "motion_smoothness",
}
"""Stand-ins that need no file of VBench's, and what they stand in for."""
EXTRAS = ("clip_t", "clip_f", "hpsv3")
"""Scores of other papers."""
SCORERS = (*DIMENSIONS, *SUBSTITUTES, *EXTRAS)
NATIVE = ("imaging_quality[niqe]", "motion_smoothness[rife]", *EXTRAS)
"""Scorers that run in our environment; the others run in VBench's."""
READ_WHOLE = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
    "aesthetic_quality", "imaging_quality", "appearance_style", "static_filter", "clip_t", "clip_f",
)  # fmt: skip
"""Scorers that look at every frame, and report how many they got; the others look at some."""
PROMPTED = ("clip_t", "hpsv3")
"""Extras that compare a video with its prompt, whatever prompt it is."""


def is_free(scorer: str) -> bool:
    """Whether it scores any clip, of whatever name and without a prompt."""
    return DIMENSIONS[scorer].free if scorer in DIMENSIONS else scorer not in PROMPTED


def scale_of(scorer: str) -> float:
    """What a video's value is multiplied with for the score that is reported."""
    return DIMENSIONS[scorer].scale if scorer in DIMENSIONS else 1.0


def choose(names: Iterable[str], allowed: Iterable[str] = SCORERS) -> tuple[str, ...]:
    """The scorers that names stand for, each once; ``all`` is the 16, ``substitutes`` those.

    Raises:
        UserError: an unknown name (the nearest is suggested), or one that is not allowed here.
    """
    groups = {
        "all": tuple(DIMENSIONS),
        "quality": tuple(d.name for d in _ALL if d.group == "quality"),
        "semantic": tuple(d.name for d in _ALL if d.group == "semantic"),
        "overall_6": OVERALL_6,
        "substitutes": tuple(SUBSTITUTES),
    }
    may, found = tuple(allowed), dict[str, None]()
    for name in names:
        for scorer in groups.get(name, (name,)):
            if scorer not in SCORERS:
                near = difflib.get_close_matches(scorer, [*SCORERS, *groups], 1)
                hint = f": did you mean '{near[0]}'?" if near else ""
                known = ", ".join([*SCORERS, *groups])
                raise UserError(f"there is no dimension '{scorer}'{hint or ': there are ' + known}")
            if scorer in may:
                found[scorer] = None
            elif name not in groups:
                raise UserError(f"'{scorer}' needs videos made from VBench's prompts: leave it out")
    return tuple(found)
