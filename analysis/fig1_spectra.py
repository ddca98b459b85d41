"""Fig. 1: spectra of [W_K; W_V] in pretrained models, beside random matrices and real inputs.

(a) normalised singular values, (b) energy curves with E(n/8), (c) r_.99 by layer, each with what a
Gaussian matrix of the same shape gives; (d) the same weights with the inputs that they really get.
Two small models that come as packages are measured in this very run; ``MLA_STUDY_WAN`` or the
parameter ``checkpoint`` adds another one, and ``probes`` what rank-probe has measured already; the
paper's values for Wan stand as quoted marks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd

from analysis import own_results
from analysis.demo_inputs import SENTENCES, minilm_covariance
from mla_study.probes.activations import save_covariance
from mla_study.probes.rank_probe import UNITS, Options, probe_sources
from mla_study.probes.table import Source
from mla_study.probes.work import Store
from mla_study.study.demo import demo_weights
from mla_study.study.plots import note_results, save_figure, stamp, style
from mla_study.study.reconcile import reconcile
from mla_study.study.runs import (
    Result,
    Validity,
    file_sha256,
    read_result,
    round_significant,
    run_record,
    write_result,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig1_spectra"
TITLE = "Spectra, energy and effective rank of pretrained [W_K; W_V], weights and activations"
PROVENANCE = ("measured", "null-model", "paper-quoted")
DATA = ("results/data/fig1_spectra", "results/paper/wan_spectrum.csv")
ROOT = Path(__file__).resolve().parents[1]
TABLE_KEYS = ("checkpoint", "layer", "operator", "gauge", "metric", "null")
SPECTRA_KEYS = ("checkpoint", "layer", "operator", "gauge", "index")
NAMES = {"minilm": "MiniLM (BERT)", "smollm2": "SmolLM2 (LM)", "wan": "Wan"}


def wan_path() -> str | None:
    """The file or folder that MLA_STUDY_WAN names."""
    return os.environ.get("MLA_STUDY_WAN") or None


def own_probes(probes: str) -> dict[str, Path]:
    """Results of rank-probe that the parameter names, by name."""
    return own_results.named(own_results.folders(probes, ROOT, "mla-study rank-probe"))


def INPUTS(probes: str = "") -> dict[str, Path]:
    """Files outside the repository that the figure depends on."""
    found = {name: demo_weights(name) for name in ("minilm", "smollm2")}
    wan = wan_path()
    if wan and Path(wan).exists():
        found["wan"] = Path(wan)
    return {**found, "sentences": SENTENCES, **own_results.files(own_probes(probes))}


def measure_all(checkpoint: str = "", covariance: str = "", probes: str = "") -> dict[str, Any]:
    """Probe the demo weights (and Wan or ``checkpoint`` where given), joint [K; V] only.

    What ``probes`` names joins as it was measured.

    Returns:
        ``table`` and ``spectra`` as rank-probe gives them, and ``record``: what identifies the run.
    """
    inputs = {"sentences": file_sha256(SENTENCES)}
    plans = [
        (Source(str(demo_weights("minilm")), "minilm"), "minilm.safetensors"),
        (Source(str(demo_weights("smollm2")), "smollm2"), ""),
    ]
    wan = wan_path()
    if wan:
        plans.append((Source(wan, "wan"), ""))
    if checkpoint:
        plans.append((Source(checkpoint, Path(checkpoint).name), covariance))
    tables: list[pd.DataFrame] = []
    spectra: list[pd.DataFrame] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_covariance(work / "minilm.safetensors", minilm_covariance())
        for source, given in plans:
            path = str(work / given) if given == "minilm.safetensors" else given
            options = Options(
                operators=("kv",), gauges=("raw", "balanced"), covariance=path or None
            )
            probed = probe_sources([source], options, Store(work))
            tables.append(probed.table[probed.table["attention"] == "self"])
            spectra.append(probed.spectra[probed.spectra["attention"] == "self"])
            inputs.update(probed.inputs)
            notes += [n for n in probed.notes if n.split(":")[0] not in NAMES]
    labels = [source.label for source, _ in plans]
    validities: list[Validity] = ["full"]
    for name, folder in own_probes(probes).items():
        result = read_result(folder)
        mine, curves = (_joint(result, part, name) for part in ("table", "spectra"))
        if not curves.empty:
            tables.append(mine)
            spectra.append(curves)
            labels += list(dict.fromkeys(curves["checkpoint"]))
            inputs[name] = result.run_hash
            validities.append(result.validity)
            note_results([folder])
    record = {
        "config": {
            "figure": ID,
            "operators": ["kv"],
            "gauges": ["raw", "balanced"],
            "checkpoints": labels,
        },
        "inputs": inputs,
        "seed": 0,
        "modules": (f"analysis.{ID}",),
        "provenance": "measured",
        "validity": max(validities, key=get_args(Validity).index),
        "units": UNITS,
        "notes": notes,
    }
    return {
        "table": pd.concat(tables, ignore_index=True),
        "spectra": pd.concat(spectra, ignore_index=True),
        "record": record,
    }


def _joint(result: Result, part: str, name: str) -> pd.DataFrame:
    """Rows of the joint [K; V] of self-attention, of no series; checkpoints under ``name``."""
    frame = result.tables[part]
    frame = frame[
        (frame["attention"] == "self") & (frame["operator"] == "kv") & (frame["series"] == "")
    ]
    alone = frame["checkpoint"].nunique() == 1 and name not in NAMES
    told = [name if alone else f"{name}: {Path(str(c)).name}" for c in frame["checkpoint"]]
    return frame.assign(checkpoint=told)


def measure(data_dir: Path) -> None:
    """Measure the committed table anew (demo weights only)."""
    saved = os.environ.pop("MLA_STUDY_WAN", None)
    try:
        made = measure_all()
    finally:
        if saved is not None:
            os.environ["MLA_STUDY_WAN"] = saved
    write_result(
        data_dir / ID, {"table": made["table"], "spectra": made["spectra"]}, **made["record"]
    )


def against_committed(made: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Fresh tables with the committed digits where they agree, and what differs."""
    committed = read_result(ROOT / "results" / "data" / ID)
    demo = list(NAMES)[:2]
    table, spectra, lines = made["table"], made["spectra"], []
    ours = table["checkpoint"].isin(demo)
    fresh, told = reconcile(
        table[ours], committed.tables["table"], TABLE_KEYS, ("value", "null_value", "null_se")
    )
    lines += told
    table = pd.concat([fresh, table[~ours]], ignore_index=True)
    ours = spectra["checkpoint"].isin(demo)
    fresh, told = reconcile(spectra[ours], committed.tables["spectra"], SPECTRA_KEYS, ("sigma",))
    spectra = pd.concat([fresh, spectra[~ours]], ignore_index=True)
    return round_significant(table), round_significant(spectra), lines + told


