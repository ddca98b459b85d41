"""The arithmetic of VBench's scores, from values of videos to Total, and what papers make of it.

``value`` is what VBench gives a video and ``terms`` how much it counts: VBench (one process) weighs
subject and background consistency by pairs of frames, appearance style by frames, the rest evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mla_study.evaluation.vbench.dimensions import DIMENSIONS, OVERALL_6, Group, scale_of
from mla_study.study.statistics import percentiles

Numbers = Sequence[float] | np.ndarray
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
DRAWS = 1000


@dataclass(frozen=True)
class Score:
    """A score with its 95 % bootstrap interval over prompts (NaN for a single prompt)."""

    value: float
    low: float
    high: float
    videos: int
    prompts: int


def normalised(dimension: str, raw: float) -> float:
    """(raw - low) / (high - low) with VBench's bounds, not clipped."""
    known = DIMENSIONS[dimension]
    return (raw - known.low) / (known.high - known.low)


def group_score(raw: Mapping[str, float], group: Group) -> float | None:
    """Weighted mean of a group's normalised scores; None where one of its dimensions is missing.

    Args:
        raw: dimension -> raw score in [0, 1]. VBench itself counts a missing one as raw 0.
    """
    members = [d for d in DIMENSIONS.values() if d.group == group]
    if any(d.name not in raw or not np.isfinite(raw[d.name]) for d in members):
        return None
    total = sum(d.weight * normalised(d.name, raw[d.name]) for d in members)
    return total / sum(d.weight for d in members)


def total_of(quality: float | None, semantic: float | None) -> float | None:
    """VBench's Total, (4 Quality + Semantic) / 5; None where one is missing."""
    return weighted_total(quality, semantic, QUALITY_WEIGHT / (QUALITY_WEIGHT + SEMANTIC_WEIGHT))


def weighted_total(
    quality: float | None, semantic: float | None, share: float = 0.5
) -> float | None:
    """share * Quality + (1 - share) * Semantic.

    The default share is what the paper's Tables 5a and 5b call Total (``total_mean`` here), 0.8 is
    VBench's own Total.
    """
    if quality is None or semantic is None:
        return None
    return share * quality + (1 - share) * semantic


def overall_6(raw: Mapping[str, float]) -> float | None:
    """Plain mean of six raw scores (Table 2's Overall); None where one is missing."""
    if any(name not in raw or not np.isfinite(raw[name]) for name in OVERALL_6):
        return None
    return sum(raw[name] for name in OVERALL_6) / len(OVERALL_6)


def composites(raw: Mapping[str, float]) -> dict[str, float]:
    """Those of quality, semantic, total, total_mean and overall_6 that the raw scores allow.

    Names other than the 16 dimensions, such as substitutes, have no say.
    """
    own = {name: value for name, value in raw.items() if name in DIMENSIONS}
    quality, semantic = group_score(own, "quality"), group_score(own, "semantic")
    found = {
        "quality": quality,
        "semantic": semantic,
        "total": total_of(quality, semantic),
        "total_mean": weighted_total(quality, semantic),
        "overall_6": overall_6(own),
    }
    return {name: value for name, value in found.items() if value is not None}


def raw_score(scorer: str, values: Numbers, terms: Numbers) -> float:
    """VBench's score over videos, as one process computes it: mean weighted by terms, scaled.

    NaN where nothing counts.
    """
    weights = np.asarray(terms, dtype=float)
    if not weights.size or weights.sum() <= 0:
        return float("nan")
    return float(np.dot(values, weights) / weights.sum()) * scale_of(scorer)


def resampled(
    scorer: str, values: Numbers, terms: Numbers, prompts: Iterable[str], draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """The score [draws] over prompts drawn with replacement; empty for a single prompt.

    Videos of one prompt share what makes it hard, so prompts are the unit.
    """
    unique: dict[str, int] = {}
    places = [unique.setdefault(name, len(unique)) for name in prompts]
    if len(unique) < 2:
        return np.empty(0)
    weights = np.asarray(terms, dtype=float)
    sums, counts = np.zeros(len(unique)), np.zeros(len(unique))
    np.add.at(sums, places, np.asarray(values, dtype=float) * weights)
    np.add.at(counts, places, weights)
    picked = np.random.default_rng(seed).integers(len(unique), size=(draws, len(unique)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[picked].sum(axis=1) / counts[picked].sum(axis=1) * scale_of(scorer)


def bootstrap(
    scorer: str, values: Numbers, terms: Numbers, prompts: Iterable[str], draws: int = DRAWS,
    seed: int = 0,
) -> Score:  # fmt: skip
    """Score of a scorer's videos with its interval, see :func:`resampled`."""
    names = list(prompts)
    low, high = percentiles(resampled(scorer, values, terms, names, draws, seed))
    return Score(raw_score(scorer, values, terms), low, high, len(names), len(set(names)))


def composite_intervals(
    drawn: Mapping[str, np.ndarray],
) -> dict[str, tuple[float, float]]:
    """Intervals of the composites from resamples [draws] of each dimension, drawn independently."""
    held = {name: values for name, values in drawn.items() if values.size}
    if not held:
        return {}
    rows = [
        composites(dict(zip(held, map(float, row), strict=True)))
        for row in zip(*held.values(), strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: percentiles(np.array([row.get(name, np.nan) for row in rows])) for name in names}


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float, float, int]:
    """Mean of first - second over the prompts of both, 95 % interval, p (two-sided sign flips), n.

    Args:
        first, second: prompt -> mean score of its videos.
    """
    shared = sorted(set(first) & set(second))
    gaps = np.array([first[name] - second[name] for name in shared])
    if not len(gaps):
        nan = float("nan")
        return nan, nan, nan, nan, 0
    rng = np.random.default_rng(seed)
    few = len(gaps) < 2
    drawn = np.empty(0) if few else gaps[rng.integers(len(gaps), size=(draws, len(gaps)))].mean(1)
    low, high = percentiles(drawn)
    flipped = (gaps * rng.choice([-1.0, 1.0], (draws, len(gaps)))).mean(axis=1)
    # with the one that was seen, so that p is never zero
    p = (1 + int((np.abs(flipped) >= abs(gaps.mean()) - 1e-15).sum())) / (draws + 1)
    return float(gaps.mean()), low, high, p, len(gaps)
