"""Where claims get their tables: the project's results, and those that a user adds.

A results folder has ``data/NAME`` (tables with ``run.json``) and ``paper/*.csv``; a user's own may
also be the bare folder of results. A result that a user gives stands in for the project's of the
same name. Other than :func:`~mla_study.study.runs.read_result`, a table that is not the one its
record describes is read all the same and marked as altered: whoever changed a number should see
what it changes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mla_study.errors import UserError
from mla_study.study.runs import RUN_FILE, Provenance, Validity

if TYPE_CHECKING:
    import pandas as pd


class MissingError(Exception):
    """What would be needed to judge a claim, in words that end a sentence ``needs ...``."""


@dataclass(frozen=True)
class Source:
    """A file that a claim was judged by.

    Attributes:
        file: below the results folder, such as ``data/study_scores/table.parquet``.
        run_hash: empty for published values.
        altered: the file is not the one that its run record describes.
    """

    file: str
    sha256: str
    run_hash: str
    provenance: Provenance
    validity: Validity
    hardware: str
    altered: bool = False


@dataclass(frozen=True)
class _Read:
    frame: pd.DataFrame
    source: Source
    run: Mapping[str, Any]


class Tables:
    """Tables of several results folders, each file read once."""

    def __init__(self, results: Path | None, more: Sequence[Path] = ()) -> None:
        """Folders in order of precedence: ``more``, then ``results`` (None: only ``more``).

        Raises:
            UserError: a folder is not there or holds no results.
        """
        self._roots = [*more, *([] if results is None else [results])]
        for root in self._roots:
            if not any((root / name).is_dir() for name in ("data", "paper")) and not any(
                root.glob(f"*/{RUN_FILE}")
            ):
                raise UserError(
                    f"{root} is no folder of results: it has neither data/ nor paper/ nor a result "
                    f"with {RUN_FILE}; give one such as results/, or what --out was of your run."
                )
        self._held: dict[Path, _Read] = {}

    def result(self, name: str, table: str = "table") -> _Read:
        """A table of the result ``name``.

        Raises:
            MissingError: no folder has it.
            UserError: it cannot be read.
        """
        folder = place_of(name, self._roots)
        if folder is None:
            raise MissingError(f"results/data/{name}")
        place = folder / f"{table}.parquet"
        if place not in self._held:
            self._held[place] = _result(place, f"data/{name}/{table}.parquet")
        return self._held[place]

    def paper(self, name: str) -> _Read:
        """The published values ``paper/NAME.csv``.

        Raises:
            MissingError, UserError: as :meth:`result`.
        """
        places = (root / "paper" / f"{name}.csv" for root in self._roots)
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            raise MissingError(f"results/paper/{name}.csv")
        if place not in self._held:
            self._held[place] = _quoted(place, f"paper/{name}.csv")
        return self._held[place]


def place_of(name: str, roots: Iterable[Path]) -> Path | None:
    """The folder of the result ``name`` in the first results folder that has it."""
    places = (root / option for root in roots for option in (Path("data") / name, Path(name)))
    return next((place for place in places if (place / RUN_FILE).is_file()), None)


class Reader:
    """What one claim reads, with a record of it."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._used: dict[str, Source] = {}

    def table(self, name: str, table: str = "table", columns: Iterable[str] = ()) -> pd.DataFrame:
        """A table of the result ``name``, which has these columns.

        Raises:
            MissingError: the result, the table or a column is not there.
        """
        return self._take(self._tables.result(name, table), columns)

    def first(self, *names: str, table: str = "table") -> tuple[str, pd.DataFrame]:
        """The first result of these that is there, and its name.

        Raises:
            MissingError: none is.
        """
        for name in names[:-1]:
            try:
                return name, self.table(name, table)
            except MissingError:
                continue
        return names[-1], self.table(names[-1], table)

    def has(self, name: str, table: str = "table") -> bool:
        """Whether there is such a table; it is then no source yet."""
        try:
            self._tables.result(name, table)
        except MissingError:
            return False
        return True

    def config(self, name: str) -> Mapping[str, Any]:
        """The configuration that the result ``name`` was made with. Raises MissingError."""
        return self._tables.result(name).run["identity"]["config"]

    def paper(self, name: str, columns: Iterable[str] = ()) -> pd.DataFrame:
        """Published values of the paper (``paper/NAME.csv``).

        Raises:
            MissingError: as :meth:`table`.
        """
        return self._take(self._tables.paper(name), columns)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What was read, by file."""
        return tuple(self._used[name] for name in sorted(self._used))

    def _take(self, read: _Read, columns: Iterable[str]) -> pd.DataFrame:
        lacking = [name for name in columns if name not in read.frame.columns]
        if lacking:
            raise MissingError(f"column {lacking[0]} of {read.source.file}")
        self._used[read.source.file] = read.source
        return read.frame


def rows(frame: pd.DataFrame, what: str, **where: object) -> pd.DataFrame:
    """Rows with these values.

    Args:
        what: the table, in words.

    Raises:
        MissingError: a column is not there, or no row is left.
    """
    kept = frame
    for name, value in where.items():
        if name not in kept.columns:
            raise MissingError(f"column {name} of {what}")
        kept = kept[kept[name] == value]
    if kept.empty:
        named = ", ".join(f"{name} = {value}" for name, value in where.items())
        raise MissingError(f"a row of {what} with {named}")
    return kept


def one(frame: pd.DataFrame, what: str, **where: object) -> pd.Series:
    """The first row with these values. Raises MissingError: there is none."""
    return rows(frame, what, **where).iloc[0]


def _result(place: Path, name: str) -> _Read:
    import pandas as pd

    record = place.with_name(RUN_FILE)
    try:
        run = json.loads(record.read_text(encoding="utf-8"))
        told, observed = run["tables"], run["observed"]
        provenance, validity = run["provenance"], run["validity"]
        run_hash = str(run["run_hash"])
        wanted = told[place.stem]["sha256"] if place.stem in told else None
        hardware = str(observed.get("hardware") or _device(observed["device"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{record} is no run record ({error}): measure the result anew.") from error
    if provenance not in get_args(Provenance) or validity not in get_args(Validity):
        raise UserError(
            f"{record} has the class {provenance!r} and validity {validity!r}, which do not exist: "
            "measure the result anew."
        )
    if wanted is None:
        raise MissingError(f"results/{name}")
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        raise MissingError(f"results/{name}") from None
    try:
        frame = pd.read_parquet(io.BytesIO(content))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{place} cannot be read as a table ({error}): restore it, or measure it anew."
        ) from error
    sha = hashlib.sha256(content).hexdigest()
    source = Source(name, sha, run_hash, provenance, validity, hardware, sha != wanted)
    return _Read(frame, source, run)


def _device(device: Mapping[str, Any]) -> str:
    if "gpu" in device:
        return str(device["gpu"])
    return f"{device.get('cpu', 'unknown machine')}, {device.get('cores', '?')} cores"


def _quoted(place: Path, name: str) -> _Read:
    import pandas as pd

    content = place.read_bytes()
    try:
        frame = pd.read_csv(io.BytesIO(content))
    except ValueError as error:
        raise UserError(f"{place} cannot be read as CSV ({error}): restore it.") from error
    sha = hashlib.sha256(content).hexdigest()
    return _Read(frame, Source(name, sha, "", "paper-quoted", "full", ""), {})
