"""Fig. 8: rank of the composed operator along training, by init, beside what chance would give.

(a) r_.99 of [W_K_up; W_V_up] diag(g) W_kv_down, interpolated (the integer faint), (b) the same over
d_c, (c) sigma_dc / sigma_1; medians over layers, bands over seeds, stages marked. The nulls are
an untrained model, a Gaussian product of the same shapes and the spectrum of the dense source
cut at d_c; the paper's values for Wan at d_c = 192 stand as quoted lines. Drawn from the study's
rank table, or from the folders of checkpoints that the parameter ``series`` names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from analysis.miniature import usual
from mla_study.errors import UserError
from mla_study.probes.rank_probe import Options
from mla_study.probes.series import named_series, parse_series, probe_series
from mla_study.probes.table import EDGE
from mla_study.probes.work import Store
from mla_study.study.plots import COLOURS, NULL_COLOUR, PAGE_WIDTH, save_figure, stamp, style
from mla_study.study.runs import Validity, read_result, round_significant, run_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig8_rank_saturation"
TITLE = "Rank of the composed operator along training, by init, beside its nulls"
PROVENANCE = ("measured", "null-model", "paper-quoted")
DATA = ("results/data/study_ranks", "results/paper/fig8_rank_saturation.csv")
ROOT = Path(__file__).resolve().parents[1]
RANK, INTEGER = "r_0.99_interp", "r_0.99"
GAUGES = {"raw": "the weights", "weighted-raw": "outputs on real inputs"}
_COLOURS = {
    "spectral": COLOURS["blue"],
    "svd": COLOURS["blue"],
    "random": COLOURS["vermillion"],
    "activation": COLOURS["green"],
    "spectral-raw": COLOURS["purple"],
}
_NULLS = {
    "gaussian_product": ("-", "Gaussian product ± 2 s.d."),
    "truncated_source": ("-.", "dense source, cut at $d_c$"),
    "untrained": (":", "untrained (colour of its init)"),
}
_RUN = ["init", "seed", "d_c"]
_POINT = ["init", "d_c", "stage", "step"]


def probe_runs(series: str, source: str = "") -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rank table of anyone's runs, and its run record.

    Args:
        series: ``NAME:FOLDER,NAME:FOLDER``, the checkpoints' names saying their steps.
        source: the dense checkpoint that they were made of, or ''.

    Raises:
        UserError: as :func:`~mla_study.probes.series.probe_series`, or no latent attention.
    """
    sources = parse_series([f"{name}={place}" for name, place in named_series(series).items()])
    metrics = (RANK, INTEGER, EDGE)
    options = Options(
        operators=("composed",), gauges=("raw",), metrics=metrics, source=source or None
    )
    with tempfile.TemporaryDirectory() as folder:
        probed = probe_series(sources, options, Store(Path(folder)))
    mine = probed.table[probed.table["attention"] == "self"]
    held = probed.spectra[probed.spectra["attention"] == "self"]
    d_c = held.groupby("series")["index"].max()
    table = mine.assign(
        run=mine["series"], variant="latent", init=mine["series"], seed=0, stage="",
        step=mine["step"].astype("int64"), d_c=mine["series"].map(d_c),
    )  # fmt: skip
    run = run_record(
        config={"figure": ID, "series": sorted({s.series for s in sources})},
        inputs=probed.inputs,
        seed=0,
        modules=(f"analysis.{ID}",),
        provenance="measured",
        validity=cast(Validity, probed.validity),
    )
    return table, run


def chosen(table: pd.DataFrame, d_c: int, variant: str, gauge: str, several: bool) -> pd.DataFrame:
    """Composed operators of one gauge, variant and d_c.

    Args:
        table: rows of :class:`~mla_study.probes.tracker.Tracker` with the columns ``run``,
            ``variant``, ``init``, ``d_c``, ``seed`` and ``stage``.
        d_c: 0 takes the one that the most runs have.
        variant: '' takes all.
        several: whether runs of different d_c may stand side by side, where d_c is 0.

    Raises:
        UserError: nothing is left, or an init has several runs of one seed.
    """
    rows = table[(table["operator"] == "composed") & (table["gauge"] == gauge)]
    if variant:
        rows = rows[rows["variant"] == variant]
    if d_c:
        rows = rows[rows["d_c"] == d_c]
    if rows.empty:
        told = {name: sorted(set(table[name])) for name in ("gauge", "variant", "d_c")}
        raise UserError(
            f"no composed operator has gauge={gauge} variant={variant or 'any'} "
            f"d_c={d_c or 'any'}: the table has {told}"
        )
    if not d_c and not several:
        runs = rows.groupby("d_c")["run"].nunique()
        rows = rows[rows["d_c"] == runs.idxmax()]
    runs = rows.groupby(_RUN)["run"].unique()
    for key, names in runs.items():
        if len(names) > 1:
            raise UserError(
                f"init, seed, d_c = {key} has {len(names)} runs ({', '.join(map(str, names))}): "
                f"choose with variant={' or '.join(sorted(set(rows['variant'])))}"
            )
    return rows


