"""Which d_c directions the composed operator keeps along training, beside what chance would share.

Overlap |Q1^T Q2|_F^2 / k of row spaces: (a) with the student's own start, (b) with the start of the
other init (spectral for the activation-aware student, activation-aware for all others), (c) with
the start, layer by layer, after all stages. Lines are medians over layers, means over seeds; bands
are ranges over seeds; the null of two random spaces is k / d.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import miniature
from mla_study.errors import UserError
from mla_study.study.plots import NULL_COLOUR, PAGE_WIDTH, save_figure, stamp, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig_subspace"
TITLE = "Row space of the composed operator along training: overlap with the start and other inits"
PROVENANCE = ("measured", "null-model")
DATA = ("results/data/study_ranks",)
ROOT = Path(__file__).resolve().parents[1]


def overlaps(ranks: pd.DataFrame, d_c: int) -> pd.DataFrame:
    """Rows of overlaps: of the dense and of usual students of that d_c, named in ``student``.

    ``with`` is ``start`` or the other init.

    Raises:
        UserError: there are none.
    """
    rows = miniature.usual(ranks, d_c)
    rows = rows[rows["metric"].str.startswith("overlap_with_") & (rows["init"] != "untrained")]
    if rows[rows["variant"] == "latent"].empty:
        raise UserError(f"no student has d_c={d_c}: see the study's ranks")
    other = rows["metric"].str.removeprefix("overlap_with_")
    return rows.assign(student=miniature.student(rows), **{"with": other})


def curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of medians over layers by student and step, see ``over_seeds``."""
    keys = ["student", "with", "seed", "step"]
    medians = rows.groupby(keys, sort=False)["value"].median().reset_index()
    return miniature.over_seeds(medians, ["student", "with", "step"]).sort_values("step")


def draw(out_dir: str, d_c: int = miniature.D_C) -> Figure:
    """Draw and save ``fig_subspace.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        d_c: of the latent students.

    Raises:
        UserError: no such students.
    """
    import matplotlib.pyplot as plt

    result = miniature.read("ranks", ROOT)
    rows = overlaps(result.table, d_c)
    validity, run_hash = miniature.drawn_from(ID, [result])
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(PAGE_WIDTH, 2.6), sharey=True)
        parts = (rows[rows["with"] == "start"], rows[rows["with"] != "start"])
        for axis, part in zip(axes, parts, strict=False):
            latent = part[part["variant"] == "latent"]
            miniature.stage_marks(axis, part)
            for name, mine in curve(part).groupby("student", sort=False):
                colour, marker = miniature.LOOKS[str(name)]
                axis.plot(mine["step"], mine["value"], color=colour, marker=marker, ms=2)
                axis.fill_between(
                    mine["step"], mine["low"], mine["high"], color=colour, alpha=0.2, lw=0
                )
            _null(axis, latent)
            axis.set_xlabel("training step of the miniature")
        _by_layer(axes[2], parts[0])
        axes[0].set(ylabel="overlap of row spaces", ylim=(0, 1.03))
        axes[0].set_title("(a) with its own start", pad=10)
        axes[1].set_title("(b) with activation's (activation: spectral's)", pad=10)
        axes[2].set_title("(c) with its start, after all stages", pad=10)
        seeds = rows["seed"].nunique()
        figure.suptitle(
            f"Miniature, $d_c$ = {d_c} of {miniature.WIDTH} (dense: its first "
            f"{miniature.WIDTH // 8} directions); median of layers, range of {seeds} seeds",
            fontsize=7,
        )
        _legend(figure, list(dict.fromkeys(rows["student"])))
        stamp(figure, PROVENANCE, validity, run_hash)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def _null(axis: Axes, rows: pd.DataFrame) -> None:
    value, se = rows["null_value"].median(), rows["null_se"].median()
    axis.axhspan(value - 2 * se, value + 2 * se, color=NULL_COLOUR, alpha=0.4, lw=0)
    axis.axhline(value, color=NULL_COLOUR, lw=0.9)


def _by_layer(axis: Axes, rows: pd.DataFrame) -> None:
    last = rows[rows["step"] == rows.groupby("run")["step"].transform("max")]
    found = miniature.over_seeds(last.drop_duplicates(["run", "layer"]), ["student", "layer"])
    for number, (name, mine) in enumerate(found.groupby("student", sort=False)):
        colour, marker = miniature.LOOKS[str(name)]
        bars = np.stack([mine["value"] - mine["low"], mine["high"] - mine["value"]]).clip(0)
        axis.errorbar(
            mine["layer"] + 0.08 * (number - 2), mine["value"], bars, color=colour, marker=marker,
            ms=2.5, ls="", elinewidth=0.7,
        )  # fmt: skip
    _null(axis, rows[rows["variant"] == "latent"])
    axis.set_xlabel("layer")
    axis.set_xticks(sorted(set(rows["layer"])))


def _legend(figure: Figure, students: list[str]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=miniature.LOOKS[s][0], marker=miniature.LOOKS[s][1], ms=2.5, label=s)
        for s in students
    ]
    marks.append(Line2D([], [], color=NULL_COLOUR, label="two random spaces, $d_c$ / d (null)"))
    figure.legend(handles=marks, loc="outside lower left", ncols=6, fontsize=5.5)
