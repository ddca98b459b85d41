"""Which figures a user's results join: by their kind, through the figures' own parameters.

A kind of result is told by its tables and their columns. A figure whose notebook has the
parameter of that name is drawn with all results of the kind, beside the project's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mla_study.errors import UserError
from mla_study.report.folders import find
from mla_study.study.claims.model import Outcome
from mla_study.study.claims.sources import place_of
from mla_study.study.runs import RUN_FILE, read_record, read_result

_OPERATORS = {"checkpoint", "layer", "attention", "operator", "gauge"}
SPECTRA = {*_OPERATORS, "index", "sigma"}
KINDS: Mapping[str, Mapping[str, set[str]]] = {
    "runs": {
        "table": {"model", "scorer", "value", "low", "high", "videos", "prompts", "wanted",
                  "validity", "mode", "horizon_s"},
    },
    "probes": {
        "table": {*_OPERATORS, "series", "metric", "value", "null", "null_value", "null_se",
                  "m", "n"},
        "spectra": {*SPECTRA, "series"},
    },
}  # fmt: skip
"""Parameter of a notebook -> tables by which its kind of result is known, and their columns."""


def joined(roots: Iterable[Path]) -> dict[str, list[Path]]:
    """The results of each kind at or below some folders, by the parameter that takes them.

    One that was altered, or that no parameter can name, is of no kind.

    Raises:
        UserError: as :func:`~mla_study.report.folders.find`.
    """
    found: dict[str, list[Path]] = {}
    for folder in dict.fromkeys(place.resolve() for root in roots for place in find(root)):
        if str(folder) != str(folder).replace(",", "").strip():
            continue  # parameters have commas between folders
        try:
            result = read_result(folder)
        except UserError:
            continue  # the list of results says what is wrong with it
        for parameter, tables in KINDS.items():
            if all(
                name in result.tables and columns <= set(result.tables[name].columns)
                for name, columns in tables.items()
            ):
                found.setdefault(parameter, []).append(folder)
    return found


def assignments(found: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Values of the parameters."""
    return {name: ",".join(map(str, folders)) for name, folders in found.items()}


def stand_ins(outcome: Outcome, roots: Sequence[Path], data: Path) -> tuple[Path, ...]:
    """The user's results by which a claim was judged in place of others in ``data``."""
    measured = (source.file for source in outcome.sources if source.run_hash)
    names = dict.fromkeys(Path(file).parent.name for file in measured)
    places = {name: place for name in names if (place := place_of(name, roots)) is not None}
    return tuple(
        place.resolve() for name, place in places.items() if _tables(place) != _tables(data / name)
    )


def _tables(folder: Path) -> object:
    return read_record(folder / RUN_FILE).get("tables")
