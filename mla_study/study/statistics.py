"""Means, intervals and rank correlations of few runs: what figures and claims have in common.

A value of one run has a sampling error (``se``, over its videos); runs of one configuration differ
by their seed. Means over seeds carry the larger of both standard errors (:func:`over_seeds`).
Comparisons are paired by seed, with 95 % intervals (:func:`interval`) that hold both errors too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mla_study.errors import UserError
from mla_study.study.runs import round_significant


def over_seeds(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean over seeds of ``value`` by ``keys``, with ``se``, range ``low, high`` and ``seeds``.

    ``se`` is the larger of sd / sqrt(S) over the S seeds, which has both errors in it but is itself
    uncertain for few seeds, and of what the sampling errors ``se`` of the rows (if any) imply.

    Raises:
        UserError: a key has several rows of one seed.
    """
    rows: list[dict[str, Any]] = []
    for key, mine in frame.groupby(list(keys), sort=False):
        if mine["seed"].duplicated().any():
            raise UserError(f"{dict(zip(keys, key, strict=True))} has several runs of one seed")
        values = mine["value"].to_numpy(float)
        held = np.isfinite(values)
        values = values[held]
        errors = mine["se"].to_numpy(float)[held] if "se" in mine else np.zeros(len(values))
        count = len(values)
        if not count:
            continue
        between = values.std(ddof=1) / count**0.5 if count > 1 else 0.0
        sampling = float(np.sqrt(np.nansum(errors**2)) / count)
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"value": values.mean(), "se": max(between, sampling), "low": values.min(),
               "high": values.max(), "seeds": count}
        )  # fmt: skip
    columns = [*keys, "value", "se", "low", "high", "seeds"]
    return round_significant(pd.DataFrame(rows, columns=columns))


def interval(values: np.ndarray, sampling: float = float("nan")) -> tuple[float, float, float]:
    """Mean of a value a seed and its 95 % interval: Student's t over seeds.

    Few seeds may agree by chance: the interval is no narrower than the values' own errors make it.

    Args:
        values: [S].
        sampling: standard error of the mean by those errors; NaN where it is not known, which
            leaves one seed without an interval.
    """
    mean, count = float(values.mean()), len(values)
    between = float("nan")
    if count > 1:
        between = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5)
    half = float(np.fmax(between, 1.96 * sampling))
    return mean, mean - half, mean + half


def paired(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, float, float, int]:
    """Mean of first - second over the seeds that both have, its 95 % interval, and their number.

    Args:
        first, second: a row a seed with ``value``, and ``se`` over its videos, taken as those of
            independent ones. That both models saw the same prompts makes the truth no larger.

    Raises:
        UserError: no seed is in both.
    """
    both = first.merge(second, on="seed", suffixes=("", "_2"))
    both = both.dropna(subset=["value", "value_2"])
    if both.empty:
        raise UserError("no seed is in both of what is compared: finish the study")
    sampling = float("nan")
    if "se" in both and "se_2" in both:
        errors = both[["se", "se_2"]].to_numpy(float)
        sampling = float(np.sqrt(np.square(errors).sum()) / len(both))
    difference = (both["value"] - both["value_2"]).to_numpy(float)
    return (*interval(difference, sampling), len(both))


def spearman(
    x: np.ndarray, y: np.ndarray, groups: Sequence[object], draws: int = 1000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Rank correlation of x and y [N], and of ``draws`` resamples of whole groups.

    The same groups and seed give the same resamples. NaN where x or y is constant.
    """
    whole = float(_rank_correlations(x[None], y[None])[0])
    if not np.isfinite(whole):
        return whole, np.full(draws, np.nan)
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(groups))
    members = [np.flatnonzero([group == name for group in groups]) for name in names]
    picked = rng.integers(len(names), size=(draws, len(names)))
    chosen = [np.concatenate([members[i] for i in row]) for row in picked]
    sizes = np.array([len(rows) for rows in chosen])
    found = np.empty(draws)
    for size in np.unique(sizes):  # of equal groups one; ranks of many rows at once are fast
        these = np.flatnonzero(sizes == size)
        rows = np.stack([chosen[i] for i in these])
        found[these] = _rank_correlations(x[rows], y[rows])
    return whole, found


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """Bounds of the 95 % interval of resamples; those that are NaN count for nothing."""
    held = draws[np.isfinite(draws)]
    if not held.size:
        return float("nan"), float("nan")
    low, high = np.percentile(held, [2.5, 97.5])
    return float(low), float(high)


def _rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the rows of x and y [draws, N]; NaN where one is constant."""
    a, b = (stats.rankdata(values, axis=1) for values in (x, y))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    scale = np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median of values [N] and an interval of it that holds with 95 % or more, whatever they are.

    The bounds are order statistics (the sign test's), so that nothing is assumed of the values'
    distribution; below six values no two of them do, and the bounds are their extremes, which
    hold with 1 - 2^(1 - N) (.88 for four).
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    count = len(ordered)
    if not count or not np.isfinite(ordered).all():
        return float("nan"), float("nan"), float("nan")
    inner = max(int(stats.binom.ppf(0.025, count, 0.5)), 1)
    return float(np.median(ordered)), float(ordered[inner - 1]), float(ordered[count - inner])
