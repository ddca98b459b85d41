"""Claims judged by the tables that are there, and the committed ledger held against them.

``results/data/claims`` keeps what came out when it was written: a row a claim (``table``), its
numbers (``numbers``) and the files that it was judged by (``sources``). :func:`changes` says where
the data give another verdict today.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mla_study.errors import UserError
from mla_study.study.claims.definitions import CLAIMS
from mla_study.study.claims.model import Claim, Evidence, Number, Outcome
from mla_study.study.claims.rules import judged
from mla_study.study.claims.sources import MissingError, Reader, Source, Tables
from mla_study.study.runs import Provenance, Validity, read_result, round_significant, write_result

if TYPE_CHECKING:
    import pandas as pd

    from mla_study.study.runs import Result

LEDGER = "claims"
MODULES = ("mla_study.study.claims",)
NONE = "–"
ABSENT = "no such claim"


@dataclass(frozen=True)
class Change:
    """A verdict that no longer follows: of the ledger (``old``) and of the data (``new``)."""

    id: str
    old: str
    new: str
    tables: tuple[str, ...]

    def text(self) -> str:
        """The change as a line."""
        cause = f"changed: {', '.join(self.tables)}"
        if not self.tables:
            cause = "no table changed, so the claim's query or rule did"
        return f"{self.id}: {self.old} -> {self.new} ({cause})"


def evaluate(
    results: Path | None, more: Sequence[Path] = (), only: Sequence[str] = ()
) -> list[Outcome]:
    """Judge every claim by the tables of a results folder.

    Args:
        results: such as the project's ``results/``; None: only what ``more`` has.
        more: folders of a user's own results, which stand in for those of the same name.
        only: ids of the claims that are wanted, in that order; none means all.

    Raises:
        UserError: there is no such claim, a folder is no results folder, or a table cannot be
            read. A table that is not there is no error: its claims are then not testable.
    """
    wanted = [claim_of(name) for name in only] if only else CLAIMS
    tables = Tables(results, more)
    return [outcome(claim, tables) for claim in wanted]


def outcome(claim: Claim, tables: Tables) -> Outcome:
    """Judge one claim."""
    reader = Reader(tables)
    try:
        found = claim.query(reader)
    except MissingError as lacking:
        found = Evidence((), str(lacking))
    ruling, missing = judged(claim.rule, found)
    sources = reader.sources
    classes = {number.provenance for number in found.numbers} | {s.provenance for s in sources}
    order = get_args(Validity)
    worst = max((order.index(source.validity) for source in sources), default=0)
    return Outcome(
        claim,
        ruling.verdict,
        ruling.why,
        ruling.number,
        ruling.against,
        missing,
        found.scale or claim.scale,
        found.numbers,
        sources,
        found.about,
        tuple(name for name in get_args(Provenance) if name in classes),
        order[worst],
        tuple(sorted({source.hardware for source in sources if source.hardware})),
    )


def tables_of(outcomes: Sequence[Outcome]) -> dict[str, pd.DataFrame]:
    """The ledger's tables."""
    import pandas as pd

    judged_rows = [
        {
            "id": one.id,
            "verdict": one.verdict,
            "missing": one.missing,
            "scale": one.scale,
            "statement": one.claim.statement,
            "place": one.claim.place,
            "quantity": one.claim.quantity,
            "unit": one.claim.unit,
            "number": NONE if one.number is None else one.number.text(),
            "against": one.against or NONE,
            "why": one.why,
            "figure": one.claim.figure,
            "command": one.claim.command,
            "provenance": ", ".join(one.provenance),
            "validity": one.validity,
            "hardware": "; ".join(one.hardware),
        }
        for one in outcomes
    ]
    numbers = [
        {"id": one.id, "position": place, **dataclasses.asdict(number)}
        for one in outcomes
        for place, number in enumerate(one.numbers)
    ]
    sources = [
        {"id": one.id, **dataclasses.asdict(source)} for one in outcomes for source in one.sources
    ]
    wide = ["id", "position", *(field.name for field in dataclasses.fields(Number))]
    named = ["id", *(field.name for field in dataclasses.fields(Source))]
    return {
        "table": pd.DataFrame(judged_rows),
        "numbers": round_significant(pd.DataFrame(numbers, columns=wide)),
        "sources": pd.DataFrame(sources, columns=named),
    }


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Keep the ledger.

    Raises:
        UserError: a table that a claim was judged by is not the one that its record describes, or
            the folder cannot be written.
    """
    altered = altered_files(outcomes)
    if altered:
        raise UserError(
            f"results/{altered[0]} is not the table that its run record describes: restore it or "
            "measure it anew before its verdicts are kept."
        )
    inputs = {source.file: source.sha256 for one in outcomes for source in one.sources}
    write_result(
        folder,
        tables_of(outcomes),
        config={"claims": [one.id for one in outcomes]},
        inputs=dict(sorted(inputs.items())),
        seed=None,
        modules=MODULES,
        provenance="measured",
        validity="full",
        units={"value": "see column unit", "low": "lower bound", "high": "upper bound"},
        notes=[
            "verdicts are computed by `mla-study claims check --write`; class and validity of what "
            "each rests on stand in its row"
        ],
    )


def read(folder: Path) -> Result:
    """The committed ledger.

    Raises:
        UserError: there is none, or it is not what was written.
    """
    try:
        return read_result(folder)
    except UserError as error:
        if folder.is_dir():
            raise
        raise UserError(
            f"There is no ledger in {folder}: `mla-study claims check --write` writes it."
        ) from error


def altered_files(outcomes: Sequence[Outcome]) -> list[str]:
    """Files that are not what their run record describes, in order."""
    return sorted({s.file for one in outcomes for s in one.sources if s.altered})


def changes(ledger: Result, outcomes: Sequence[Outcome]) -> list[Change]:
    """Claims whose verdict in the ledger is not the one that the data give."""
    kept = dict(zip(ledger.table["id"], ledger.table["verdict"], strict=True))
    found = [
        Change(one.id, kept.get(one.id, ABSENT), one.verdict, tuple(differing(ledger, one)))
        for one in outcomes
        if kept.get(one.id) != one.verdict
    ]
    known = {one.id for one in outcomes}
    gone = (name for name in kept if name not in known)
    return [*found, *(Change(name, kept[name], ABSENT, ()) for name in gone)]


def drifted(ledger: Result, outcomes: Sequence[Outcome]) -> list[str]:
    """Claims whose verdict stands while their numbers or files are no longer the ledger's."""
    numbers = tables_of(outcomes)["numbers"]
    found: list[str] = []
    for one in outcomes:
        mine, kept = (
            frame[frame["id"] == one.id].reset_index(drop=True).astype(object)
            for frame in (numbers, ledger.tables["numbers"])
        )
        alike = mine.shape == kept.shape
        alike = alike and bool((mine.eq(kept) | (mine.isna() & kept.isna())).to_numpy().all())
        if not alike or list(differing(ledger, one)):
            found.append(one.id)
    return found


def differing(ledger: Result, one: Outcome) -> Iterator[str]:
    """Files of a claim that are not those of the ledger, as ``results/...``."""
    held = ledger.tables["sources"]
    held = held[held["id"] == one.id]
    kept = dict(zip(held["file"], held["sha256"], strict=True))
    now = {source.file: source.sha256 for source in one.sources}
    for file in kept:
        # what was not read only because another table is missing did not change
        if file not in now and f"results/{'/'.join(file.split('/')[:2])}" in one.missing:
            yield f"results/{file} is gone"
    yield from (f"results/{file}" for file, sha in now.items() if kept.get(file) != sha)


def claim_of(name: str) -> Claim:
    """The claim of an id.

    Raises:
        UserError: there is no such claim.
    """
    known = {claim.id: claim for claim in CLAIMS}
    if name not in known:
        near = difflib.get_close_matches(name, list(known), 1)
        hint = f"did you mean {near[0]}?" if near else "`mla-study claims list` names them."
        raise UserError(f"there is no claim '{name}': {hint}")
    return known[name]
