"""The picture of a probe: by layer, along training, or of a pair of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.errors import UserError
from mla_study.probes.spectrum import effective_rank, energy_curve
from mla_study.study.plots import NULL_COLOUR, save_figure, stamp, style
from mla_study.study.probe_report import shown_rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_ORDER = ("composed", "kv", "qkv", "k", "v", "q", "o", "qk", "ov")
_JOINT = ("composed", "kv")  # drawn together: a latent model beside its dense source


def check_plot_path(path: Path) -> str:
    """The format that the suffix asks for; UserError for any other than pdf, png and svg."""
    kind = path.suffix.lstrip(".")
    if kind not in ("pdf", "png", "svg"):
        raise UserError(f"--plot {path}: the suffix chooses the format, give .pdf, .png or .svg")
    return kind


def writable(path: Path) -> None:
    """Refuse early what could not be written at the end; UserError."""
    folder = path.parent
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is not writable: choose another place")


def plot_probe(
    table: pd.DataFrame, spectra: pd.DataFrame, path: Path, gauge: str, run: Mapping[str, Any]
) -> None:
    """Draw one overlay of all checkpoints, of all series, or of a comparison into ``path``.

    Args:
        table, spectra: as :class:`~mla_study.probes.rank_probe.Probed` has them.
        path: .pdf, .png or .svg; complete or absent.
        gauge: the one to draw, where an operator has it.
        run: the run record, whose class and hash are printed on the figure.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    kind = check_plot_path(path)
    with style():
        import matplotlib.pyplot as plt

        series = bool(table["step"].notna().any())
        panels = 3 if series else 2
        figure, axes = plt.subplots(1, panels, figsize=(2.4 * panels, 2.4))
        try:
            if series:
                _draw_series(axes, table, gauge)
            elif spectra.empty:
                _draw_pair(axes, table)
            else:
                _draw_layers(axes, table, spectra, gauge)
            for axis in axes:
                if axis.get_legend_handles_labels()[0]:
                    axis.legend()
            stamp(figure, run["provenance"], run["validity"], run["run_hash"])
            save_figure(figure, path.with_suffix(""), (kind,))
        finally:
            plt.close(figure)


