"""Result folders as the page shows them: what a record says, and the first rows of each table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.study.observe import hardware_of
from mla_study.study.runs import RUN_FILE, file_sha256, read_record
from mla_study.study.tables import spell

if TYPE_CHECKING:
    import pandas as pd

ROWS, COLUMNS = 8, 12
_LONGEST = 60
_DEEP = 4


@dataclass(frozen=True)
class Cell:
    """A value as text, and as a number where it is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Preview:
    """The upper left corner of a table.

    Attributes:
        altered: the file is not the one that the record describes, or cannot be read.
    """

    name: str
    rows: int
    columns: int
    heads: tuple[str, ...] = ()
    cells: tuple[tuple[Cell, ...], ...] = ()
    altered: str = ""


@dataclass(frozen=True)
class Folder:
    """A result folder."""

    name: str
    run: str
    provenance: str
    validity: str
    hardware: str
    notes: tuple[str, ...]
    tables: tuple[Preview, ...]


def find(root: Path) -> list[Path]:
    """Result folders at or below a folder, by name.

    Raises:
        UserError: it is no folder, or holds no result.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the --out of a run, or a folder of such")
    places = sorted(
        file.parent
        for file in root.rglob(RUN_FILE)
        if len(file.relative_to(root).parts) <= _DEEP and "tables" in read_record(file)
    )
    if not places:
        raise UserError(
            f"{root} holds no result ({RUN_FILE} with its tables): give the --out of a run, such "
            "as that of rank-probe, mla-study vbench run or mla-study bench, or a folder of such"
        )
    return places


def listed(root: Path) -> list[Folder]:
    """All results at or below a folder. Raises UserError: as :func:`find`."""
    return [
        opened(place, place.relative_to(root).as_posix() if place != root else root.resolve().name)
        for place in find(root)
    ]


def opened(place: Path, name: str) -> Folder:
    """One result folder; a table that cannot be read says so in its place."""
    run = read_record(place / RUN_FILE)
    told: Mapping[str, Any] = run.get("tables") or {}
    return Folder(
        name,
        str(run.get("run_hash", ""))[:12],
        str(run.get("provenance", "")),
        str(run.get("validity", "")),
        hardware_of(run),
        tuple(str(note) for note in run.get("notes") or ()),
        tuple(_preview(place, name, entry) for name, entry in sorted(told.items(), key=_main)),
    )


def _main(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != "table", item[0]


def _preview(place: Path, name: str, entry: Mapping[str, Any]) -> Preview:
    import pandas as pd

    file = place / str(entry.get("file", f"{name}.parquet"))
    try:
        altered = (
            "" if file_sha256(file) == entry.get("sha256") else "altered since it was measured"
        )
        frame = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or "no table"
        return Preview(name, 0, 0, altered=f"cannot be read ({told})")
    shown = frame.iloc[:ROWS, :COLUMNS]
    return Preview(
        name, len(frame), len(frame.columns), tuple(map(str, shown.columns)), _cells(shown), altered
    )


def _cells(frame: pd.DataFrame) -> tuple[tuple[Cell, ...], ...]:
    rows: Sequence[Sequence[object]] = frame.astype(object).to_numpy().tolist()
    return tuple(tuple(cell_of(value) for value in row) for row in rows)


def cell_of(value: object) -> Cell:
    """A value of a table as the page shows it."""
    if isinstance(value, bytes | list | tuple | dict) or hasattr(value, "shape"):
        return Cell(f"{len(value)} values" if hasattr(value, "__len__") else "…")  # type: ignore[arg-type]
    text = spell(value)
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return Cell(text, float(value))
    return Cell(text)
