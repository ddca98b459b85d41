"""Published scores to be shown beside our own: ``paper-quoted``, and never tested against.

Nobody has their videos or their seeds, and little is told of their protocol.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, EXTRAS
from mla_study.study.notebooks import Project
from mla_study.study.runs import RUN_FILE, read_result

QUOTED = "paper-quoted"
ALL = "quoted"
"""The word for all the tables that come with the project."""
TABLES = ("vbench_leaderboard", "table5a_latent_dim", "table5b_nope_rope_split",
          "table3_efficiency", "table2_long_horizon")  # fmt: skip
"""Those of ``results/paper`` that hold scores of VBench's or of its companions."""
_SHARES = (*DIMENSIONS, "quality", "semantic", "total", "total_mean", "overall_6")
_SCORES = (*_SHARES, *EXTRAS)
_HORIZON = "horizon_s"


@dataclass(frozen=True)
class Quoted:
    """A published row.

    Attributes:
        source: name of the file. name: of the model, with its length or sizes where told.
        values: scorer -> score on our scale (shares, not percent).
    """

    source: str
    name: str
    values: Mapping[str, float]


def quoted_rows(what: Sequence[str], scorers: Sequence[str], mode: str) -> list[Quoted]:
    """The rows of each of ``what`` that have any of the scorers.

    Args:
        what: ``quoted`` for the project's own tables (of long videos in long mode, else of short
            ones), a CSV file with a column a score, or the folder of a paper-quoted result.

    Raises:
        UserError: not there, no such table, a measured result, or no score in common.
    """
    found = list[Quoted]()
    for one in what:
        rows = _project(mode) if one == ALL else _read(Path(one))
        kept = [
            Quoted(row.source, row.name, {s: row.values[s] for s in scorers if s in row.values})
            for row in rows
        ]
        kept = [row for row in kept if row.values]
        if not kept:
            raise UserError(
                f"--beside {one} has none of the scores that are compared: leave it out"
            )
        found += kept
    return found


def _project(mode: str) -> list[Quoted]:
    folder = Project.find().root / "results" / "paper"
    found = list[Quoted]()
    for name in TABLES:
        path = folder / f"{name}.csv"
        if path.is_file():
            columns, rows = _csv(path)
            if (_HORIZON in columns) == (mode == "long"):
                found += _rows(path, columns, rows)
    if not found:
        raise UserError(f"{folder} holds no published scores of VBench: give --beside FILE.csv")
    return found


def _read(path: Path) -> list[Quoted]:
    if path.is_dir():
        result = read_result(path)
        if result.provenance != QUOTED:
            raise UserError(
                f"--beside {path} is {result.provenance}: give it as a run, --beside takes what is "
                f"{QUOTED}"
            )
        return [
            Quoted(path.name, str(model), dict(zip(mine["scorer"], mine["value"], strict=True)))
            for model, mine in result.table.groupby("model", sort=False)
        ]
    return _rows(path, *_csv(path))


def _csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--beside {path} cannot be read ({error}): give {ALL}, a CSV file with a column a "
            f"score, or a folder with {RUN_FILE}"
        ) from None
    table = csv.DictReader(io.StringIO(text, newline=""))
    return list(table.fieldnames or ()), list(table)


def _rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> list[Quoted]:
    renamed = {"overall": "overall_6"}
    held = [column for column in columns if renamed.get(column, column) in _SCORES]
    if not held:
        raise UserError(f"{path} has no column of a score: they are named as VBench's dimensions")
    try:
        values = [{c: float(row[c]) for c in held if row.get(c)} for row in rows]
    except ValueError as error:
        raise UserError(f"{path} is no table of scores: {error}") from None
    shares = [v for row in values for c, v in row.items() if renamed.get(c, c) in _SHARES]
    scale = 0.01 if shares and max(shares) > 1.0 else 1.0
    if _plain(values):
        renamed["total"] = "total_mean"
    found = list[Quoted]()
    for row, own in zip(rows, values, strict=True):
        named = {renamed.get(c, c): value for c, value in own.items()}
        scaled = {c: v * scale if c in _SHARES else v for c, v in named.items()}
        found.append(Quoted(path.name, _name(row, columns, held), scaled))
    return found


def _plain(values: Sequence[Mapping[str, float]]) -> bool:
    """Whether what is called total is the plain mean of Quality and Semantic, not VBench's 4:1."""
    whole = [row for row in values if {"quality", "semantic", "total"} <= set(row)]
    plain = [abs(row["total"] - (row["quality"] + row["semantic"]) / 2) for row in whole]
    four = [abs(row["total"] - (4 * row["quality"] + row["semantic"]) / 5) for row in whole]
    return sum(plain) < sum(four)


def _name(row: Mapping[str, str], columns: Sequence[str], held: Sequence[str]) -> str:
    """The model with its length; of a table without models, what stands before the scores."""
    length = f", {row[_HORIZON]} s" if row.get(_HORIZON) else ""
    if row.get("model"):
        return f"{row['model']}{length}"
    before = columns[: list(columns).index(held[0])]
    return ", ".join(f"{column} {row[column]}" for column in before) or "row"
