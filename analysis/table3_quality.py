"""Table 3's columns of quality: CLIP-T, CLIP-F and HPSv3, as quoted and as measured here.

CLIP-T compares frames with the prompt, CLIP-F neighbouring frames with each other, HPSv3 predicts
people's preference. What was not measured is a dash.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis import vbench_rows
from mla_study.evaluation.vbench.dimensions import EXTRAS
from mla_study.study.plots import style
from mla_study.study.runs import round_significant
from mla_study.study.tables import Column, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table3_quality"
TITLE = "CLIP-T, CLIP-F and HPSv3, beside the paper's Table 3"
PROVENANCE = ("paper-quoted", "measured")
DATA = ("results/paper/table3_efficiency.csv",)
ROOT = Path(__file__).resolve().parents[1]
SPECS = {"clip_t": ".4f", "clip_f": ".4f", "hpsv3": ".2f"}
COLUMNS = (
    Column("model", "Model"),
    Column("params_b", "Params\n10⁹", ".2g"),
    Column("resolution", "Resolution"),
    *(Column(name, vbench_rows.told(name), SPECS[name]) for name in EXTRAS),
)
CLASS = Column("source", "Class")
MEASURED = (
    *(
        Column(f"{name}_{end}", end, SPECS[name], under=f"{vbench_rows.told(name)}, 95 %")
        for name in EXTRAS
        for end in ("low", "high")
    ),
    Column("videos", "videos", ".0f"),
)


def INPUTS(runs: str = "") -> dict[str, Path]:
    """Results of ours."""
    return vbench_rows.inputs(runs, ROOT)


def quoted(paper: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows."""
    kept = paper[["model", "params_b", "resolution", *EXTRAS]]
    return kept.assign(source="paper-quoted")


def measured(ours: vbench_rows.Ours) -> pd.DataFrame:
    """A row a model that has any of the three; its resolution is that of its videos."""
    rows = vbench_rows.wide(ours.table, EXTRAS)
    sizes = [
        ours.results[name].run["identity"]["config"].get("protocol", {}).get("size")
        for name in rows["result"]
    ]
    source = [f"measured: {vbench_rows.about(row)}" for row in rows.to_dict("records")]
    return rows.assign(model=rows["name"], resolution=sizes, source=source)


def draw(out_dir: str, runs: str = "") -> Figure:
    """Draw and save ``table3_quality.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
        runs: see :func:`analysis.vbench_rows.folders`.

    Raises:
        UserError: a folder that holds no result.
    """
    paper = ROOT / DATA[0]
    ours = vbench_rows.read(runs, ROOT)
    theirs, mine = quoted(pd.read_csv(paper)), measured(ours)
    table = pd.concat([theirs, mine], ignore_index=True) if len(mine) else theirs
    kinds, validity, run_hash = vbench_rows.identity(ID, ours, mine, [paper])
    notes = [
        "Grey italics: paper-quoted; ours are of other prompts and videos, so no two compare."
        if len(mine)
        else f"Grey italics: paper-quoted. No video of ours is scored by these. {vbench_rows.HOW}"
    ]
    if len(mine):
        notes.append("Measured: intervals by resampling prompts; a dash: not measured.")
    columns = (*COLUMNS, *(MEASURED if len(mine) else ()), CLASS)
    with style():
        return save_table(
            round_significant(table), Path(out_dir) / ID, columns, provenance=kinds,
            validity=validity, run_hash=run_hash, title=TITLE, notes=notes,
            rule_before=[len(theirs)] if len(mine) else (), quoted_rows=range(len(theirs)),
        )  # fmt: skip
