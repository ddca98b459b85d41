"""Fig. 2: the composed operator of trained students at every d_c, beside untrained and Gaussian.

A column a d_c of the miniature: singular values over the largest, energy E(k), and r_.99 / d_c of
every layer of [W_K_up; W_V_up] diag(g) W_kv_down, after all stages, at the start, and of a student
converted from a network that has seen nothing. Lines are medians, bands ranges over layers and
seeds (last row: over seeds); the grey null is a product of Gaussian factors of the same shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import miniature
from mla_study.errors import UserError
from mla_study.probes.spectrum import effective_rank_interpolated
from mla_study.study.plots import COLOURS, NULL_COLOUR, PAGE_WIDTH, save_figure, stamp, style
from mla_study.study.runs import round_significant

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig2_composed_operator"
TITLE = "Composed operator of the miniature's students at every latent size, beside its nulls"
PROVENANCE = ("measured", "null-model")
DATA = ("results/data/study_spectra",)
ROOT = Path(__file__).resolve().parents[1]
STATES = {
    "trained": (COLOURS["green"], "-", "after all stages"),
    "start": (COLOURS["orange"], "--", "at the start"),
    "untrained": (COLOURS["black"], ":", "untrained network, converted"),
}
DRAWS = 32


def chosen(spectra: pd.DataFrame, init: str, d_rope: int) -> pd.DataFrame:
    """Rows of one init and split, and of the untrained conversions of that split.

    Raises:
        UserError: there are none.
    """
    rows = miniature.usual(spectra, None, d_rope)
    rows = rows[(rows["operator"] == "composed") & (rows["gauge"] == "raw")]
    mine = rows[(rows["init"] == init) & rows["state"].isin(["trained", "start"])]
    if mine.empty:
        raise UserError(f"no student has init={init} d_rope={d_rope}: see the study's spectra")
    never = rows[(rows["state"] == "untrained") & rows["d_c"].isin(set(mine["d_c"]))]
    return pd.concat([mine, never])


def wide(rows: pd.DataFrame) -> np.ndarray:
    """Singular values [seeds and layers, k] of one state and d_c, seed by seed."""
    table = rows.pivot_table(index=["seed", "layer"], columns="index", values="sigma")
    return table.to_numpy()


def energies(sigma: np.ndarray) -> np.ndarray:
    """E(k) [..., k], the share of squares in the first k."""
    square = np.cumsum(np.square(sigma), axis=-1)
    return square / square[..., -1:]


def gaussian_product(m: int, r: int, n: int, draws: int = DRAWS) -> np.ndarray:
    """Singular values [draws, r] of products of Gaussian [m, r] and [r, n] factors."""
    rng = np.random.default_rng([m, r, n])
    made = [
        np.linalg.svd(
            np.linalg.qr(rng.standard_normal((m, r)))[1]
            @ np.linalg.qr(rng.standard_normal((n, r)))[1].T,
            compute_uv=False,
        )
        for _ in range(draws)
    ]
    return round_significant(np.stack(made))


def ranks(rows: pd.DataFrame) -> pd.DataFrame:
    """r_.99, interpolated, over d_c: ``value`` with ``low`` and ``high`` over seeds, by layer."""
    by = rows.sort_values("index").groupby(["seed", "layer", "d_c"])["sigma"]
    found = by.apply(lambda s: effective_rank_interpolated(s.to_numpy(float), 0.99)).reset_index()
    found["value"] = found["sigma"] / found["d_c"]
    return miniature.over_seeds(found.drop(columns="sigma"), ["layer"])


def draw(out_dir: str, init: str = "activation", d_rope: int = miniature.D_ROPE) -> Figure:
    """Draw and save ``fig2_composed_operator.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        init: of the students that were trained.
        d_rope: their rotary channels.

    Raises:
        UserError: no such students.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    result = miniature.read("spectra", ROOT)
    rows = chosen(result.table, init, d_rope)
    sizes = sorted(set(rows["d_c"]))
    validity, run_hash = miniature.drawn_from(ID, [result])
    with style():
        figure, axes = plt.subplots(
            3, len(sizes), figsize=(PAGE_WIDTH, 4.4), sharey="row", squeeze=False
        )
        for (top, middle, bottom), d_c in zip(axes.T, sizes, strict=True):
            mine = rows[rows["d_c"] == d_c]
            null = gaussian_product(int(mine["m"].iloc[0]), d_c, int(mine["n"].iloc[0]))
            _band(top, null / null[:, :1], NULL_COLOUR, "-", null=True)
            _band(middle, energies(null), NULL_COLOUR, "-", null=True)
            values = [effective_rank_interpolated(sigma, 0.99) / d_c for sigma in null]
            mean, sd = np.mean(values), np.std(values, ddof=1)
            bottom.axhspan(mean - 2 * sd, mean + 2 * sd, color=NULL_COLOUR, alpha=0.5, lw=0)
            for state, (colour, dash, _) in STATES.items():
                of = mine[mine["state"] == state]
                if of.empty:
                    continue
                sigma = round_significant(wide(of))
                _band(top, sigma / sigma[:, :1], colour, dash)
                _band(middle, energies(sigma), colour, dash)
                _ranks(bottom, ranks(of), colour, dash)
            top.set_title(f"$d_c$ = {d_c} of {miniature.WIDTH}")
            top.set_xlabel("i")
            middle.set_xlabel("k")
            bottom.set_xlabel("layer")
            bottom.set_xticks(sorted(set(mine["layer"])))
            for axis in (top, middle):
                axis.set_xlim(0 if d_c > 8 else 0.5, d_c if d_c > 8 else d_c + 0.5)
                axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes[0, 0].set_ylabel(r"$\sigma_i$ / $\sigma_1$")
        axes[0, 0].set_ylim(bottom=0)
        axes[1, 0].set_ylabel("energy E(k)")
        axes[2, 0].set_ylabel("$r_{.99}$ / $d_c$")
        seeds, layers = rows["seed"].nunique(), rows["layer"].nunique()
        figure.suptitle(
            f"Composed operator of the miniature, init {init}, split "
            f"{miniature.HEAD - d_rope}/{d_rope}: median, range of {layers} layers x {seeds} seeds",
            fontsize=7,
        )
        _legend(figure)
        stamp(figure, PROVENANCE, validity, run_hash)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def _band(axis: Axes, values: np.ndarray, colour: str, dash: str, null: bool = False) -> None:
    x = np.arange(1, values.shape[1] + 1)
    middle = np.median(values, axis=0)
    marker = "." if values.shape[1] < 9 else ""
    if null:
        sd = values.std(axis=0, ddof=1)
        low, high = middle - 2 * sd, middle + 2 * sd
    else:
        low, high = values.min(axis=0), values.max(axis=0)
    axis.plot(x, middle, dash, color=colour, marker=marker, lw=0.9)
    axis.fill_between(x, low, high, color=colour, alpha=0.4 if null else 0.15, lw=0)


def _ranks(axis: Axes, found: pd.DataFrame, colour: str, dash: str) -> None:
    found = found.sort_values("layer")
    bars = np.stack([found["value"] - found["low"], found["high"] - found["value"]]).clip(0)
    axis.errorbar(
        found["layer"], found["value"], bars, color=colour, ls=dash, marker="o", ms=2, lw=0.8,
        elinewidth=0.6,
    )  # fmt: skip


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Artist] = [
        Line2D([], [], color=c, ls=d, label=told) for c, d, told in STATES.values()
    ]
    marks.append(Patch(color=NULL_COLOUR, alpha=0.5, label="Gaussian product ± 2 s.d. (null)"))
    figure.legend(handles=marks, loc="outside lower left", ncols=4, fontsize=5.5)