def draw(
    out_dir: str, checkpoint: str = "", covariance: str = "", gauge: str = "raw", probes: str = ""
) -> Figure:
    """Measure, compare with the committed table, draw and save ``fig1_spectra.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        checkpoint: a further file or folder to draw ('' for none).
        covariance: its input covariances for panel (d) ('' for none).
        gauge: raw or balanced.
        probes: folders that rank-probe wrote, with commas between them, drawn beside.

    Raises:
        UserError: one of them holds no result, or not what its record says.
    """
    import matplotlib.pyplot as plt

    made = measure_all(checkpoint, covariance, probes)
    table, spectra, differences = against_committed(made)
    for line in differences[:10]:
        print(f"DIFFERS from the committed table: {line}")
    if not differences:
        print("the fresh measurement agrees with the committed table (rtol 1e-6)")
    quoted = pd.read_csv(ROOT / "results" / "paper" / "wan_spectrum.csv")
    run = run_record(**made["record"])
    with style():
        plt.rcParams["hatch.linewidth"] = 0.3
        figure, axes = plt.subplots(2, 2, figsize=(3.4, 3.7))
        rows = table[table["gauge"] == gauge]
        curves = spectra[spectra["gauge"] == gauge]
        for number, label in enumerate(dict.fromkeys(rows["checkpoint"])):
            color = f"C{number}"
            mine = curves[curves["checkpoint"] == label]
            _spectra_panel(axes[0, 0], mine, color, _short(str(label)))
            _energy_panel(axes[0, 1], mine, color)
            _rank_panel(axes[1, 0], rows[rows["checkpoint"] == label], color)
        _null_curves(axes[0, 0], axes[0, 1])
        _quoted_marks(axes[0, 1], axes[1, 0], quoted)
        _weighted_panel(axes[1, 1], spectra, table, gauge)
        _finish(axes, gauge)
        stamp(figure, PROVENANCE, run["validity"], run["run_hash"])
        save_figure(figure, Path(out_dir) / ID)
    return figure


