"""Table 2: VBench scores of long videos, and how much of the ranking rests on one dimension.

The paper's Overall is the plain mean of six dimensions. Beside it stand the rank that each model
has by it, and by the mean of the five that are left when a dimension is left out. Measured rows are
those of long videos; where one has VBench's full protocol and the length of the paper's, its rank
is the one it would have among the paper's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import vbench_rows
from mla_study.evaluation.vbench.dimensions import OVERALL_6
from mla_study.evaluation.vbench.scores import overall_6
from mla_study.study.plots import PAGE_WIDTH, style
from mla_study.study.runs import round_significant
from mla_study.study.tables import Column, rules_between, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table2_long_horizon"
TITLE = "VBench scores of long videos, and the rank of each model without one dimension"
PROVENANCE = ("paper-quoted", "measured")
DATA = ("results/paper/table2_long_horizon.csv",)
ROOT = Path(__file__).resolve().parents[1]
MODEL = "VideoMLA"
SHORT = {
    "aesthetic_quality": "aes-\nthetic",
    "background_consistency": "back-\nground",
    "dynamic_degree": "dyn.\ndegree",
    "imaging_quality": "imag-\ning",
    "motion_smoothness": "motion",
    "subject_consistency": "sub-\nject",
}
LEFT_OUT = {
    "aesthetic_quality": "aes.",
    "background_consistency": "back.",
    "dynamic_degree": "dyn.",
    "imaging_quality": "imag.",
    "motion_smoothness": "mot.",
    "subject_consistency": "subj.",
}
SCORES, OVERALL, RANKS = "score", "Overall", "rank by the mean of all, and without ..."
RANK = {"": "rank", **{name: f"rank_without_{name}" for name in OVERALL_6}}
"""Dimension left out ('': none) -> column of the rank."""
NEAR = 0.1
"""A length within this share of the paper's counts as the same."""
_DIGITS = 9  # of a mean of values of three digits: equal ones must tie
COLUMNS = (
    Column("model", "Model"),
    Column("horizon_s", "s", ".3g"),
    *(Column(name, SHORT[name], ".3f", under=SCORES) for name in OVERALL_6),
    Column("overall", "as\nprinted", ".3f", under=OVERALL),
    Column("mean", "mean\nof six", ".4f", under=OVERALL, own=True),
    Column("rank", "all", under=RANKS, own=True, best="min", align="right"),
    *(
        Column(RANK[name], LEFT_OUT[name], under=RANKS, own=True, best="min", align="right")
        for name in OVERALL_6
    ),
)
MEASURED = (
    Column("low", "low", ".3f", under="95 %", own=True),
    Column("high", "high", ".3f", under="95 %", own=True),
    Column("videos", "videos", ".0f"),
)


def INPUTS(runs: str = "") -> dict[str, Path]:
    """Results of ours."""
    return vbench_rows.inputs(runs, ROOT)


def means(frame: pd.DataFrame, without: str = "") -> pd.Series[float]:
    """Plain mean of the six dimensions, or of the five without one."""
    held = [name for name in OVERALL_6 if name != without]
    return frame[held].astype(float).mean(axis=1, skipna=False).round(_DIGITS)


