"""``mla-study claims``: the paper's claims, each with a verdict that is computed from tables."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mla_study.errors import UserError, tell

if TYPE_CHECKING:
    from mla_study.study.claims import Outcome

_EXIT_CHANGED = 1


@dataclass(frozen=True)
class _Tables:
    """Which tables are asked."""

    results: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A folder of your own results; they stand in for the project's of the same name. Repeat for
    more."""
    alone: bool = False
    """Ask only the folders of --results, not the project's results."""

    def outcomes(self, only: Sequence[str] = ()) -> list[Outcome]:
        """Claims, judged (default: all); tables that do not fit their record are told on stderr."""
        from mla_study.study.claims import evaluate
        from mla_study.study.claims.ledger import altered_files
        from mla_study.study.notebooks import Project

        if self.alone and not self.results:
            raise UserError("--alone needs --results: it says to ask no other folder")
        own = None if self.alone else Project.find().root / "results"
        found = evaluate(own, self.results, only)
        for file in altered_files(found):
            tell(f"results/{file} is not the table that its run record describes")
        return found


@dataclass(frozen=True)
class ClaimsList(_Tables):
    """Print a line a claim: verdict, scale, the number that decides, what it is set against.

    Example: mla-study claims list
    """

    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Judge and print."""
        from mla_study.study.claims.report import document, listing

        found = self.outcomes()
        if self.json:
            _print_json(document(found))
            return 0
        print(listing(found, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
        return 0


@dataclass(frozen=True)
class ClaimsShow(_Tables):
    """Print all of a claim: numbers, nulls, rule, tables with their runs, class, hardware.

    Example: mla-study claims show cache-ratio
    """

    id: tyro.conf.Positional[tuple[str, ...]] = ()
    """Claims, as `mla-study claims list` names them."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Judge and print."""
        from mla_study.study.claims.report import document, full_text

        if not self.id:
            raise UserError("which claim? `mla-study claims list` names them")
        chosen = self.outcomes(self.id)
        if self.json:
            _print_json(document(chosen))
        else:
            print("\n\n".join(full_text(one) for one in chosen))
        return 0


@dataclass(frozen=True)
class ClaimsCheck(_Tables):
    """Compute every verdict anew and compare with the committed ledger, results/data/claims.

    Exit code 1, with claim, old and new verdict and the tables that changed, where a committed
    verdict no longer follows from the data, or where a table is not the one that its record
    describes.

    Example: mla-study claims check
    """

    write: bool = False
    """Write the ledger in place of comparing with it."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Judge and compare."""
        from dataclasses import asdict

        from mla_study.study.claims import ledger
        from mla_study.study.claims.report import counts
        from mla_study.study.notebooks import Project

        folder = Project.find().data / ledger.LEDGER
        if self.write and (self.results or self.alone):
            raise UserError("--write keeps what the project's own tables say: leave out --results")
        found = self.outcomes()
        if self.write:
            ledger.write(found, folder)
            print(counts(found))
            tell(f"wrote {folder}")
            return 0
        kept = ledger.read(folder)
        changed, altered = ledger.changes(kept, found), ledger.altered_files(found)
        drifted = ledger.drifted(kept, found)
        if self.json:
            _print_json({"changed": [asdict(one) for one in changed], "altered": altered,
                         "drifted": drifted})  # fmt: skip
        else:
            print("\n".join([*(one.text() for one in changed), counts(found)]))
        told = [name for name in drifted if name not in {one.id for one in changed}]
        if told:
            tell(
                f"numbers or tables of {', '.join(told)} are no longer the ledger's, their "
                "verdicts are: `mla-study claims check --write` takes them over"
            )
        return _EXIT_CHANGED if changed or altered else 0


@dataclass(frozen=True)
class Claims:
    """The paper's claims, each with its number, its null and a verdict computed from the tables.

    Example: mla-study claims list
    """

    command: (
        Annotated[ClaimsList, tyro.conf.subcommand("list")]
        | Annotated[ClaimsCheck, tyro.conf.subcommand("check")]
        | Annotated[ClaimsShow, tyro.conf.subcommand("show")]
    ) = field()

    def run(self) -> int:
        """Run the command."""
        return self.command.run()


def _print_json(what: object) -> None:
    import json

    print(json.dumps(what, indent=1, allow_nan=False))
