"""What a conversion measured, as text, as a result folder, and as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mla_study.model.conversion_report import DECISIONS
from mla_study.study.plots import COLOURS, PAGE_WIDTH, save_figure, stamp, style
from mla_study.study.runs import round_significant, write_result

UNITS = {
    "logit_error": "|difference| / |dense|, logits up to a constant a query",
    "output_error": "|difference| / |dense|, attention output without constant bias",
    "r_0.99_before": "rank of [W_K; W_V], raw gauge",
    "r_0.99_after": "rank of the composed operator",
}
_COLOURS = {
    "activation": "blue",
    "spectral": "green",
    "spectral-raw": "orange",
    "random": "vermillion",
}
_MARKERS = {"activation": "o", "spectral": "s", "spectral-raw": "^", "random": "v"}


def write_report(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    ranks: Sequence[Mapping[str, Any]],
    *,
    config: object,
    inputs: Mapping[str, str],
    seed: int,
    modules: Iterable[str],
    real: bool,
    notes: Iterable[str],
) -> dict[str, Any]:
    """Write ``table.parquet`` (and ``ranks.parquet``) with ``run.json``; returns the run record.

    Measured on noise in place of ``real`` inputs the result counts as a substitute.
    """
    from mla_study.study.observe import peak_memory

    tables = {"table": round_significant(pd.DataFrame(rows))}
    if ranks:
        tables["ranks"] = round_significant(pd.DataFrame(ranks))
    return write_result(
        folder,
        tables,
        config=config,
        inputs=inputs,
        seed=seed,
        modules=modules,
        provenance="measured",
        validity="full" if real else "substitute",
        units=UNITS,
        notes=notes,
        observed={"peak_memory": peak_memory()},
    )


def conversion_text(rows: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[str, Any]]) -> str:
    """A line a layer: errors of logits / output after each decision, ranks before and after."""
    table = pd.DataFrame(rows)
    by_rank = {entry["layer"]: entry for entry in ranks}
    head = ["layer", *DECISIONS, "r_.99 [K;V]", "composed"]
    lines = [head]
    for layer, mine in table.groupby("layer"):
        pairs = mine.set_index("decision")
        cells = [
            f"{pairs.loc[name, 'logit_error']:.3f}/{pairs.loc[name, 'output_error']:.3f}"
            for name in DECISIONS
        ]
        found = by_rank[layer]
        lines.append(
            [str(layer), *cells, f"{found['r_0.99_before']:.0f}", f"{found['r_0.99_after']:.0f}"]
        )
    note = (
        "relative error of q.k logits / attention output, each decision on top of those before it;"
        " latent_norm is the converted layer"
    )
    return "\n".join([*_aligned(lines), note])


def sweep_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a d_c, a column an init: median over layers of logit / output error, and the floor."""
    table = pd.DataFrame(rows)
    inits = list(dict.fromkeys(table["init"]))

    def cell(decision: str, init: str, d_c: int) -> str:
        mine = table[table["decision"].eq(decision) & table["init"].eq(init) & table["d_c"].eq(d_c)]
        return f"{mine['logit_error'].median():.3f}/{mine['output_error'].median():.3f}"

    sizes = sorted(set(table["d_c"]))
    lines = [["d_c", *inits]]
    lines += [[str(d_c), *(cell("latent_norm", init, d_c) for init in inits)] for d_c in sizes]
    lines.append(["no cut", *(cell("shared_key", init, sizes[-1]) for init in inits)])
    note = (
        "relative error of q.k logits / attention output, median over layers; 'no cut': what "
        "qk_norm, band and shared_key alone leave"
    )
    return "\n".join([*_aligned(lines), note])


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]


def plot_sweep(
    rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any], stem: Path
) -> dict[str, Path]:
    """Errors against d_c, a curve an init: median over layers; bands: quartiles.

    The dashed line is what all decisions but the rank cuts and the latents' norm leave.
    """
    table = pd.DataFrame(rows)
    final = table[table["decision"] == "latent_norm"]
    floor = table[table["decision"] == "shared_key"]
    sizes = sorted(set(final["d_c"]))
    with style():
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(PAGE_WIDTH * 0.85, 2.4))
        for axis, (column, title) in zip(
            axes, (("logit_error", "q·k logits"), ("output_error", "attention output")), strict=True
        ):
            for init, mine in final.groupby("init", sort=False):
                name = str(init)
                colour = COLOURS[_COLOURS[name]]
                low, mid, high = (
                    mine.groupby("d_c")[column].quantile(q) for q in (0.25, 0.5, 0.75)
                )
                axis.plot(mid.index, mid, marker=_MARKERS[name], color=colour, label=name)
                axis.fill_between(mid.index, low, high, color=colour, alpha=0.15, lw=0)
            left = floor[floor["init"] != "random"][column].median()
            axis.axhline(left, color="0.4", lw=0.8, ls="--", label="no cut", clip_on=False)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.set(xlabel="latent size $d_c$ (channels)", ylim=(0, None))
            axis.set_title(title)
        axes[0].set_ylabel("|difference| / |dense|")
        layers = final["layer"].nunique()
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside right upper",
            title=f"median of {layers} layers,\nbands: quartiles" if layers > 1 else "one layer",
        )
        stamp(figure, run["provenance"], run["validity"], run["run_hash"])
        paths = save_figure(figure, stem, ("png", "pdf"))
        plt.close(figure)
    return paths
