"""Table 5b: quality against the nope/rope split, the miniature's beside the paper's quoted.

Rows are set by the rotary share of a head's channels; columns as in Table 5a, of which no two of
miniature and paper are on one scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis import miniature
from analysis.table5a_latent_dim import QUOTED, SHOWN, UNDER, measured
from mla_study.study.plots import style
from mla_study.study.runs import round_significant
from mla_study.study.tables import Column, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table5b_split"
TITLE = "Quality against the split of a head: the miniature, and Wan 1.3B as the paper has it"
PROVENANCE = ("measured", "paper-quoted")
DATA = (
    "results/data/study_scores",
    "results/data/study_curves",
    "results/paper/table5b_nope_rope_split.csv",
)
ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    Column("share", "rotary\nshare", align="right"),
    Column("split", "nope/\nrope", under=UNDER, align="right"),
    *SHOWN,
    Column("paper_split", "nope/\nrope", under=QUOTED, quoted=True, align="right"),
    Column("semantic", "semantic", ".2f", under=QUOTED, quoted=True),
    Column("quality", "quality", ".2f", under=QUOTED, quoted=True),
    Column("total", "total", ".2f", under=QUOTED, quoted=True),
)


def rows(scores: pd.DataFrame, curves: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """The table: splits in order of their rotary share, then the dense student."""
    found = measured(scores, curves)
    mine = found[(found["student"] == "activation") & (found["d_c"] == miniature.D_C)]
    mine = mine.assign(
        number=mine["d_rope"] / miniature.HEAD,
        split=[f"{miniature.HEAD - rope}/{rope}" for rope in mine["d_rope"]],
    )
    theirs = paper.assign(
        number=paper["d_rope"] / (paper["d_rope"] + paper["d_nope"]),
        paper_split=[f"{n}/{r}" for n, r in zip(paper["d_nope"], paper["d_rope"], strict=True)],
    )[["number", "paper_split", "semantic", "quality", "total"]]
    splits = mine.merge(theirs, how="outer", on="number").sort_values("number")
    splits["share"] = splits.pop("number").map("{:.4g}".format)
    dense = found[found["student"] == "dense"].assign(share="dense")
    table = pd.concat([splits, dense], ignore_index=True)
    return round_significant(table.astype({"seeds": "Int64"}))


def draw(out_dir: str) -> Figure:
    """Draw and save ``table5b_split.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
    """
    scores, curves = miniature.read("scores", ROOT), miniature.read("curves", ROOT)
    paper = ROOT / DATA[2]
    table = rows(scores.table, curves.table, pd.read_csv(paper))
    validity, run_hash = miniature.drawn_from(ID, [scores, curves], [paper])
    count = int(miniature.score_rows(scores.table, "all_correct")["n"].median())
    notes = [
        f"Miniature: init activation, $d_c$ = {miniature.D_C}, heads of {miniature.HEAD} channels, "
        f"after all stages, {count} videos of the training length a seed; IoU of the sprite, "
        "velocity error in pixels a frame; ± the larger of the standard errors over seeds and over "
        "videos. The paper's are VBench scores in percent, heads of 128.",
    ]
    with style():
        return save_table(
            table, Path(out_dir) / ID, COLUMNS, provenance=PROVENANCE, validity=validity,
            run_hash=run_hash, title=TITLE, notes=notes, rule_before=(len(table) - 1,),
        )  # fmt: skip
