"""What becomes of the miniature's videos over time: dense and latent students, and ablations.

Above: share of videos that are all correct, share whose background is right, IoU of the sprite,
share of frames that keep its colour, velocity error and distance from the true path, window by
window, at 10x (solid) and 100x (dotted) the training length. Below: the activation-aware student
rolled out otherwise at 10x. IoU is against a sprite that begins its path anew in each window, from
where it is first seen there; only the distance adds up from the first window on. Lines are means
over seeds, bands and bars the standard error of seeds and videos.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import miniature
from mla_study.errors import UserError
from mla_study.study.plots import COLOURS, PAGE_WIDTH, save_figure, stamp, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig_drift"
TITLE = "Drift of the miniature's long rollouts, and what their settings cost"
PROVENANCE = ("measured",)
DATA = ("results/data/study_drift",)
ROOT = Path(__file__).resolve().parents[1]
METRICS = {
    "all_correct": "all correct (share)",
    "background": "background right (share)",
    "iou": "IoU in the window",
    "colour_kept": "colour kept (share)",
    "velocity_error": "velocity error (px / frame)",
    "phase_error": "distance from path (px)",
}
SHARES = ("all_correct", "background", "iou", "colour_kept")
WIDE = 3
"""Panels in a row."""
CONDITIONS = {
    "plain": (COLOURS["black"], "-", "as trained (1 + 6 + 3 frames)"),
    "no-clean-pass": (COLOURS["vermillion"], "-", "no clean pass"),
    "int8-token": (COLOURS["blue"], "-", "int8 a token"),
    "int8-channel": (COLOURS["sky"], "--", "int8 a channel"),
    "absolute": (COLOURS["purple"], "-", "absolute positions"),
    "no-sink": (COLOURS["orange"], "-", "no sink"),
    "history-3": (COLOURS["green"], "--", "history 3"),
    "history-0": (COLOURS["green"], ":", "history 0"),
    "sink-3": (COLOURS["orange"], ":", "sink 3, history 4"),
}


def curves(drift: pd.DataFrame, student: str | None = None) -> pd.DataFrame:
    """Means over seeds by ``student, clips, condition, metric, second``, see ``over_seeds``.

    Args:
        student: one whose ablations are wanted; None: all students, rolled out plainly.
    """
    rows = miniature.usual(drift)
    rows = rows[rows["metric"].isin(list(METRICS)) & (rows["init"] != "untrained")]
    rows = rows.assign(student=miniature.student(rows))
    if student is None:
        rows = rows[rows["condition"] == "plain"]
    else:
        rows = rows[(rows["student"] == student) & (rows["clips"] == 10)]
    if rows.empty:
        raise UserError(f"no long rollout of {student or 'any student'}: finish the study")
    keys = ["student", "clips", "condition", "metric", "second"]
    return miniature.over_seeds(rows, keys).sort_values("second")


def draw(out_dir: str, student: str = "activation") -> Figure:
    """Draw and save ``fig_drift.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        student: whose ablations the lower row shows.

    Raises:
        UserError: it was not rolled out otherwise.
    """
    import matplotlib.pyplot as plt

    result = miniature.read("drift", ROOT)
    plain, other = curves(result.table), curves(result.table, student)
    validity, run_hash = miniature.drawn_from(ID, [result])
    with style():
        rows = len(METRICS) // WIDE
        figure, axes = plt.subplots(2 * rows, WIDE, figsize=(PAGE_WIDTH, 7.4))
        above, below = axes[:rows].ravel(), axes[rows:].ravel()
        for top, bottom, (metric, label) in zip(above, below, METRICS.items(), strict=True):
            for (name, clips), mine in plain[plain["metric"] == metric].groupby(
                ["student", "clips"], sort=False
            ):
                colour, _ = miniature.LOOKS[str(name)]
                _line(top, mine, colour, "-" if clips == 10 else ":")
            for name, mine in other[other["metric"] == metric].groupby("condition", sort=False):
                colour, dash, _ = CONDITIONS[str(name)]
                _line(bottom, mine, colour, dash, bars=True)
            top.set_xscale("log")
            for axis in (top, bottom):
                axis.set_ylabel(label)
                if metric not in SHARES:
                    axis.set_ylim(bottom=0)
        for axis in (*axes[rows - 1], *axes[-1]):
            axis.set_xlabel("seconds of video")
        above[0].set_title("(a) students, 10x and 100x", loc="left")
        below[0].set_title(f"(b) {student}, 10x, rolled out otherwise", loc="left")
        seeds = int(plain["seeds"].max())
        figure.suptitle(
            f"Miniature after all stages, $d_c$ = {miniature.D_C} of {miniature.WIDTH}, training "
            f"length 1.5 s: mean of {seeds} seeds ± s.e.; velocity and path where a sprite is seen."
            "\nAll correct: the place counts in the first window alone. IoU: each window begins "
            "the true path anew,\nfrom where the sprite is first seen there; the distance is from "
            "the path that the first window began.",
            fontsize=7,
        )
        _legend(figure, plain, list(dict.fromkeys(other["condition"])))
        stamp(figure, PROVENANCE, validity, run_hash)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def _line(axis: Axes, mine: pd.DataFrame, colour: str, dash: str, bars: bool = False) -> None:
    x, value, se = (mine[name].to_numpy(float) for name in ("second", "value", "se"))
    most = 1.0 if mine["metric"].iloc[0] in SHARES else float("inf")
    axis.plot(x, value, dash, color=colour, lw=0.9)
    if bars:  # bands of nine lines would hide each other
        ends = [0, -1]
        up = np.minimum(se, most - value)[ends]
        axis.errorbar(x[ends], value[ends], [se[ends], up], color=colour, ls="", elinewidth=0.7)
    else:
        high = np.minimum(value + se, most)
        axis.fill_between(x, value - se, high, color=colour, alpha=0.2, lw=0)


def _legend(figure: Figure, plain: pd.DataFrame, conditions: list[str]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=miniature.LOOKS[name][0], label=f"(a) {name}")
        for name in dict.fromkeys(plain["student"])
    ]
    if 100 in set(plain["clips"]):
        marks.append(Line2D([], [], color="0.3", ls=":", label="(a) dotted: 100x"))
    marks += [
        Line2D([], [], color=colour, ls=dash, label=f"(b) {told}")
        for name, (colour, dash, told) in CONDITIONS.items()
        if name in conditions
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=5, fontsize=5.5)