def _short(label: str, limit: int = 16) -> str:
    """A name that fits the legend of a narrow panel."""
    name = NAMES.get(label, label)
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _by_layer(curves: pd.DataFrame) -> np.ndarray:
    """Singular values [layers, k] of one checkpoint."""
    wide = curves.pivot_table(index="layer", columns="index", values="sigma")
    return wide.to_numpy()


def _energy(sigma: np.ndarray) -> np.ndarray:
    square = np.cumsum(np.square(sigma), axis=-1)
    return square / square[..., -1:]


def _spectra_panel(axis: Axes, curves: pd.DataFrame, color: str, name: str) -> None:
    sigma = _by_layer(curves)
    sigma = sigma / sigma[:, :1]
    x = np.arange(1, sigma.shape[1] + 1) / sigma.shape[1]
    axis.plot(x, np.median(sigma, axis=0), color=color, label=name)
    axis.fill_between(x, sigma.min(axis=0), sigma.max(axis=0), color=color, alpha=0.2, lw=0)


def _energy_panel(axis: Axes, curves: pd.DataFrame, color: str) -> None:
    energy = _energy(_by_layer(curves))
    x = np.arange(1, energy.shape[1] + 1) / energy.shape[1]
    median = np.median(energy, axis=0)
    axis.plot(x, median, color=color)
    axis.fill_between(x, energy.min(axis=0), energy.max(axis=0), color=color, alpha=0.2, lw=0)
    axis.plot([1 / 8], [np.interp(1 / 8, x, median)], "o", color=color, ms=3, zorder=5)


def _rank_panel(axis: Axes, rows: pd.DataFrame, color: str) -> None:
    ranks = rows[(rows["metric"] == "r_0.99") & (rows["null"] == "gaussian")].sort_values("layer")
    if ranks.empty:  # a probe may have been asked for other metrics
        return
    full = ranks[["m", "n"]].min(axis=1)
    depth = ranks["layer"] / max(int(ranks["layer"].max()), 1)
    axis.plot(depth, ranks["value"] / full, "o-", color=color, ms=1.6, lw=0.7)
    low = (ranks["null_value"] - 2 * ranks["null_se"]) / full
    high = (ranks["null_value"] + 2 * ranks["null_se"]) / full
    axis.fill_between(depth, low, high, color=color, alpha=0.35, lw=0)


def gaussian_curves(m: int, n: int, draws: int = 4, seed: int = 0) -> np.ndarray:
    """Singular values [draws, n] of Gaussian [m, n] matrices, for the bands of (a) and (b)."""
    rng = np.random.default_rng([seed, m, n])
    return np.stack(
        [np.linalg.svd(rng.standard_normal((m, n)), compute_uv=False) for _ in range(draws)]
    )


