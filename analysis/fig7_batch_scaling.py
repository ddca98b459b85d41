"""Fig. 7: memory against batch, what a request adds, and the largest batch of a card.

(a) memory of Wan 1.3B against batch, (b) the slope by layout with the paper's as quoted marks: the
closed form, its variant that counts all 3072 channels of reconstruction, and a count of the live
tensors of this toolkit's own step; (c) the largest batch. Drawn from the table of
``mla-study bench batch``; where it holds no row of a GPU, the figure says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mla_study.study.plots import COLOURS, PAGE_WIDTH, save_figure, stamp, style
from mla_study.study.runs import read_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig7_batch_scaling"
TITLE = "Memory against batch: slope a request by layout and window, largest batch by card"
PROVENANCE = ("modelled", "paper-quoted")
DATA = ("results/data/fig7_batch_scaling",)
ROOT = Path(__file__).resolve().parents[1]
FULL, BESIDE, WITHIN = "21 frames", "1 + 6 + chunk", "1 + 6 with chunk"
MADE, ALL, GROUPED = "k_nope and v", "all channels", "k_nope and v, 1 head at a time"
DIMS = (64, 128, 192, 256, 512)
CARDS = (24, 80, 141, 180)
RUNTIME_GB = 0.75
NO_GPU = "not measured on a GPU yet: closed form, and tensors counted"


def measure(data_dir: Path) -> None:
    """Make the committed table anew."""
    from mla_study.evaluation.efficiency.bench_memory import bench_batch

    bench_batch(folder=data_dir / ID)


def rows_of(
    table: pd.DataFrame, window: str, transient: str = MADE, storage: str = "bf16"
) -> pd.DataFrame:
    """Latent rows of one kind, by d_c."""
    kind = (table["window"] == window) & (table["transient"] == transient)
    return table[kind & (table["storage"] == storage)].sort_values("d_c")


def dense_of(table: pd.DataFrame, window: str) -> pd.Series:
    """The dense row of a window."""
    return table[(table["window"] == window) & (table["layout"] == "dense")].iloc[0]


def latent_of(table: pd.DataFrame, window: str, **kind: str) -> pd.Series:
    """The latent row of the default d_c."""
    rows = rows_of(table, window, **kind)
    return rows[rows["d_c"] == 192].iloc[0]


def draw(out_dir: str) -> Figure:
    """Draw and save ``fig7_batch_scaling.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.

    Raises:
        UserError: the table is not there.
    """
    import matplotlib.pyplot as plt

    found = read_result(ROOT / DATA[0])
    table, on_gpu = found.table, found.tables.get("measured")
    kinds = PROVENANCE if on_gpu is None else (*PROVENANCE, "measured")
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(PAGE_WIDTH, 2.55), width_ratios=(1, 1.1, 1.15))
        _memory_panel(axes[0], table)
        _slope_panel(axes[1], table)
        _batch_panel(axes[2], table)
        if on_gpu is None:
            figure.text(0.005, 0.012, NO_GPU, fontsize=6, style="italic", color="0.35")
        else:
            _measured_marks(axes[0], on_gpu)
        stamp(figure, kinds, found.validity, found.run_hash)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def _memory_panel(axis: Axes, table: pd.DataFrame) -> None:
    batch = np.arange(0, 65)
    blue = COLOURS["blue"]
    lines: tuple[tuple[Any, str, str, str, tuple[float, float], str], ...] = (
        (dense_of(table, FULL), "black", "-", "dense,\n21 frames", (19, 152), "right"),
        (dense_of(table, BESIDE), "black", "--", "dense,\n1 + 6 + chunk", (41, 100), "left"),
        (latent_of(table, FULL), blue, "-", "$d_c$ 192, 21 frames", (63, 58), "right"),
        (latent_of(table, BESIDE), blue, "--", "$d_c$ 192, 1 + 6 + chunk", (63, 9), "right"),
    )
    for row, colour, dash, label, place, side in lines:
        fixed = row["weights_gb"] + RUNTIME_GB
        axis.plot(batch, fixed + batch * row["slope_gb"], dash, color=colour)
        axis.text(*place, label, color=colour, fontsize=5.5, ha=side)
    for card in CARDS:
        axis.axhline(card, color="0.75", lw=0.5, zorder=0)
        axis.text(65, card, f"{card} GB", fontsize=5, color="0.45", va="center")
    axis.set(xlabel="batch", ylabel="memory (GB)", xlim=(0, 64), ylim=(0, 200))
    axis.set_title("(a) memory against batch")


def _slope_panel(axis: Axes, table: pd.DataFrame) -> None:
    places = np.arange(1, len(DIMS) + 1)
    full = rows_of(table, FULL)
    axis.plot(places, full["slope_gb"], "-", color=COLOURS["blue"], label="21 frames")
    axis.plot(
        places, rows_of(table, FULL, ALL)["slope_gb"], ":", color=COLOURS["blue"],
        label="21 frames, all 3072 channels",
    )  # fmt: skip
    axis.plot(
        places, full["counted_slope_gb"], "o", color=COLOURS["blue"], mfc="none", mew=0.7, ms=4,
        label="21 frames, live tensors counted",
    )  # fmt: skip
    axis.plot(
        places, full["paper_slope_gb"], "x", color="black", ms=4, mew=0.9, label="the paper's"
    )
    for window, colour in ((BESIDE, "vermillion"), (WITHIN, "green")):
        rows = rows_of(table, window)
        axis.plot(places, rows["slope_gb"], "--", color=COLOURS[colour], label=window)
        light = rows_of(table, window, GROUPED, "int8-token")
        axis.plot(places, light["slope_gb"], "-.", color=COLOURS[colour], lw=0.7)
    axis.plot([], [], "-.", color="0.4", lw=0.7, label="int8, head by head")
    for window, colour in ((FULL, "blue"), (BESIDE, "vermillion"), (WITHIN, "green")):
        row = dense_of(table, window)
        axis.plot([0], [row["slope_gb"]], "_", color=COLOURS[colour], ms=9, mew=1.3)
        axis.plot([0], [row["paper_slope_gb"]], "x", color="black", ms=4, mew=0.9)
        if window == FULL:
            counted = row["counted_slope_gb"]
            axis.plot([0], [counted], "o", color=COLOURS[colour], mfc="none", mew=0.7, ms=4)
    axis.axvline(0.5, color="0.85", lw=0.5)
    axis.set(yscale="log", ylim=(0.17, 11), xlim=(-0.5, len(DIMS) + 0.4), xlabel="$d_c$")
    axis.set_ylabel("GB a request")
    axis.set_xticks(range(len(DIMS) + 1), ["dense", *map(str, DIMS)])
    ticks = [0.25, 0.5, 1, 2, 4, 8]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    worst = _worst(table, MADE), _worst(table, ALL)
    axis.set_title("(b) what one more request adds")
    axis.text(
        0.98, 0.02, f"within {worst[0]:.1%} of the paper's (all channels {worst[1]:.1%})",
        transform=axis.transAxes, ha="right", fontsize=4.8, color="0.25",
    )  # fmt: skip
    axis.legend(loc="upper right", fontsize=5.2, ncols=1, borderaxespad=0.1, labelspacing=0.3)


def _worst(table: pd.DataFrame, transient: str) -> float:
    return float(rows_of(table, FULL, transient)["error"].abs().max())


def _batch_panel(axis: Axes, table: pd.DataFrame) -> None:
    bars: tuple[tuple[Any, str, str, str], ...] = (
        (dense_of(table, FULL), "0.25", "", "dense, 21 frames"),
        (dense_of(table, BESIDE), "0.65", "", "dense, 1 + 6 + chunk"),
        (latent_of(table, FULL), COLOURS["blue"], "", "$d_c$ 192, 21 frames"),
        (latent_of(table, BESIDE), COLOURS["vermillion"], "", "$d_c$ 192, 1 + 6 + chunk"),
        (
            latent_of(table, BESIDE, transient=GROUPED, storage="int8-token"),
            COLOURS["vermillion"], "//////", "the same, int8, head by head",
        ),
    )  # fmt: skip
    wide = 0.18
    for number, (row, colour, hatch, label) in enumerate(bars):
        places = np.arange(len(CARDS)) + (number - 2) * wide
        values = [int(row[f"max_batch_{card}"]) for card in CARDS]
        face = "white" if hatch else colour
        axis.bar(
            places, values, wide * 0.92, color=face, edgecolor=colour, hatch=hatch, label=label
        )
        for place, value in zip(places, values, strict=True):
            axis.text(place, value * 1.06, str(value), ha="center", fontsize=4.4)
    axis.set(yscale="log", ylim=(1, 6000), ylabel="largest batch")
    axis.set_xticks(range(len(CARDS)), [f"{card} GB" for card in CARDS])
    axis.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axis.minorticks_off()
    ratio = float(latent_of(table, BESIDE)["headroom"])
    axis.set_title(f"(c) largest batch (80 GB: {ratio:.1f}x dense)")
    axis.legend(loc="upper left", fontsize=5.2, labelspacing=0.3, borderaxespad=0.1)


def _measured_marks(axis: Axes, on_gpu: pd.DataFrame) -> None:
    good = on_gpu[(on_gpu["status"] == "ok") & on_gpu["window"].isin([FULL, BESIDE])]
    plain = good[good["transient"].isin([MADE, "none"])]
    for form, colour in (("dense", "black"), ("reconstruct", COLOURS["blue"])):
        rows = plain[plain["form"] == form]
        axis.plot(
            rows["batch"], rows["total_gb"], "D", color=colour, mfc="none", ms=3, mew=0.7,
            label=f"measured, {form}",
        )  # fmt: skip
    axis.legend(loc="upper right", fontsize=5.2)
