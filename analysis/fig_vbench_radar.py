"""VBench's 16 dimensions as a radar: ten rows of the public leaderboard, and measured models.

Every axis is normalised by VBench's own bounds, (raw - low) / (high - low): 0 is the centre and 1
the rim. Stand-ins for dimensions are not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import vbench_rows
from analysis.frames import listed
from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS
from mla_study.evaluation.vbench.scores import normalised
from mla_study.study.plots import COLOURS, save_figure, stamp, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "fig_vbench_radar"
TITLE = "VBench's 16 dimensions, normalised: the public leaderboard and measured models"
PROVENANCE = ("paper-quoted", "measured")
DATA = ("results/paper/vbench_leaderboard.csv",)
ROOT = Path(__file__).resolve().parents[1]
NAMED = "CogVideoX-5B,Kling"
_QUOTED = ((COLOURS["sky"], "--"), (COLOURS["orange"], "-."), (COLOURS["purple"], ":"))
_OURS = tuple(COLOURS[name] for name in ("vermillion", "blue", "green", "black"))
SIZE = (5.2, 4.5)  # inches
RINGS = (0.25, 0.5, 0.75, 1.0)


def INPUTS(runs: str = "") -> dict[str, Path]:
    """Results of ours."""
    return vbench_rows.inputs(runs, ROOT)


def board(frame: pd.DataFrame) -> pd.DataFrame:
    """The leaderboard's rows, in percent, as normalised scores by ``model``."""
    rows = {
        str(row["model"]): [normalised(name, float(row[name]) / 100) for name in DIMENSIONS]
        for row in frame.to_dict("records")
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(DIMENSIONS))


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """Normalised scores of short videos, NaN where a dimension was not measured.

    Returns:
        a row a model with any dimension: the 16, and what :func:`vbench_rows.wide` tells of it.
    """
    rows = vbench_rows.wide(table[~(table["horizon_s"] >= vbench_rows.LONG)], list(DIMENSIONS))
    for name in DIMENSIONS:
        rows[name] = [normalised(name, float(value)) for value in rows[name]]
    return rows


def draw(out_dir: str, runs: str = "", named: str = NAMED) -> Figure:
    """Draw and save ``fig_vbench_radar.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        runs: see :func:`analysis.vbench_rows.folders`.
        named: rows of the leaderboard in colour, at most three, with commas between them.

    Raises:
        UserError: a folder that holds no result, or a name that is not on the leaderboard.
    """
    import matplotlib.pyplot as plt

    public = board(pd.read_csv(ROOT / DATA[0]))
    chosen = listed(named)
    for name in chosen:
        if name not in public.index:
            raise UserError(f"there is no row '{name}': choose from {', '.join(public.index)}")
    if len(chosen) > len(_QUOTED):
        raise UserError(f"named holds {len(chosen)} names: give at most {len(_QUOTED)}")
    ours = vbench_rows.read(runs, ROOT)
    mine = measured(ours.table)
    kinds, validity, run_hash = vbench_rows.identity(
        ID, ours, mine, [ROOT / DATA[0]], {"named": chosen}
    )
    with style():
        figure = plt.figure(figsize=(SIZE[0], SIZE[1] + 0.11 * len(mine)))
        axis = figure.add_subplot(projection="polar")
        _axes(axis)
        for name, values in public.iterrows():
            if name not in chosen:
                _line(axis, values.to_numpy(float), color="0.72", lw=0.5, label="_")
        rest = f"other quoted rows ({len(public) - len(chosen)})"
        axis.plot([], [], color="0.72", lw=0.5, label=rest)
        for name, (colour, dash) in zip(chosen, _QUOTED, strict=False):
            values = public.loc[name].to_numpy(float)
            _line(axis, values, color=colour, ls=dash, lw=0.9, label=f"{name} (quoted)")
        for i, row in enumerate(mine.to_dict("records")):
            values = np.array([float(row[name]) for name in DIMENSIONS])
            held = int(np.isfinite(values).sum())
            told = f"{vbench_rows.about(row)}; {held} of {len(DIMENSIONS)} dimensions"
            label = f"{row['name']} (measured: {told})"
            _line(axis, values, color=_OURS[i % len(_OURS)], lw=1.3, marker="o", label=label)
        figure.legend(loc="outside lower left", fontsize=6)
        told = "Each axis (raw − low) / (high − low) with VBench's bounds: 0 centre, 1 rim"
        every = np.concatenate([frame[list(DIMENSIONS)].to_numpy(float).ravel()
                                for frame in (public, mine)])  # fmt: skip
        if np.any((every < 0) | (every > 1)):
            told += "; what is beyond is drawn there"
        if mine.empty:
            told += "\n(no short video of ours is scored)"
        figure.suptitle(told, fontsize=7)
        stamp(figure, kinds, validity, run_hash)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def angles() -> np.ndarray:
    """Of the 16 axes: [16], clockwise from the top."""
    return np.arange(len(DIMENSIONS)) * (2 * np.pi / len(DIMENSIONS))


def _line(axis: Any, values: np.ndarray, **look: Any) -> None:
    """A closed line with gaps where a value is missing; what is beyond the bounds at the edge."""
    values = np.clip(values, 0, 1)
    axis.plot([*angles(), 2 * np.pi], [*values, values[0]], clip_on=False, ms=2.2, **look)


def _axes(axis: Any) -> None:
    from matplotlib.patheffects import withStroke

    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    axis.set_ylim(0, 1)
    axis.set_yticks(RINGS, [""] * len(RINGS))
    halo = [withStroke(linewidth=1.6, foreground="white")]
    for ring in RINGS:  # between two axes, above the lines
        axis.text(
            angles()[1] * 9.5, ring, f"{ring:g}", fontsize=5.5, color="0.3", ha="center",
            va="center", path_effects=halo, zorder=5,
        )  # fmt: skip
    axis.set_xticks(angles(), [""] * len(DIMENSIONS))
    axis.spines["polar"].set_color("0.6")
    colours = {"quality": "black", "semantic": COLOURS["blue"]}
    for angle, told, group in zip(angles(), _labels(), _groups(), strict=True):
        side = np.sin(angle)
        align = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        high = np.cos(angle)
        stand = "bottom" if high > 0.9 else "top" if high < -0.9 else "center"
        axis.text(
            angle, 1.06, told, fontsize=6.5, ha=align, va=stand, color=colours[group],
            linespacing=1.0,
        )  # fmt: skip
    for group, x in (("semantic", 0.0), ("quality", 1.0)):
        axis.text(
            x, 1.12, f"{group.capitalize()}\n({_groups().count(group)} dimensions)",
            fontsize=6.5, weight="bold", color=colours[group], transform=axis.transAxes,
            ha="right" if x == 0.0 else "left", va="top",
        )  # fmt: skip


def _groups() -> list[str]:
    return [dimension.group for dimension in DIMENSIONS.values()]


def _labels() -> Sequence[str]:
    return [vbench_rows.told(name).replace(" ", "\n", 1) for name in DIMENSIONS]