def quoted(paper: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows with ``mean`` and the ranks of :data:`RANK` among those of one length."""
    rows = [{name: float(row[name]) for name in OVERALL_6} for row in paper.to_dict("records")]
    frame = paper.assign(mean=np.array([overall_6(row) for row in rows], dtype=float))
    for name, column in RANK.items():
        scores = means(paper, name)
        ranks = scores.groupby(paper["horizon_s"]).rank(ascending=False, method="min")
        frame[column] = ranks.astype("Int64")
    return frame


def measured(table: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Rows of long videos that have any of the six dimensions, with the ranks that they may have.

    Stand-ins have no place here.
    """
    rows = vbench_rows.wide(
        table[table["horizon_s"] >= vbench_rows.LONG], [*OVERALL_6, "overall_6"]
    )
    rows = rows[rows[list(OVERALL_6)].notna().any(axis=1)].sort_values("horizon_s")
    frame = rows.assign(model=vbench_rows.titled(rows, "long")).rename(
        columns={"overall_6": "mean", "overall_6_low": "low", "overall_6_high": "high"}
    )
    for name, column in RANK.items():
        frame[column] = pd.array(_ranks(frame, paper, name), dtype="Int64")
    return frame


def _ranks(rows: pd.DataFrame, paper: pd.DataFrame, without: str) -> list[int | None]:
    ranks: list[int | None] = []
    for mine, mean in zip(rows.to_dict("records"), means(rows, without), strict=True):
        near = (paper["horizon_s"] / float(mine["horizon_s"]) - 1).abs() <= NEAR
        whole = mine["mode"] == "long" and mine["validity"] == "full" and pd.notna(mean)
        may = whole and near.any()
        ranks.append(1 + int((means(paper[near], without) > mean).sum()) if may else None)
    return ranks


def sentences(frame: pd.DataFrame) -> list[str]:
    """What the paper's rows say.

    Args:
        frame: of :func:`quoted`.
    """
    off = vbench_rows.within(frame["mean"] - frame["overall"])
    mine = {row["horizon_s"]: row for row in frame[frame["model"] == MODEL].to_dict("records")}
    said: list[str] = []
    for seconds, row in mine.items():
        ranks: dict[str, Any] = {name: int(row[column]) for name, column in RANK.items()}
        rest = [rank for name, rank in ranks.items() if name not in ("", "dynamic_degree")]
        others = " or ".join(vbench_rows.ordinal(rank) for rank in sorted(set(rest)))
        said.append(
            f"{vbench_rows.ordinal(ranks[''])} at {seconds:g} s, "
            f"{vbench_rows.ordinal(ranks['dynamic_degree'])} without dynamic degree and {others} "
            "without any other dimension"
        )
    return [
        f"The paper's Overall is the plain mean of the six, within {off} in all "
        f"{len(frame)} rows, which is their rounding.",
        f"{MODEL} is {'; '.join(said)}. Dynamic degree is a yes or no a video, by a threshold of "
        "optical flow.",
    ]


def draw(out_dir: str, runs: str = "") -> Figure:
    """Draw and save ``table2_long_horizon.{pdf,png,svg,csv,md}``.

    Where there are measured rows of long videos, all of their scores stand in a second table,
    ``table2_long_horizon_measured``.

    Args:
        out_dir: where the files go.
        runs: see :func:`analysis.vbench_rows.folders`.

    Raises:
        UserError: a folder that holds no result.
    """
    paper = pd.read_csv(ROOT / DATA[0])
    ours = vbench_rows.read(runs, ROOT)
    long = ours.table[ours.table["horizon_s"] >= vbench_rows.LONG]
    theirs, mine = quoted(paper), measured(ours.table, paper)
    table = pd.concat([theirs, mine], ignore_index=True) if len(mine) else theirs
    kinds, validity, run_hash = vbench_rows.identity(ID, ours, mine, [ROOT / DATA[0]])
    groups = table.assign(group=["ours" if i >= len(theirs) else f"{s}" for i, s in
                                 enumerate(table["horizon_s"])])  # fmt: skip
    notes = ["Grey italics: paper-quoted.", *sentences(theirs)]
    if len(mine):
        notes.append(
            "Below: measured; intervals by resampling prompts, a rank among the paper's only of "
            "full results of the same length."
        )
    elif long.empty:
        notes.append(f"No long video of ours is scored. {vbench_rows.HOW}")
    if long["scorer"].map(vbench_rows.is_stand_in).any():
        notes.append(f"Stand-ins for dimensions are in {ID}_measured alone.")
    with style():
        figure = save_table(
            round_significant(table), Path(out_dir) / ID, COLUMNS + (MEASURED if len(mine) else ()),
            provenance=kinds, validity=validity, run_hash=run_hash, title=TITLE,
            notes=[" ".join(notes[:2]), *notes[2:]], rule_before=rules_between(groups, "group"),
            width=PAGE_WIDTH, quoted_rows=range(len(theirs)),
        )  # fmt: skip
        vbench_rows.save_measured(ID, out_dir, ours, long, "Measured scores of long videos")
    return figure
