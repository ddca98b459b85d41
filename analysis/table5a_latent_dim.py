"""Table 5a: quality against the latent size, the miniature's measured beside the paper's quoted.

Rows are set by d_c over the model's width, which the two have in common; nothing else of their
columns is on one scale. Measured are students of the activation-aware init after all stages, means
over seeds with the standard error of seeds and videos, and the dense student and the teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis import miniature
from mla_study.errors import UserError
from mla_study.study.plots import style
from mla_study.study.runs import round_significant
from mla_study.study.tables import Column, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table5a_latent_dim"
TITLE = "Quality against the latent size: the miniature, and Wan 1.3B as the paper has it"
PROVENANCE = ("measured", "paper-quoted")
DATA = (
    "results/data/study_scores",
    "results/data/study_curves",
    "results/paper/table5a_latent_dim.csv",
    "results/paper/table5b_nope_rope_split.csv",
)
ROOT = Path(__file__).resolve().parents[1]
PAPER_WIDTH = 1536
PAPER_DEFAULT = {"d_nope": 96, "d_rope": 32, "d_c": 192}
"""The row of the paper's Table 5b that is missing in its Table 5a."""
CACHED = 2 * miniature.WIDTH
"""Scalars that a dense layer of the miniature caches a token."""
UNDER, QUOTED = "miniature, measured (± s.e.)", "Wan 1.3B (paper-quoted)"
SHOWN = (
    Column("all_correct", "all\ncorrect", ".3f", under=UNDER, best="max"),
    Column("all_correct_se", "±", ".3f", under=UNDER),
    Column("iou", "IoU", ".3f", under=UNDER, best="max"),
    Column("iou_se", "±", ".3f", under=UNDER),
    Column("velocity_error", "velocity\nerror (px)", ".2f", under=UNDER, best="min"),
    Column("velocity_error_se", "±", ".2f", under=UNDER),
    Column("held_out", "TF loss\nheld out", ".4f", under=UNDER, best="min"),
    Column("held_out_se", "±", ".4f", under=UNDER),
    Column("seeds", "seeds", under=UNDER),
)
COLUMNS = (
    Column("ratio", "$d_c$ / d", ".3f"),
    Column("d_c", "$d_c$\nof 96", under=UNDER),
    Column("saved", "cache\nsaved", ".1%", under=UNDER),
    *SHOWN,
    Column("paper_d_c", "$d_c$\nof 1536", under=QUOTED, quoted=True),
    Column("semantic", "semantic", ".2f", under=QUOTED, quoted=True),
    Column("quality", "quality", ".2f", under=QUOTED, quoted=True),
    Column("total", "total", ".2f", under=QUOTED, quoted=True),
)
METRICS = ("all_correct", "iou", "velocity_error")


def measured(scores: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Each student's scores after DMD at 1x and its held-out loss after teacher forcing.

    Returns:
        a row a ``student, d_c, d_rope`` of the usual length: each of :data:`METRICS` and
        ``held_out``, with ``_se``, and ``seeds``.
    """
    keys = ["student", "d_c", "d_rope"]
    found: pd.DataFrame | None = None
    for metric in (*METRICS, "held_out"):
        rows = (
            miniature.score_rows(scores, metric)
            if metric in METRICS
            else miniature.held_out(curves)
        )
        rows = miniature.usual(rows, None, None)
        mean = miniature.over_seeds(rows.assign(student=miniature.student(rows)), keys)
        mean = mean.rename(columns={"value": metric, "se": f"{metric}_se"})
        kept = [*keys, metric, f"{metric}_se", *(["seeds"] if found is None else [])]
        found = mean[kept] if found is None else found.merge(mean[kept], how="left", on=keys)
    assert found is not None
    if found.empty:
        raise UserError("no student was judged after DMD: finish the study")
    return found


def teacher(scores: pd.DataFrame) -> pd.DataFrame:
    """The teacher's row."""
    row: dict[str, object] = {"student": "teacher"}
    for metric in METRICS:
        mine = scores[(scores["stage"] == "teacher") & (scores["metric"] == metric)]
        mine = mine.assign(seed=range(len(mine)), student="teacher")  # one model, judged by seeds
        mean = miniature.over_seeds(mine, ["student"])
        if not mean.empty:
            row |= {metric: mean["value"][0], f"{metric}_se": mean["se"][0]}
            row["seeds"] = int(mean["seeds"][0])
    return pd.DataFrame([row])


def quoted(latent: pd.DataFrame, split: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows by ``ratio``, its default added from its table of splits."""
    same = (split["d_nope"] == PAPER_DEFAULT["d_nope"]) & (
        split["d_rope"] == PAPER_DEFAULT["d_rope"]
    )
    default = split[same].assign(d_c=PAPER_DEFAULT["d_c"])
    rows = pd.concat([latent, default])[["d_c", "semantic", "quality", "total"]]
    rows = rows.rename(columns={"d_c": "paper_d_c"})
    return rows.assign(ratio=rows["paper_d_c"] / PAPER_WIDTH)


def rows(
    scores: pd.DataFrame, curves: pd.DataFrame, latent: pd.DataFrame, split: pd.DataFrame
) -> pd.DataFrame:
    """The table: sizes in order, then dense and teacher."""
    found = measured(scores, curves)
    mine = found[(found["student"] == "activation") & (found["d_rope"] == miniature.D_ROPE)]
    mine = mine.assign(
        ratio=mine["d_c"] / miniature.WIDTH, saved=1 - (mine["d_c"] + mine["d_rope"]) / CACHED
    )
    sizes = mine.merge(quoted(latent, split), how="outer", on="ratio").sort_values("ratio")
    dense = found[found["student"] == "dense"].assign(saved=0.0).drop(columns="d_c")
    table = pd.concat([sizes.drop(columns="student"), dense, teacher(scores)], ignore_index=True)
    names = table.pop("student")
    table["ratio"] = table["ratio"].astype(object).where(names.isna(), names)
    table["ratio"] = [
        value if isinstance(value, str) else f"{value:.3f}" for value in table["ratio"]
    ]
    return round_significant(table.astype({"d_c": "Int64", "paper_d_c": "Int64", "seeds": "Int64"}))


def draw(out_dir: str) -> Figure:
    """Draw and save ``table5a_latent_dim.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
    """
    scores, curves = miniature.read("scores", ROOT), miniature.read("curves", ROOT)
    papers = [ROOT / name for name in DATA[2:]]
    table = rows(scores.table, curves.table, *map(pd.read_csv, papers))
    validity, run_hash = miniature.drawn_from(ID, [scores, curves], papers)
    count = int(miniature.score_rows(scores.table, "all_correct")["n"].median())
    split = f"{miniature.HEAD - miniature.D_ROPE}/{miniature.D_ROPE}"
    notes = [
        f"Miniature: init activation, split {split}, after all stages, {count} videos of the "
        "training length a seed (the one teacher is judged once a seed); IoU of the sprite, "
        "velocity error in pixels a frame; ± the larger of the standard errors over seeds and over "
        "videos. The paper's are VBench scores in percent, its total the "
        "plain mean of the two, its row at 0.125 from its table of splits.",
    ]
    with style():
        return save_table(
            table, Path(out_dir) / ID, COLUMNS, provenance=PROVENANCE, validity=validity,
            run_hash=run_hash, title=TITLE, notes=notes, rule_before=(len(table) - 2,),
        )  # fmt: skip
