"""The picture of a probe: energy curves and effective rank by layer, or along training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.errors import UserError
from mla_study.study.plots import save_figure, stamp, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_JOINT = ("composed", "kv", "qkv", "k", "v", "q", "o", "qk", "ov")


def check_plot_path(path: Path) -> str:
    """The format that the suffix asks for; UserError for any other than pdf, png and svg."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("pdf", "png", "svg"):
        raise UserError(f"--plot {path}: the suffix chooses the format, give .pdf, .png or .svg")
    return kind


def plot_probe(
    table: pd.DataFrame, spectra: pd.DataFrame, path: Path, gauge: str, run: Mapping[str, Any]
) -> None:
    """Draw one overlay of all checkpoints (or of all series) into ``path``."""
    kind = check_plot_path(path)
    with style():
        import matplotlib.pyplot as plt

        series = table["step"].notna().any()
        figure, axes = plt.subplots(1, 3 if series else 2, figsize=(6.9 if series else 5.2, 2.3))
        (_draw_series if series else _draw_layers)(axes, table, spectra, gauge)
        stamp(figure, run["provenance"], run["validity"], run["run_hash"])
        save_figure(figure, path.with_suffix(""), (kind,))
        plt.close(figure)


def _pick(table: pd.DataFrame, gauge: str) -> pd.DataFrame:
    """Self-attention rows of the joint operator of each checkpoint, in the gauge if it has it."""
    kind = "self" if (table["attention"] == "self").any() else "cross"
    rows = table[(table["attention"] == kind) & ~table["gauge"].str.startswith("weighted")]
    have = set(rows["operator"])
    operators = [op for op in _JOINT[:2] if op in have] or [op for op in _JOINT if op in have][:1]
    rows = rows[rows["operator"].isin(operators)]
    chosen = rows.groupby("operator")["gauge"].transform(
        lambda g: gauge if (g == gauge).any() else g.iloc[0]
    )
    return rows[rows["gauge"] == chosen]


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """The last path components that tell the labels apart."""
    parts = {label: [p for p in label.split("/") if p] or [label] for label in labels}
    for depth in range(1, max(map(len, parts.values()), default=1) + 1):
        short = {label: "/".join(p[-depth:]) for label, p in parts.items()}
        if len(set(short.values())) == len(parts):
            return short
    return {label: label for label in labels}


def _draw_layers(axes: Any, table: pd.DataFrame, spectra: pd.DataFrame, gauge: str) -> None:
    left, right = axes
    rows = _pick(table, gauge)
    names = short_names(list(dict.fromkeys(rows["checkpoint"])))
    curves = _pick(spectra, gauge)
    for number, (label, name) in enumerate(names.items()):
        color = f"C{number % 8}"
        mine = curves[curves["checkpoint"] == label]
        for i, (_, one) in enumerate(mine.groupby(["layer", "operator", "head"], sort=False)):
            energy = np.cumsum(np.square(one["sigma"].to_numpy()))
            k = np.arange(1, energy.size + 1) / energy.size
            left.plot(
                k,
                energy / energy[-1],
                color=color,
                lw=0.5,
                alpha=0.6,
                label=name if i == 0 else None,
            )
        full = mine.groupby(["layer", "operator"])["index"].max()
        _rank_by_layer(right, rows[rows["checkpoint"] == label], full, color, name)
    left.set(xlabel="k / full rank", ylabel="energy E(k)", ylim=(0, 1.02), xlim=(0, 1))
    left.axhline(0.99, color="0.6", lw=0.5, ls=":")
    left.set_title(f"energy of {' / '.join(dict.fromkeys(rows['operator']))}, a curve a layer")
    right.set(xlabel="layer", ylabel="$r_{.99}$ / full rank", ylim=(0, 1.02))
    right.set_title("effective rank; bands: random matrices")
    right.legend(loc="lower right")


def _rank_by_layer(
    axis: Axes, rows: pd.DataFrame, sizes: pd.Series[int], color: str, name: str
) -> None:
    ranks = rows[rows["metric"] == "r_0.99"]
    nulls = set(ranks["null"])
    ranks = ranks[
        ranks["null"] == ("gaussian_product" if "gaussian_product" in nulls else "gaussian")
    ]
    if ranks.empty:
        return
    full = sizes.reindex(list(zip(ranks["layer"], ranks["operator"], strict=True))).to_numpy()
    ranks = ranks.assign(
        part=ranks["value"] / full,
        low=(ranks["null_value"] - 2 * ranks["null_se"]) / full,
        high=(ranks["null_value"] + 2 * ranks["null_se"]) / full,
    )
    by_layer = ranks.groupby("layer")[["part", "low", "high"]].median()
    axis.plot(by_layer.index, by_layer["part"], "o-", color=color, label=name)
    axis.fill_between(
        by_layer.index, by_layer["low"], by_layer["high"], color=color, alpha=0.25, lw=0
    )


def _draw_series(axes: Any, table: pd.DataFrame, spectra: pd.DataFrame, gauge: str) -> None:
    del spectra
    rows = _pick(table, gauge)
    panels = (
        ("r_0.99_interp", "$r_{.99}$ (interpolated)"),
        ("entropy_rank", "entropy rank"),
    )
    for number, name in enumerate(dict.fromkeys(rows["series"])):
        color = f"C{number % 8}"
        mine = rows[rows["series"] == name]
        nulls = set(mine["null"])
        null = "gaussian_product" if "gaussian_product" in nulls else "gaussian"
        for axis, (metric, _) in zip(axes, panels, strict=False):
            one = mine[(mine["metric"] == metric) & (mine["null"] == null)]
            median = one.groupby("step")[["value", "null_value"]].median()
            steps = median.index.to_numpy(dtype=float)
            axis.plot(steps, median["value"], "o-", color=color, label=name or "series")
            axis.plot(steps, median["null_value"], "--", color=color, lw=0.7, label="null")
        for metric in dict.fromkeys(mine["metric"]):
            if not metric.startswith("overlap_with_"):
                continue
            one = mine[mine["metric"] == metric]
            median = one.groupby("step")[["value", "null_value"]].median()
            steps = median.index.to_numpy(dtype=float)
            partner = metric.removeprefix("overlap_with_")
            dash = "-" if partner == "start" else ":"
            axes[2].plot(
                steps,
                median["value"],
                "o" + dash,
                color=color,
                label=f"{name or 'series'} ~ {partner}",
            )
            axes[2].plot(steps, median["null_value"], "--", color="0.5", lw=0.7)
    for axis, (_, label) in zip(axes, panels, strict=False):
        axis.set(xlabel="step", ylabel=label)
        axis.legend()
    axes[2].set(xlabel="step", ylabel="row-space overlap", ylim=(0, 1.03))
    axes[2].legend()
    axes[0].set_title("median over layers")
    axes[1].set_title("dashed: random matrices")
    axes[2].set_title("dashed: random subspaces, k/d")


def writable(path: Path) -> None:
    """Refuse early what could not be written at the end."""
    folder = path.parent
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is not writable: choose another place")
