"""What of a speed-up is the window and what the layout: each change alone, measured and predicted.

The paper sets a latent model that keeps 7 latent frames beside dense ones that keep 21 (Table 3).
Here each change is made alone, at both readings of the paper's window, on a model with a quarter of
Wan 1.3B's sizes on one CPU thread, where every part of a pass has the share that it has at full
size. Bars are medians of ratios turn by turn with quartiles; marks are ratios of FLOPs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mla_study.study.plots import COLUMN_WIDTH, save_figure, stamp, style
from mla_study.study.runs import read_result, round_significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig_attribution"
TITLE = "What of a rollout's speed-up is the window, the layout, the form, the clean pass"
PROVENANCE = ("measured", "modelled")
DATA = ("results/data/fig_attribution",)
ROOT = Path(__file__).resolve().parents[1]
REPEATS, CLIPS = 11, 2
ROWS = {
    "window": "window, dense",
    "layout, reconstruct": "layout, reconstruct",
    "layout, reconstruct, d_c 192": "the same, $d_c$ 192",
    "layout, absorbed": "layout, absorbed",
    "layout, absorbed, d_c 192": "the same, $d_c$ 192",
    "no clean pass, dense": "no clean pass, dense",
    "no clean pass, latent": "no clean pass, latent",
    "int8 cache, dense": "int8 cache, dense",
    "int8 cache, latent": "int8 cache, latent",
    "all, reconstruct": "window and layout,\nreconstruct",
    "all, auto": "window and layout,\nbest form",
}
READINGS = {
    "1 + 6 + chunk": "window of 10 frames: 1 + 6 + chunk of 3",
    "1 + 6 with chunk": "window of 7 frames: 1 + 6, chunk within",
}


def measure(data_dir: Path, repeats: int = REPEATS, clips: int = CLIPS) -> None:
    """Measure the committed table anew: about ten minutes of one core that does nothing else."""
    from mla_study.evaluation.efficiency.runs import run
    from mla_study.evaluation.efficiency.variants import quarter
    from mla_study.evaluation.timing import threads

    with threads(1):
        made = run(quarter(), "both", ("chunk",), repeats, clips)
    made.write(data_dir / ID, "substitute")


def draw(out_dir: str) -> Figure:
    """Draw and save ``fig_attribution.{pdf,png,svg}``; print the factors.

    Args:
        out_dir: where the three files go.
    """
    import matplotlib.pyplot as plt

    result = read_result(ROOT / DATA[0])
    factors = round_significant(result.tables["factors"])
    for line in summary(factors):
        print(line)
    with style():
        figure, axis = plt.subplots(figsize=(COLUMN_WIDTH, 3.5))
        bars(axis, factors)
        stamp(figure, PROVENANCE, result.validity, result.run_hash)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def summary(factors: pd.DataFrame) -> list[str]:
    """The factors as text, a line each."""
    lines: list[str] = []
    for row in factors.to_dict("records"):
        name = ", ".join(part for part in (row["reading"], row["factor"]) if part)
        lines.append(
            f"{name}: {row['value']:.3f}x [{row['low']:.3f}, {row['high']:.3f}], FLOPs "
            f"{row['predicted']:.3f}x here and {row['predicted_full']:.3f}x at 1.3B"
        )
    return lines


def bars(axis: Axes, factors: pd.DataFrame) -> None:
    """A pair of bars a change, one a reading; ticks are predictions, the band is A/A noise."""
    chunks = factors[factors["kind"] == "chunk"]
    noise = chunks[chunks["factor"] == "noise (A/A)"].iloc[0]
    width = max(abs(noise["low"] - 1), abs(noise["high"] - 1))
    axis.axvspan(1 - width, 1 + width, color="0.85", lw=0, zorder=0, label="A/A noise")
    axis.axvline(1, color="0.4", lw=0.6, zorder=1)
    place = np.arange(len(ROWS), dtype=float)
    for number, (reading, label) in enumerate(READINGS.items()):
        mine = chunks[chunks["reading"] == reading].set_index("factor").reindex(list(ROWS))
        at = place + (number - 0.5) * 0.38
        value = mine["value"].to_numpy(dtype=float)
        spread = np.abs(mine[["low", "high"]].to_numpy(dtype=float).T - value)
        axis.barh(
            at, value - 1, 0.34, left=1, color=f"C{number}", alpha=0.6, xerr=spread,
            error_kw={"lw": 0.7, "capsize": 1.2, "capthick": 0.6, "ecolor": "0.25"}, label=label,
            zorder=2,
        )  # fmt: skip
        for y, times in zip(at, value, strict=True):
            axis.text(
                1.0, y, f"{times:.2f}", transform=axis.get_yaxis_transform(), fontsize=4.8,
                color=f"C{number}", ha="right", va="center",
            )  # fmt: skip
        here, there = "FLOPs, this model", "FLOPs, Wan 1.3B"
        axis.plot(
            mine["predicted"], at, "|", color="k", ms=6, mew=1.1, zorder=4,
            label=here if number else None,
        )  # fmt: skip
        axis.plot(
            mine["predicted_full"], at, "D", mfc="none", mec="k", ms=2.6, mew=0.6, zorder=4,
            label=there if number else None,
        )  # fmt: skip
    axis.set_yticks(place, list(ROWS.values()))
    axis.set_xlabel("times faster a chunk, VAE not counted")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.13 * (high - low))
    for edge in (0.5, 4.5, 8.5):
        axis.axhline(edge, color="0.8", lw=0.5, zorder=0)
    axis.set_ylim(len(ROWS) - 0.45, -0.55)
    axis.grid(axis="x", color="0.9", lw=0.4, zorder=0)
    axis.set_axisbelow(True)
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(
        handles, labels, loc="outside upper center", ncols=2, fontsize=5, handlelength=1.4,
        columnspacing=1.0,
    )  # fmt: skip
