"""Where absorbed attention stops being the cheaper form: measured, and derived from FLOPs.

(a) measured seconds of absorbed over those of reconstruct, against the queries of a pass, a line a
latent size; (b) the number of queries at which the two meet, against the latent size, beside what
counting FLOPs says (269 at d_c = 192). Attention of one layer without its projections, heads of
128 + 32 rotary channels, drawn from the committed calibration of one device.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mla_study.errors import UserError
from mla_study.kernels.latent_attention.cost import crossover
from mla_study.study.plots import COLOURS, NULL_COLOUR, save_figure, stamp, style
from mla_study.study.runs import read_result, round_significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig_crossover"
TITLE = "Crossover of absorbed and reconstructed latent attention: measured against derived"
PROVENANCE = ("measured", "modelled")
DATA = ("results/data/calibration",)
ROOT = Path(__file__).resolve().parents[1]


def measured_crossover(queries: np.ndarray, ratio: np.ndarray) -> float:
    """Queries at which the ratio passes 1, between neighbours on log axes; NaN: it never does.

    Args:
        queries: rising [n]. ratio: absorbed over reconstruct [n].
    """
    above = np.flatnonzero(ratio >= 1)
    if not above.size or above[0] == 0:
        return float("nan")
    i = above[0]
    x, y = np.log(queries[i - 1 : i + 1]), np.log(ratio[i - 1 : i + 1])
    return float(np.exp(x[0] - y[0] * (x[1] - x[0]) / (y[1] - y[0])))


def ratios(choices: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """A row a shape of the larger grid: queries, d_c, ratio with the quartiles' bounds."""
    rows = choices[(choices["dtype"] == dtype) & (choices["heads"] == 12)]
    return pd.DataFrame(
        {
            "queries": rows["queries"],
            "d_c": rows["d_c"],
            "ratio": rows["absorbed_s"] / rows["reconstruct_s"],
            "low": rows["absorbed_low"] / rows["reconstruct_high"],
            "high": rows["absorbed_high"] / rows["reconstruct_low"],
        }
    ).sort_values(["d_c", "queries"])


def draw(out_dir: str, dtype: str = "fp32") -> Figure:
    """Draw and save ``fig_crossover.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        dtype: of panel (a): fp32 or bf16; panel (b) shows all that were measured.
    """
    import matplotlib.pyplot as plt

    result = read_result(ROOT / DATA[0])
    choices = round_significant(result.tables["choices"])
    known = list(dict.fromkeys(choices["dtype"]))
    if dtype not in known:
        raise UserError(f"dtype={dtype} was not measured: give one of {', '.join(known)}")
    config = result.run["identity"]["config"]
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.7))
        _ratio_panel(left, ratios(choices, dtype))
        _crossover_panel(right, choices)
        keys = int(choices[choices["heads"] == 12]["keys"].iloc[0])
        left.set_title(f"(a) {dtype}, {keys} keys, 12 heads; bars: quartiles", fontsize=6.5)
        right.set_title("(b) queries at which the forms meet", fontsize=6.5)
        device = str(config["device"]).split(",", maxsplit=1)[0]
        figure.suptitle(
            f"One attention without projections, {device}, {config['threads']} thread; "
            "below the crossover absorbed is faster",
            fontsize=7,
        )
        stamp(figure, PROVENANCE, result.validity, result.run_hash)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def _ratio_panel(axis: Axes, rows: pd.DataFrame) -> None:
    colours = list(COLOURS.values())
    for colour, (d_c, mine) in zip(colours, rows.groupby("d_c"), strict=False):
        bars = np.abs(np.stack([mine["low"], mine["high"]]) - mine["ratio"].to_numpy())
        axis.errorbar(
            mine["queries"], mine["ratio"], bars, fmt="o-", ms=2.5, lw=0.9, elinewidth=0.6,
            color=colour, label=f"$d_c$ = {d_c}",
        )  # fmt: skip
    axis.axhline(1.0, color="k", lw=0.6)
    axis.set(
        xscale="log", yscale="log", xlabel="queries of a pass (tokens)",
        ylabel="seconds, absorbed / reconstruct",
    )  # fmt: skip
    axis.legend(fontsize=5.5, loc="upper left", ncols=2)


def _crossover_panel(axis: Axes, choices: pd.DataFrame) -> None:
    sizes = np.arange(113, 521)
    for value_is_key, dash, label in (
        (False, "-", "derived: $d_c (d_n + d_v) / (2 d_c - d_n - d_v)$"),
        (True, "--", "derived, values as wide as keys (SDPA)"),
    ):
        limits = [crossover(int(d_c), 32, 128, value_is_key) for d_c in sizes]
        axis.plot(sizes, limits, dash, color=NULL_COLOUR, lw=1.1, label=label)
    top = 4000.0
    for colour, marker, dtype in zip(
        (COLOURS["blue"], COLOURS["vermillion"], COLOURS["green"]), "osD",
        dict.fromkeys(choices["dtype"]), strict=False,
    ):  # fmt: skip
        found: list[tuple[int, float]] = []
        never: list[int] = []
        for d_c, mine in ratios(choices, dtype).groupby("d_c"):
            at = measured_crossover(mine["queries"].to_numpy(float), mine["ratio"].to_numpy())
            (found.append((int(str(d_c)), at)) if np.isfinite(at) else never.append(int(str(d_c))))
        axis.plot(*zip(*found, strict=True), marker, color=colour, ms=4, label=f"measured, {dtype}")
        axis.plot(
            never, [top * 0.8] * len(never), marker="^", ls="", color=colour, ms=4, mfc="none"
        )
    most = int(choices[choices["heads"] == 12]["queries"].max())
    axis.plot([], [], "^", color="0.4", mfc="none", ms=4, label=f"measured: beyond {most} queries")
    axis.plot([192], [crossover(192, 32, 128)], "x", color="k", ms=5, label="269 at $d_c$ = 192")
    axis.set(xlabel="$d_c$ (channels)", ylabel="crossover (queries)", yscale="log", ylim=(60, top))
    axis.legend(fontsize=5, loc="upper right")