def curve(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over seeds of the median over layers, with its range: ``value``, ``low``, ``high``.

    Columns beside: ``init``, ``d_c``, ``stage``, ``step``; in the order of steps and stages.
    """
    mine = rows[rows["metric"] == metric].drop_duplicates([*_RUN, "stage", "step", "layer"])
    medians = mine.groupby([*_RUN, "stage", "step"], sort=False)["value"].median().reset_index()
    by_point = medians.groupby(_POINT, sort=False)["value"]
    found = by_point.agg(value="mean", low="min", high="max").reset_index()
    return found.sort_values("step", kind="stable")


def null_curve(rows: pd.DataFrame, metric: str, null: str) -> pd.DataFrame:
    """Median over layers and seeds of a null: ``null_value``, ``null_se`` by init and step."""
    mine = rows[(rows["metric"] == metric) & (rows["null"] == null)]
    found = mine.groupby(["init", "d_c", "step"])[["null_value", "null_se"]].median()
    return found.reset_index()


def stages(rows: pd.DataFrame) -> dict[str, int]:
    """The first step of each stage, in order; empty where stages have no names."""
    named = rows[rows["stage"] != ""]
    return {str(k): int(v) for k, v in named.groupby("stage")["step"].min().sort_values().items()}


def draw(
    out_dir: str,
    series: str = "",
    source: str = "",
    d_c: int = 0,
    variant: str = "",
    gauge: str = "raw",
) -> Figure:
    """Draw and save ``fig8_rank_saturation.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        series: ``NAME:FOLDER,NAME:FOLDER`` probes these checkpoints in place of the study's table.
        source: of a series: the dense checkpoint that it was made of, for the cut spectrum.
        d_c: latent rank to draw; 0 takes the one with the most runs, of a series each its own.
        variant: of the study; '' takes all.
        gauge: raw, or weighted-raw for the outputs on real inputs (the study's table only).

    Raises:
        UserError: the table is not there, or holds no such rows; a series that cannot be probed.
    """
    if series:
        table, run = probe_runs(series, source)
        validity, run_hash = run["validity"], run["run_hash"]
    else:
        found = read_result(ROOT / DATA[0])
        table, validity, run_hash = found.table, found.validity, found.run_hash
        if "d_rope" in table:  # other splits and lengths are runs of the same init, seed and d_c
            table = usual(table, None)
    rows = round_significant(chosen(table, d_c, variant, gauge, bool(series)))
    quoted = pd.read_csv(ROOT / DATA[1])
    what = ", ".join(dict.fromkeys(rows["init"])) if series else "the miniature"
    return draw_table(rows, quoted, Path(out_dir), what, gauge, validity, run_hash)


def draw_table(
    rows: pd.DataFrame,
    quoted: pd.DataFrame,
    out_dir: Path,
    what: str,
    gauge: str,
    validity: Validity,
    run_hash: str,
) -> Figure:
    """The figure of rows that :func:`chosen` gave; ``what`` was trained, in words."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    inits = list(dict.fromkeys(rows["init"]))
    spare = cycle(c for c in COLOURS.values() if c not in _COLOURS.values())
    colours = {init: _COLOURS.get(init) or next(spare) for init in inits}
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(PAGE_WIDTH, 2.75))
        for axis, metric, share in zip(axes, (RANK, RANK, EDGE), (0, 1, 0), strict=True):
            _nulls(axis, rows, metric, bool(share), colours)
            for init, colour in colours.items():
                if axis is axes[0]:
                    _line(axis, curve(rows[rows["init"] == init], INTEGER), colour, faint=True)
                _line(axis, curve(rows[rows["init"] == init], metric), colour, bool(share))
            _stage_marks(axis, stages(rows))
            axis.set_xlabel("training step")
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        _quoted_lines(axes[1:], quoted, colours)
        sizes = "/".join(map(str, sorted(set(rows["d_c"]))))
        axes[0].set_ylabel("$r_{.99}$ (singular values)")
        axes[1].set_ylabel("$r_{.99}$ / $d_c$")
        axes[2].set_ylabel(r"$\sigma_{d_c}$ / $\sigma_1$")
        axes[0].set_title("(a) interpolated; faint: integer", pad=10)
        axes[1].set_title("(b) share of the latent rank", pad=10)
        axes[2].set_title("(c) smallest over largest", pad=10)
        width, layers = int(rows["n"].iloc[0]), rows["layer"].nunique()
        seeds = rows["seed"].nunique()
        over = f"; bands: range of {seeds} seeds" if seeds > 1 else ""
        figure.suptitle(
            f"Composed operator of {_short(what)}, {GAUGES[gauge]}: width {width}, "
            f"$d_c$ = {sizes}, median of {layers} layers{over}",
            fontsize=7,
        )
        _legend(figure, colours, set(rows["null"]))
        stamp(figure, PROVENANCE, validity, run_hash)
        save_figure(figure, out_dir / ID)
    return figure


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _line(
    axis: Axes, points: pd.DataFrame, colour: str, share: bool = False, faint: bool = False
) -> None:
    over = points["d_c"] if share else 1
    low, value, high = (points[name] / over for name in ("low", "value", "high"))
    if faint:
        axis.plot(points["step"], value, color=colour, lw=0.7, alpha=0.3)
        return
    axis.plot(points["step"], value, "o-", color=colour, ms=1.8, zorder=3)
    axis.fill_between(points["step"], low, high, color=colour, alpha=0.2, lw=0)


def _nulls(
    axis: Axes, rows: pd.DataFrame, metric: str, share: bool, colours: Mapping[str, str]
) -> None:
    for null, (dash, _) in _NULLS.items():
        for number, (init, mine) in enumerate(null_curve(rows, metric, null).groupby("init")):
            over = mine["d_c"] if share else 1
            value, se = mine["null_value"] / over, mine["null_se"] / over
            own = null == "untrained"
            if number and not own and rows["d_c"].nunique() == 1:
                continue  # of shapes, or of the source alone: one for all inits
            colour = colours[str(init)] if own else NULL_COLOUR
            axis.plot(mine["step"], value, dash, color=colour, lw=0.9, zorder=2)
            if null == "gaussian_product":
                axis.fill_between(
                    mine["step"], value - 2 * se, value + 2 * se, color=colour, alpha=0.2, lw=0
                )


def _stage_marks(axis: Axes, first: Mapping[str, int]) -> None:
    for number, (stage, step) in enumerate(first.items()):
        if number:
            axis.axvline(step, color="0.75", lw=0.6, zorder=0)
        axis.text(
            step, 1.0, f" {stage}", transform=axis.get_xaxis_transform(), fontsize=5,
            color="0.4", va="bottom",
        )  # fmt: skip


def _quoted_lines(axes: Any, quoted: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """The paper's values: the same at its first and last step, so lines across."""
    for init, mine in quoted.groupby("init"):
        known = [name for name in (str(init), "spectral") if name in colours]
        shown = "random" if init == "random" else (known or ["svd"])[0]
        colour = colours.get(shown, _COLOURS[shown])
        axes[0].axhline(
            mine["r_0.99_over_d_c_percent"].iloc[0] / 100, color=colour, ls="--", lw=0.7
        )
        axes[1].axhline(mine["sigma_dc_over_sigma_1"].iloc[0], color=colour, ls="--", lw=0.7)


def _legend(figure: Figure, colours: Mapping[str, str], nulls: set[str]) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=c, marker="o", ms=2, label=i) for i, c in colours.items()]
    for null, (dash, label) in _NULLS.items():
        if null in nulls:
            colour = "0.2" if null == "untrained" else NULL_COLOUR
            marks.append(Line2D([], [], color=colour, ls=dash, lw=0.9, label=label))
    quote = "paper, Wan 1.3B, $d_c$ = 192 (quoted)"
    marks.append(Line2D([], [], color="0.2", ls="--", lw=0.7, label=quote))
    figure.legend(handles=marks, loc="outside lower left", ncols=4, fontsize=5.5)