def _joint(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the joint operators, of self-attention where there is any, without weighted ones."""
    rows = rows[~rows["gauge"].str.startswith("weighted-")]
    kind = "self" if (rows["attention"] == "self").any() else "cross"
    rows = rows[rows["attention"] == kind]
    have = [op for op in _ORDER if (rows["operator"] == op).any()]
    operators = [op for op in _JOINT if op in have] or have[:1]
    return rows[rows["operator"].isin(operators)]


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
    rows = _joint(shown_rows(table, gauge))
    place = ["checkpoint", "layer", "operator", "gauge", "head"]
    curves = _joint(spectra).merge(rows[place].drop_duplicates(), on=place)
    ranks = rows[rows["metric"] == "r_0.99"]
    names = short_names(list(dict.fromkeys(rows["checkpoint"])))
    for number, (label, name) in enumerate(names.items()):
        color = f"C{number % 8}"
        mine = curves[curves["checkpoint"] == label]
        points: dict[int, list[float]] = {}
        sizes: dict[int, int] = {}
        for _, one in mine.groupby(place, sort=False):
            sigma = one["sigma"].to_numpy(dtype=float)
            k = np.arange(1, sigma.size + 1) / sigma.size
            left.plot(k, energy_curve(sigma), color=color, lw=0.5, alpha=0.6)
            layer = int(one["layer"].iloc[0])
            points.setdefault(layer, []).append(effective_rank(sigma, 0.99) / sigma.size)
            sizes[layer] = sigma.size
        layers = sorted(points)
        right.plot(layers, [np.median(points[x]) for x in layers], "o-", color=color, label=name)
        _band(right, ranks[ranks["checkpoint"] == label], sizes, color)
    left.axhline(0.99, color=NULL_COLOUR, lw=0.5, ls=":")
    left.set(xlabel="k / full rank", ylabel="energy E(k)", ylim=(0, 1.02), xlim=(0, 1))
    left.set_title(f"energy of {' / '.join(dict.fromkeys(rows['operator']))}, a curve a layer")
    right.set(xlabel="layer", ylabel="$r_{.99}$ / full rank", ylim=(0, 1.02))
    right.set_title("effective rank; bands: random matrices")


def _band(axis: Axes, ranks: pd.DataFrame, sizes: Mapping[int, int], color: str) -> None:
    """Null of r_.99 by layer, two standard deviations to each side."""
    full = ranks["layer"].map(sizes)
    bounds = ranks.assign(
        low=(ranks["null_value"] - 2 * ranks["null_se"]) / full,
        high=(ranks["null_value"] + 2 * ranks["null_se"]) / full,
    )
    by_layer = bounds.groupby("layer")[["low", "high"]].median()
    layers = by_layer.index.to_numpy(dtype=float)
    if layers.size == 1:
        layers, by_layer = layers[0] + np.array([-0.2, 0.2]), by_layer.iloc[[0, 0]]
    axis.fill_between(layers, by_layer["low"], by_layer["high"], color=color, alpha=0.25, lw=0)


def _medians(rows: pd.DataFrame, by: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, values and null values, medians over what else the rows tell apart."""
    medians = rows.groupby(by)[["value", "null_value"]].median()
    places = medians.index.to_numpy(dtype=float)
    return places, medians["value"].to_numpy(), medians["null_value"].to_numpy()


def _draw_series(axes: Any, table: pd.DataFrame, gauge: str) -> None:
    rows = _joint(shown_rows(table, gauge))
    spaces = _joint(table[table["metric"].str.startswith("overlap_with_")])
    panels = (
        ("r_0.99_interp", "$r_{.99}$ (interpolated)", "median over layers"),
        ("entropy_rank", "entropy rank", "dashed: random matrices"),
    )
    drawn: set[frozenset[str]] = set()
    for number, name in enumerate(dict.fromkeys(table["series"])):
        color = f"C{number % 8}"
        for axis, (metric, _, _) in zip(axes, panels, strict=False):
            one = rows[(rows["series"] == name) & (rows["metric"] == metric)]
            steps, values, nulls = _medians(one, "step")
            axis.plot(steps, values, "o-", color=color, label=name or "series")
            axis.plot(steps, nulls, "--", color=color, lw=0.7)
        mine = spaces[spaces["series"] == name]
        for metric in dict.fromkeys(mine["metric"]):
            partner = metric.removeprefix("overlap_with_")
            pair = frozenset((name, partner if partner != "start" else f"{name} start"))
            if pair in drawn:  # the overlap of two series is the same from either side
                continue
            drawn.add(pair)
            steps, values, nulls = _medians(mine[mine["metric"] == metric], "step")
            dash, label = ("-", "start") if partner == "start" else (":", partner)
            label = f"{name or 'series'} ~ {label}"
            axes[2].plot(steps, values, "o" + dash, color=color, label=label)
            axes[2].plot(steps, nulls, "--", color=NULL_COLOUR, lw=0.7)
    for axis, (_, label, title) in zip(axes, panels, strict=False):
        axis.set(xlabel="step", ylabel=label, title=title)
    axes[2].set(xlabel="step", ylabel="row-space overlap", ylim=(0, 1.03))
    axes[2].set_title("dashed: random subspaces, k/d")


def _draw_pair(axes: Any, table: pd.DataFrame) -> None:
    left, right = axes
    kinds = list(dict.fromkeys(table["attention"]))
    for number, kind in enumerate(kinds):
        mine = table[table["attention"] == kind]
        overlaps = mine[mine["metric"] == "overlap"]
        layers, values, nulls = _medians(overlaps, "layer")
        left.plot(layers, values, "o-", color=f"C{number}", label=kind)
        left.plot(layers, nulls, "--", color=NULL_COLOUR, lw=0.7)
        for what, dash in (("min", ":"), ("median", "-"), ("max", ":")):
            angles = mine[mine["metric"] == f"principal_angle_{what}"]
            layers, values, _ = _medians(angles, "layer")
            label = kind if what == "median" else None
            right.plot(layers, np.degrees(values), dash, color=f"C{number}", label=label)
    left.set(xlabel="layer", ylabel="row-space overlap", ylim=(0, 1.03))
    left.set_title("dashed: random subspaces")
    right.set(xlabel="layer", ylabel="principal angle [degrees]", ylim=(0, 92))
    right.set_title("median; dotted: smallest, largest")
