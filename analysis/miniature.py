"""What the figures of the miniature study share: its tables, its colours, statistics over seeds.

A value of one run has a sampling error (``se``, over its videos); runs of one configuration differ
by their seed. Means over seeds carry the larger of both standard errors (:func:`over_seeds`).
Comparisons are paired by seed, with 95 % intervals (:func:`interval`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from mla_study.errors import UserError
from mla_study.study.plots import COLOURS
from mla_study.study.runs import (
    Result,
    Validity,
    file_sha256,
    read_result,
    round_significant,
    run_record,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
INITS = ("activation", "spectral", "spectral-raw", "random")
LOOKS = {
    "dense": (COLOURS["black"], "D"),
    "activation": (COLOURS["green"], "o"),
    "spectral": (COLOURS["blue"], "s"),
    "spectral-raw": (COLOURS["purple"], "^"),
    "random": (COLOURS["vermillion"], "v"),
}
"""Colour and marker of a student."""
LONG = "random, long"
WIDTH, HEAD, D_C, D_ROPE = 96, 32, 12, 8
"""Of the miniature: channels, channels of a head, and the default latent and rotary sizes."""
STAGES = {"tf": "TF", "cd": "CD", "dmd": "DMD"}
MARGIN = 0.05
"""A difference of shares or of IoU below this counts as no cost."""
_LONG_NAME = r"-t\d+-s\d+$"


def read(name: str, root: Path = ROOT) -> Result:
    """The study's result ``results/data/study_NAME``.

    Raises:
        UserError: it is not there, or not what its record says.
    """
    return read_result(root / "results" / "data" / f"study_{name}")


def drawn_from(
    figure: str, results: Sequence[Result], files: Iterable[Path] = ()
) -> tuple[Validity, str]:
    """Validity and run hash of a figure that these results and further files are drawn in."""
    order: tuple[Validity, ...] = ("full", "partial", "substitute", "invalid")
    validity = order[max(order.index(result.validity) for result in results)]
    inputs = {result.folder.name: result.run_hash for result in results}
    inputs |= {file.name: file_sha256(file) for file in files}
    run = run_record(
        config={"figure": figure}, inputs=inputs, seed=None, modules=(f"analysis.{figure}",),
        provenance="measured", validity=validity,
    )  # fmt: skip
    return validity, run["run_hash"]


def is_long(frame: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are of runs with a number of teacher-forcing steps of their own."""
    return frame["run"].str.contains(_LONG_NAME, regex=True)


def usual(frame: pd.DataFrame, d_c: int | None = D_C, d_rope: int | None = D_ROPE) -> pd.DataFrame:
    """Rows of runs of the usual length: dense ones, and latent ones of these sizes (None: any)."""
    kept = ~is_long(frame)
    latent = frame["variant"] == "latent"
    for name, size in (("d_c", d_c), ("d_rope", d_rope)):
        if size is not None:
            kept &= ~latent | (frame[name] == size)
    return frame[kept]


def student(frame: pd.DataFrame) -> pd.Series[str]:
    """Name of each row's student: ``dense``, its init, or :data:`LONG`."""
    name = frame["init"].where(frame["variant"] == "latent", "dense")
    return name.where(~is_long(frame), LONG)


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

    Args:
        values: [S]. sampling: standard error of the value where S = 1; NaN gives no interval then.
    """
    mean, count = float(values.mean()), len(values)
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5)
    else:
        half = 1.96 * sampling
    return mean, mean - half, mean + half


def paired(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, float, float, int]:
    """Mean of first - second over the seeds that both have, its 95 % interval, and their number.

    Args:
        first, second: a row a seed with ``value``, and ``se`` (used for a single seed only).

    Raises:
        UserError: no seed is in both.
    """
    both = first.merge(second, on="seed", suffixes=("", "_2"))
    both = both.dropna(subset=["value", "value_2"])
    if both.empty:
        raise UserError("no seed is in both of what is compared: finish the study")
    sampling = float("nan")
    if "se" in both and "se_2" in both:
        sampling = float(np.hypot(both["se"].iloc[0], both["se_2"].iloc[0]))
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


def score_rows(
    frame: pd.DataFrame, metric: str, *, stage: str = "dmd", clips: int = 1, scope: str = "first",
    condition: str = "plain",
) -> pd.DataFrame:  # fmt: skip
    """Rows of ``study_scores`` of one metric, a row a run."""
    wanted = {
        "metric": metric, "stage": stage, "clips": clips, "scope": scope, "condition": condition,
    }  # fmt: skip
    return frame[np.logical_and.reduce([frame[k] == v for k, v in wanted.items()])]


def held_out(curves: pd.DataFrame, stage: str = "tf") -> pd.DataFrame:
    """The held-out loss at the end of a stage, a row a run."""
    mine = curves[(curves["name"] == "held_out") & (curves["stage"] == stage)]
    return mine.sort_values("step").groupby("run", as_index=False).last()


def steps_to(curve: pd.DataFrame, level: float) -> float:
    """Steps after which a loss (``step``, ``value``) first is at ``level``; NaN: it never is.

    Between observed points the logarithm of the loss is linear in that of 1 + step.
    """
    curve = curve.sort_values("step")
    x, y = np.log1p(curve["step"].to_numpy(float)), np.log(curve["value"].to_numpy(float))
    below = np.flatnonzero(y <= np.log(level))
    if not below.size:
        return float("nan")
    i = below[0]
    if i == 0:
        return float(np.expm1(x[0]))
    share = (y[i - 1] - np.log(level)) / (y[i - 1] - y[i])
    return float(np.expm1(x[i - 1] + share * (x[i] - x[i - 1])))


def stage_marks(axis: Axes, rows: pd.DataFrame) -> None:
    """Mark where each stage begins, by the ``step`` and ``stage`` of the usual runs."""
    rows = rows[~is_long(rows)]
    ends = rows.groupby("stage")["step"].max().sort_values()
    start = 0
    for stage, end in ends.items():
        if start:
            axis.axvline(start, color="0.75", lw=0.6, zorder=0)
        axis.text(
            start, 1.0, f" {STAGES.get(str(stage), stage)}", fontsize=5, color="0.4", va="bottom",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
        start = int(end)
