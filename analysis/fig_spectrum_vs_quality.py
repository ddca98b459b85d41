"""What spectra predict before training against what students reach: over sizes, splits and inits.

Columns are predicted losses: the share of d beyond d_c, which knows no spectrum and is the null,
the share of d that r_.99 of the student's composed weights leaves out, the energy of the teacher's
[W_K; W_V] beyond d_c, of the weights and of their outputs on real inputs (both follow from d_c, and
order students as it does), and the attention's error after conversion. Rows are what came out:
held-out loss after teacher forcing, videos all correct after DMD. A point a configuration, bars the
standard error of seeds and videos; rank correlations over runs with 95 % bootstrap intervals over
configurations.
Written beside it: ``fig_spectrum_vs_quality_correlations``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis import miniature
from mla_study.errors import UserError
from mla_study.miniature import prediction
from mla_study.study.plots import COLOURS, PAGE_WIDTH, save_figure, stamp, style
from mla_study.study.tables import Column, save_table, spell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig_spectrum_vs_quality"
TITLE = "Loss that the spectrum predicts against quality that the miniature's students reach"
PROVENANCE = ("measured",)
DATA = (
    "results/data/study_ranks",
    "results/data/study_spectra",
    "results/data/study_conversion",
    "results/data/study_curves",
    "results/data/study_scores",
)
ROOT = Path(__file__).resolve().parents[1]
QUALITIES = {
    "held_out": "held-out loss after TF",
    "all_correct": "all correct after DMD (share)",
}
COLUMNS = (
    Column("what", "predicted loss"),
    Column("reached", "quality reached"),
    Column("over", "over"),
    Column("configs", "config-\nurations"),
    Column("rho", "Spearman's\nρ", "+.2f"),
    Column("low", "from", "+.2f", under="95 % bootstrap"),
    Column("high", "to", "+.2f", under="95 % bootstrap"),
    Column("gain", "gain over\n$d_c$ itself", "+.2f", least=1e-6),
    Column("gain_low", "from", "+.2f", under="95 % of the gain", least=1e-6),
    Column("gain_high", "to", "+.2f", under="95 % of the gain", least=1e-6),
)


def points(runs: pd.DataFrame, scores: pd.DataFrame, quality: str) -> pd.DataFrame:
    """Means over seeds of a quality by configuration, with the predictors' means beside."""
    rows = runs.rename(columns={quality: "value"}).dropna(subset=["value"])
    if quality == "all_correct":
        errors = miniature.score_rows(scores, quality).set_index("run")["se"]
        rows = rows.assign(se=rows["run"].map(errors))
    keys = ["config", "init", "d_c", "d_rope"]
    found = miniature.over_seeds(rows, keys)
    means = rows.groupby("config")[list(prediction.PREDICTORS)].mean()
    return found.join(means, on="config")


def draw(out_dir: str) -> Figure:
    """Draw and save ``fig_spectrum_vs_quality.*`` and ``fig_spectrum_vs_quality_correlations.*``.

    Args:
        out_dir: where the files go.

    Raises:
        UserError: the study has fewer than three configurations.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    results = [miniature.read(Path(name).name.removeprefix("study_"), ROOT) for name in DATA]
    scores = results[-1].table
    runs = prediction.predicted(*(result.table for result in results))
    found = prediction.correlations(runs)
    if found.empty:
        raise UserError("rank correlations need three configurations: `make study-full` has them")
    validity, run_hash = miniature.drawn_from(ID, results)
    with style():
        figure, axes = plt.subplots(
            2, len(prediction.PREDICTORS), figsize=(PAGE_WIDTH, 4.3), sharey="row"
        )
        for line, (quality, reached) in zip(axes, QUALITIES.items(), strict=True):
            here = points(runs, scores, quality)
            for axis, (predictor, told) in zip(line, prediction.PREDICTORS.items(), strict=True):
                _points(axis, here, predictor)
                mine = found[(found["predictor"] == predictor) & (found["quality"] == quality)]
                lines = [
                    f"{row['scope'].replace('d_c', 'size'):5} {_told(row)}"
                    for _, row in mine.iterrows()
                ]
                axis.set_title(
                    "\n".join(lines), fontsize=4.6, family="monospace", loc="left", pad=2
                )
                axis.set_xlabel(told, fontsize=6)
                if predictor == "output_loss":
                    axis.set_xscale("log")
                if quality == "held_out":
                    axis.set_yscale("log")
                    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                    axis.yaxis.set_major_formatter("{x:g}")
                    axis.yaxis.set_minor_formatter("")
            line[0].set_ylabel(reached)
        figure.suptitle(
            f"Miniature, d = {miniature.WIDTH}: means of {runs['seed'].nunique()} seeds ± s.e.; "
            "above: Spearman's ρ [95 % bootstrap over configurations]",
            fontsize=7,
        )
        _legend(figure, set(runs["init"]))
        stamp(figure, PROVENANCE, validity, run_hash)
        save_figure(figure, Path(out_dir) / ID)
        table = found.assign(
            what=found["predictor"].map(prediction.PREDICTORS),
            reached=found["quality"].map(QUALITIES),
            over=found["scope"].map(prediction.SCOPES),
        )
        save_table(
            table, Path(out_dir) / f"{ID}_correlations", COLUMNS, provenance=PROVENANCE,
            validity=validity, run_hash=run_hash,
            title="Rank correlation of predicted loss and quality, miniature",
            notes=[
                "Gain: ρ less that of 1 − $d_c$ / d over the same runs, in the direction in which "
                "a predicted loss should point. A dash: what is compared is the same for all of "
                "them."
            ],
        )  # fmt: skip
    return figure


def _told(row: pd.Series) -> str:
    if pd.isna(row["rho"]):
        return "the same for all"
    rho, low, high = (spell(row[name], "+.2f") for name in ("rho", "low", "high"))
    return f"ρ {rho} [{low}, {high}]"


def _points(axis: Axes, here: pd.DataFrame, predictor: str) -> None:
    for row in here.to_dict("records"):
        colour, marker = miniature.LOOKS[row["init"]]
        if row["d_rope"] != miniature.D_ROPE:
            colour, marker = COLOURS["sky"], "D"
        axis.errorbar(
            row[predictor], row["value"], row["se"], color=colour, marker=marker, ms=3,
            elinewidth=0.7, ls="",
        )  # fmt: skip
        # splits and inits crowd around the default size; their colour and marker tell them
        if row["d_rope"] == miniature.D_ROPE and row["init"] == "activation":
            place = (0, -7) if row["d_c"] == miniature.D_C else (2, 2)
            axis.annotate(
                str(row["d_c"]), (row[predictor], row["value"]), place,
                textcoords="offset points", fontsize=4.5, color=colour,
            )  # fmt: skip
    axis.margins(x=0.15, y=0.12)


def _legend(figure: Figure, inits: set[str]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], ls="", color=colour, marker=marker, ms=3,
               label=f"{name} (number: $d_c$)" if name == "activation" else name)
        for name, (colour, marker) in miniature.LOOKS.items()
        if name in inits
    ]  # fmt: skip
    split = Line2D([], [], ls="", color=COLOURS["sky"], marker="D", ms=3, label="activation, split")
    figure.legend(handles=[*marks, split], loc="outside lower left", ncols=6, fontsize=5.5)
