"""A set of the study's tables in a folder: it replaces an earlier one as a whole, or not at all.

Figures draw several tables of a set together, and the claims compare them; a set of which some
tables are of another store, or of an earlier state of it, would be wrong without looking it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mla_study.errors import UserError
from mla_study.miniature.plan import Plan
from mla_study.miniature.store import Store
from mla_study.miniature.tables import MODULES, TABLES, UNITS, tables
from mla_study.study.runs import RUN_FILE, file_sha256, read_record, write_result

if TYPE_CHECKING:
    import pandas as pd

BEFORE = "before"
"""Where tables of the earlier set lie while those of the new one take their place."""


@dataclass(frozen=True)
class Written:
    """A set that was written: its folders, and the tables in them by name (none is empty)."""

    folders: tuple[Path, ...]
    tables: Mapping[str, pd.DataFrame]
    pieces: int


def finished(whole: Plan, store: Store) -> Plan:
    """The part of a plan that a store has.

    Raises:
        UserError: it has nothing of it.
    """
    plan = Plan(node for node in whole if store.done(whole, node.name))
    if not len(plan):
        raise UserError(
            f"the store {store.folder} has no finished piece of this study: run the study first, "
            "or name its store by --store"
        )
    return plan


def refuse_fewer(pieces: Iterable[str], whole: Plan, out: Path, source: str) -> None:
    """Refuse to put tables of these pieces in the place of tables that hold others besides.

    Args:
        pieces: names of nodes that the new tables are of.
        whole: the study's plan, for its number of pieces.
        source: what has the pieces, as the sentence begins.

    Raises:
        UserError: ``out`` has a table of a piece of this study that is not among them, one of more
            pieces, or one without a record that says of which it is.
    """
    mine = set(pieces)
    for name in TABLES:
        folder = out / f"study_{name}"
        if not folder.exists():
            continue
        held = _pieces(folder)
        if held is None:
            told = "of a study that their record does not tell"
        elif lacking := sorted((held - mine) & set(whole.nodes)):
            told = f"of {len(held)}, {lacking[0]} among those that would be lost"
        elif len(held) > len(mine):  # of another study, whose pieces have other names
            told = f"of {len(held)}"
        else:
            continue
        raise UserError(
            f"{source} {len(mine)} of {len(whole)} pieces, but the tables in {out} are {told} "
            f"({folder.name}): finish the study, choose another --out, or replace them by --force"
        )


def _pieces(folder: Path) -> set[str] | None:
    """Names of the nodes that a written table is of; None where its record does not say."""
    try:
        return set(read_record(folder / RUN_FILE)["identity"]["config"]["nodes"])
    except (KeyError, TypeError):
        return None


def write_tables(whole: Plan, store: Store, out: Path, study: str, force: bool = False) -> Written:
    """Write ``study_NAME`` folders of what is done into ``out``, all or none.

    Of an unfinished study the tables are ``partial``, and a note names what is left. Tables of an
    earlier set that have no rows in this one are removed with it.

    Args:
        force: also where the tables there have pieces that the store lacks.

    Raises:
        UserError: nothing is done, the tables there have more (see :func:`refuse_fewer`), or the
            folder cannot be written; the tables there stay.
    """
    plan = finished(whole, store)
    if not force:
        refuse_fewer(plan.nodes, whole, out, f"the store {store.folder} has")
    left = sorted({node.name.split("/")[0] for node in whole if node.name not in plan.nodes})
    notes = [f"the miniature world; {len(plan)} of {len(whole)} pieces of the {study} study"]
    notes += [f"not finished: {', '.join(left)}"] if left else []
    spent = sum(float(store.record(plan, node.name)["cpu_s"]) for node in plan)
    inputs = {"codec": file_sha256(store.codec)}
    if store.teacher is not None:
        inputs["teacher"] = file_sha256(store.teacher)
    found = {name: frame for name, frame in tables(plan, store).items() if not frame.empty}
    if not found:
        raise UserError(
            f"what is finished in {store.folder} ({len(plan)} of {len(whole)} pieces) makes no "
            "table yet: let the study go on"
        )
    staged = out / f".study_tables.{os.getpid()}.tmp"
    try:
        for name, frame in found.items():
            write_result(
                staged / f"study_{name}",
                {"table": frame},
                config={"study": study, "nodes": dict(plan.keys)},
                inputs=inputs,
                seed=None,
                modules=MODULES,
                provenance="measured",
                validity="partial" if left else "full",
                units={k: v for k, v in UNITS.items() if k in frame},
                notes=notes,
                observed={"cpu_s_of_all_nodes": round(spent, 1)},
            )
        _exchange(staged, out)
        shutil.rmtree(staged / BEFORE)
    finally:
        if not any((staged / BEFORE).glob("*")):  # else it holds the only copy of earlier tables
            shutil.rmtree(staged, ignore_errors=True)
    return Written(tuple(out / f"study_{name}" for name in found), found, len(plan))


def _exchange(staged: Path, out: Path) -> None:
    """Put the folders in ``staged`` in the place of all of a set; undone if one cannot be moved."""
    before = staged / BEFORE
    moves: list[tuple[Path, Path]] = []
    for name in (f"study_{name}" for name in TABLES):
        if (out / name).exists():
            moves.append((out / name, before / name))
        if (staged / name).exists():
            moves.append((staged / name, out / name))
    done: list[tuple[Path, Path]] = []
    try:
        before.mkdir()
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException as error:  # Ctrl-C as well
        for source, target in reversed(done):
            target.rename(source)
        if isinstance(error, OSError):
            raise UserError(
                f"the tables in {out} cannot be replaced ({error.strerror or error}); "
                "they stand as they were: mend that, or choose another --out"
            ) from error
        raise
