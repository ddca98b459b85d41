"""What the figures of the miniature study share: its tables and colours.

How its rows are chosen and what is made of its seeds stands in ``mla_study.miniature.results`` and
``mla_study.study.statistics``, whose names the figures find here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mla_study.miniature.results import (
    D_C,
    D_ROPE,
    HEAD,
    INITS,
    LONG,
    MARGIN,
    WIDTH,
    held_out,
    is_long,
    of_student,
    score_rows,
    steps_to,
    student,
    usual,
)
from mla_study.study.plots import COLOURS
from mla_study.study.runs import Result, Validity, file_sha256, read_result, run_record
from mla_study.study.statistics import interval, over_seeds, paired, percentiles, spearman

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = [
    "D_C",
    "D_ROPE",
    "HEAD",
    "INITS",
    "LONG",
    "LOOKS",
    "MARGIN",
    "ROOT",
    "STAGES",
    "WIDTH",
    "drawn_from",
    "held_out",
    "interval",
    "is_long",
    "of_student",
    "over_seeds",
    "paired",
    "percentiles",
    "read",
    "score_rows",
    "spearman",
    "stage_marks",
    "steps_to",
    "student",
    "usual",
]

ROOT = Path(__file__).resolve().parents[1]
LOOKS = {
    "dense": (COLOURS["black"], "D"),
    "activation": (COLOURS["green"], "o"),
    "spectral": (COLOURS["blue"], "s"),
    "spectral-raw": (COLOURS["purple"], "^"),
    "random": (COLOURS["vermillion"], "v"),
}
"""Colour and marker of a student."""
STAGES = {"tf": "TF", "cd": "CD", "dmd": "DMD"}


def read(name: str, root: Path = ROOT) -> Result:
    """The study's result ``results/data/study_NAME``.

    Raises:
        UserError: it is not there, or not what its record says.
    """
    return read_result(root / "results" / "data" / f"study_{name}")


def drawn_from(
    figure: str, results: Sequence[Result], files: Iterable[Path] = ()
) -> tuple[Validity, str]:
    """Validity and run hash of a figure that these results and further files are drawn in."""
    order: tuple[Validity, ...] = ("full", "partial", "substitute", "invalid")
    validity = order[max(order.index(result.validity) for result in results)]
    inputs = {result.folder.name: result.run_hash for result in results}
    inputs |= {file.name: file_sha256(file) for file in files}
    run = run_record(
        config={"figure": figure}, inputs=inputs, seed=None, modules=(f"analysis.{figure}",),
        provenance="measured", validity=validity,
    )  # fmt: skip
    return validity, run["run_hash"]


def stage_marks(axis: Axes, rows: pd.DataFrame) -> None:
    """Mark where each stage begins, by the ``step`` and ``stage`` of the usual runs."""
    rows = rows[~is_long(rows)]
    ends = rows.groupby("stage")["step"].max().sort_values()
    start = 0
    for stage, end in ends.items():
        if start:
            axis.axvline(start, color="0.75", lw=0.6, zorder=0)
        axis.text(
            start, 1.0, f" {STAGES.get(str(stage), stage)}", fontsize=5, color="0.4", va="bottom",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
        start = int(end)