def _null_curves(spectrum: Axes, energy: Axes) -> None:
    sigma = round_significant(gaussian_curves(768, 384))
    x = np.arange(1, sigma.shape[1] + 1) / sigma.shape[1]
    normal = sigma / sigma[:, :1]
    spectrum.fill_between(
        x, normal.min(axis=0), normal.max(axis=0), color="0.25", lw=0.8, label="Gaussian 2n x n"
    )
    curve = _energy(sigma)
    energy.fill_between(x, curve.min(axis=0), curve.max(axis=0), color="0.25", lw=0.8)


def _quoted_marks(energy: Axes, rank: Axes, quoted: pd.DataFrame) -> None:
    held = quoted.set_index("quantity")
    at = held.loc["energy_at_192"]
    energy.plot([1 / 8], [at["low"]], "x", color="k", ms=4, mew=0.9, zorder=6)
    r = {name: float(held[name]["r_0.99"]) for name in ("low", "high", "of")}
    rank.axhspan(
        r["low"] / r["of"], r["high"] / r["of"], facecolor="none", edgecolor="0.35",
        hatch="//////", lw=0.0, zorder=0,
    )  # fmt: skip


def _weighted_panel(axis: Axes, spectra: pd.DataFrame, table: pd.DataFrame, gauge: str) -> None:
    weighted = f"weighted-{gauge}"
    labels = list(dict.fromkeys(spectra["checkpoint"]))
    named = False
    for number, label in enumerate(labels):
        mine = spectra[spectra["checkpoint"] == label]
        if not (mine["gauge"] == weighted).any():
            continue
        for kind, dash in ((gauge, "-"), (weighted, "--")):
            energy = _energy(_by_layer(mine[mine["gauge"] == kind]))
            x = np.arange(1, energy.shape[1] + 1) / energy.shape[1]
            name = "W" if kind == gauge else "W on its inputs"
            axis.plot(
                x, np.median(energy, axis=0), dash, color=f"C{number}", label="_" if named else name
            )
            axis.fill_between(
                x, energy.min(axis=0), energy.max(axis=0), color=f"C{number}", alpha=0.2, lw=0
            )
        null = table[
            (table["checkpoint"] == label)
            & (table["gauge"] == weighted)
            & (table["metric"] == "energy_at_n/8")
        ]
        axis.plot(
            [1 / 8],
            [null["null_value"].median()],
            "D",
            color="0.25",
            ms=3,
            label="_" if named else "Gaussian W, same inputs",
        )
        named = True


def _finish(axes: Any, gauge: str) -> None:
    for axis in (axes[0, 1], axes[1, 1]):
        axis.axvline(1 / 8, color="0.7", lw=0.5, ls=":", zorder=0)
        axis.set(xlabel="k / n", ylabel="energy E(k)", xlim=(0, 1), ylim=(0, 1.02))
    axes[0, 0].set(xlabel="i / n", ylabel=r"$\sigma_i / \sigma_1$", yscale="log", xlim=(0, 1))
    axes[0, 0].set_ylim(1e-3, 1.2)
    axes[0, 0].legend(loc="lower left", handlelength=1.2, borderaxespad=0.1)
    axes[1, 0].set(xlabel="depth", ylabel="$r_{.99}$ / n", ylim=(0.3, 1.0))
    axes[1, 1].legend(
        loc="lower right", handlelength=1.4, borderaxespad=0.0, fontsize=5, handletextpad=0.4
    )
    for axis in (axes[0, 0], axes[1, 1]):
        axis.get_legend().set_in_layout(False)
    titles = (
        (f"(a) [K; V], {gauge} gauge", "(b) dots: E(n/8); x: Wan, quoted"),
        ("(c) bands: Gaussian; hatch: Wan, quoted", "(d) with real inputs"),
    )
    for line, names in zip(axes, titles, strict=True):
        for axis, name in zip(line, names, strict=True):
            axis.set_title(name, fontsize=5.5)
