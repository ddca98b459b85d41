"""Result folders as the page shows them: what a record says, and some rows of each table."""

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

ROWS, COLUMNS = 12, 12
_EACH = 3  # at least so many rows of a kind
TELLING: Mapping[str, str] = {"metric": "r_0.99", "gauge": "raw"}
"""Where a table has this value in this column, only rows with it are shown."""
_LONGEST = 60
_DEEP = 4


@dataclass(frozen=True)
class Cell:
    """A value as text, and as a number where it is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Preview:
    """Some rows of a table.

    Attributes:
        places: numbers of the rows that are shown.
        over: columns whose values each have as many of them, from the first to the last.
        heads, cells: the columns that differ among them.
        same: name and value of those that do not.
        more: how many columns are left out.
        altered: the file is not the one that the record describes, or cannot be read.
    """

    name: str
    rows: int
    columns: int
    heads: tuple[str, ...] = ()
    cells: tuple[tuple[Cell, ...], ...] = ()
    altered: str = ""
    places: tuple[int, ...] = ()
    over: tuple[str, ...] = ()
    same: tuple[tuple[str, Cell], ...] = ()
    more: int = 0


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
    place: Path


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
        place.resolve(),
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
    places, over = _chosen(frame)
    cells = _cells(frame.iloc[places])
    heads = [str(head) for head in frame.columns]
    values = [{row[i] for row in cells} for i in range(len(heads))]
    differ = [i for i, found in enumerate(values) if len(found) > 1 or len(cells) < 2]
    same = [(heads[i], *values[i]) for i in range(len(heads)) if i not in differ]
    same = [(head, cell) for head, cell in same if cell.text not in ("", spell(None))]
    shown = differ[:COLUMNS]
    return Preview(
        name, len(frame), len(heads),
        tuple(heads[i] for i in shown), tuple(tuple(row[i] for i in shown) for row in cells),
        altered, tuple(places), tuple(over), tuple(same),
        len(differ) - len(shown),
    )  # fmt: skip


def _chosen(frame: pd.DataFrame) -> tuple[list[int], list[str]]:
    """Numbers of the rows to show, and the columns that they are spread over.

    All of a short table. Else those with :data:`TELLING` values if there are any; of them as many
    of each kind, by the columns of text that make few kinds, evenly from its first row to its last.
    """
    kept = frame.reset_index(drop=True)
    if len(kept) <= ROWS:
        return kept.index.tolist(), []
    for column, value in TELLING.items():
        if column in kept and (mine := kept[kept[column] == value]).size:
            kept = mine
    texts = [
        name for name in kept.columns if all(isinstance(value, str) for value in kept[name].head(1))
    ]
    over: list[str] = []
    for name in texts:
        kinds = len(kept[[*over, name]].drop_duplicates())
        if kept[name].nunique() > 1 and kinds <= ROWS // _EACH:
            over.append(name)
    groups = [mine.index for _, mine in kept.groupby(over)] if over else [kept.index]
    each = ROWS // len(groups)
    places = {int(rows[i * (len(rows) - 1) // (each - 1)]) for rows in groups for i in range(each)}
    return sorted(places), over


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
