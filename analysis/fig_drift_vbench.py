"""VBench scores along long videos: a panel a scorer, a line a model, against the video's seconds.

From the tables of drift that ``mla-study vbench run`` writes of long videos: each clip's score at
its time, averaged over videos, with its 95 % interval. A stand-in for a dimension is told in the
panel's title.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import vbench_rows
from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, EXTRAS, SUBSTITUTES
from mla_study.study.plots import COLOURS, PAGE_WIDTH, save_figure, stamp, style
from mla_study.study.runs import round_significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig_drift_vbench"
TITLE = "VBench scores along long videos"
PROVENANCE = ("measured",)
DATA = ("results/data/vbench_*/drift.parquet",)
INSTEAD = ("runs",)
ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("model", "scorer", "second", "value", "low", "high", "videos")
ACROSS = 3
SPAN = 5.0
"""Where lengths of one panel differ by this factor, its axis is logarithmic."""
_ORDER = [*DIMENSIONS, *SUBSTITUTES, *EXTRAS]


def INPUTS(runs: str = "") -> dict[str, Path]:
    """Results of ours."""
    return vbench_rows.inputs(runs, ROOT)


def lines(ours: vbench_rows.Ours) -> pd.DataFrame:
    """Rows of drift with ``name``, ``line``, ``validity`` and ``horizon_s``.

    A line is a model, its length where there are several, and what it rests on.

    Raises:
        UserError: no result has any, or one lacks a column.
    """
    if ours.drift.empty or "scorer" not in ours.drift:
        raise UserError(f"no result holds scores along long videos: {vbench_rows.HOW}")
    for column in NEEDED:
        if column not in ours.drift.columns:
            raise UserError(f"the tables of drift lack the column '{column}': score anew")
    rows = ours.drift.dropna(subset=["scorer", "value"])
    keys = ["result", "model", "scorer"]
    about = ours.table[[*keys, "validity", "horizon_s"]].drop_duplicates(keys)
    # a run's table also knows what is partial
    rows = rows.drop(columns=["validity", "horizon_s"], errors="ignore")
    rows = rows.merge(about, how="left", on=keys)
    # a row of the table that may not be shown has no row here either
    rows = rows[rows["validity"].notna()]
    if rows.empty:
        raise UserError(f"no score along long videos may be shown: {vbench_rows.HOW}")
    several = rows.groupby("model")["horizon_s"].nunique().gt(1)
    # validity is one of a scorer, and stands on its panel
    table = vbench_rows.wide(ours.table, list(ours.table["scorer"].unique()))
    rests = {
        (row["result"], row["name"]): vbench_rows.about(row)
        for row in table.assign(validity="full").to_dict("records")
    }
    rows["line"] = [
        f"{row['name']}{length} ({rests[row['result'], row['name']]})"
        for row in rows.to_dict("records")
        for length in (f", {row['horizon_s']:.3g} s" if several[row["model"]] else "",)
    ]
    place = {name: i for i, name in enumerate(_ORDER)}
    rows["order"] = [place.get(str(scorer), len(place)) for scorer in rows["scorer"]]
    return rows.sort_values(["order", "horizon_s", "line", "second"], kind="stable")


def draw(out_dir: str, runs: str = "") -> Figure:
    """Draw and save ``fig_drift_vbench.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        runs: see :func:`analysis.vbench_rows.folders`.

    Raises:
        UserError: no result has scores along long videos.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    ours = vbench_rows.read(runs, ROOT)
    rows = lines(ours)
    kinds, validity, run_hash = vbench_rows.identity(ID, ours, rows)
    rows = round_significant(rows)
    scorers = list(dict.fromkeys(rows["scorer"]))
    looks = _looks(rows)
    across = min(ACROSS, len(scorers))
    down = -(-len(scorers) // across)
    with style():
        figure, axes = plt.subplots(
            down, across, squeeze=False,
            figsize=(PAGE_WIDTH * across / ACROSS if across > 1 else 3.4, 1.55 * down + 0.75),
        )  # fmt: skip
        for axis, scorer in zip(axes.flat, scorers, strict=False):
            _panel(axis, rows[rows["scorer"] == scorer], scorer, looks)
        for axis in axes.flat[len(scorers) :]:
            axis.axis("off")
        for column in range(across):
            last = (len(scorers) - 1 - column) // across
            axes[last, column].set_xlabel("seconds of video")
        marks = [Line2D([], [], color=c, ls=dash, label=name) for name, (c, dash) in looks.items()]
        figure.legend(handles=marks, loc="outside lower left", ncols=min(2, len(marks)))
        counts = rows["videos"].astype(float)
        told = f"{counts.min():.0f}" if counts.nunique() == 1 else f"up to {counts.max():.0f}"
        figure.suptitle(
            f"Scores of clips along the video: mean of {told} videos with its 95 % interval",
            fontsize=7,
        )
        stamp(figure, kinds, validity, run_hash)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def _looks(rows: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Line -> colour and dash: a colour a model, a dash a length."""
    colours = [COLOURS[name] for name in ("black", "green", "vermillion", "blue", "purple", "sky")]
    models = list(dict.fromkeys(sorted(rows["model"])))
    looks: dict[str, tuple[str, str]] = {}
    used = dict.fromkeys(models, 0)
    for row in rows.drop_duplicates("line").to_dict("records"):
        model = str(row["model"])
        dash = ("-", "--", ":", "-.")[used[model] % 4]
        used[model] += 1
        looks[str(row["line"])] = (colours[models.index(model) % len(colours)], dash)
    return looks


def _panel(axis: Axes, rows: pd.DataFrame, scorer: str, looks: dict[str, tuple[str, str]]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    for line, mine in rows.groupby("line", sort=False):
        colour, dash = looks[str(line)]
        x, value, low, high = (mine[n].to_numpy(float) for n in ("second", "value", "low", "high"))
        axis.plot(x, value, dash, color=colour, lw=0.9, marker="o" if len(x) == 1 else "")
        held = np.isfinite(low) & np.isfinite(high)
        axis.fill_between(x, low, high, where=held, color=colour, alpha=0.18, lw=0)
    title = vbench_rows.told(scorer).replace(", stand-in", ",\nstand-in")
    validity = vbench_rows.worst(rows["validity"])
    if validity != "full" and not vbench_rows.is_stand_in(scorer):
        title += f" ({validity})"
    axis.set_title(title, loc="left", fontsize=6.5)
    axis.margins(x=0.02)
    ends = rows.groupby("line")["second"].max()
    if ends.max() >= SPAN * ends.min() and rows["second"].min() > 0:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
