"""How the tables of the miniature study are read: which rows are whose, and at which sizes."""

from __future__ import annotations

import numpy as np
import pandas as pd

INITS = ("activation", "spectral", "spectral-raw", "random")
LONG = "random, long"
"""The student of random init that was trained for longer."""
WIDTH, HEAD, D_C, D_ROPE = 96, 32, 12, 8
"""Of the miniature: channels, channels of a head, and the default latent and rotary sizes."""
MARGIN = 0.05
"""A difference of shares or of IoU below this counts as no cost."""
_LONG_NAME = r"-t\d+-s\d+$"


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


def of_student(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of a student at the default sizes (the long run is one of its own)."""
    rows = pd.concat([usual(frame), frame[is_long(frame)]])
    return rows[student(rows) == name]


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
