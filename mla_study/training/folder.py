"""A run's folder: which run it holds, and that one process at a time trains in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.study.runs import atomic_write, read_record
from mla_study.training.ranks import Ranks

TRAIN_FILE = "train.json"
LOCK_FILE = ".lock"
_OBSERVED = "observed"


@contextmanager
def claimed(
    out: Path,
    identity: Mapping[str, Any],
    observed: Mapping[str, Any],
    ranks: Ranks,
    begun: Callable[[], bool],
) -> Generator[None, None, None]:
    """Hold ``out`` for a run: it is new, holds this very run, or one that left nothing behind.

    A ``train.json`` beside which nothing was made is of a start that failed, and is replaced; not
    so where another process may still be at its first steps.

    Args:
        identity: what must be the same for a run to go on.
        observed: kept beside it, and compared with nothing.
        begun: whether a checkpoint or a model lies there.

    Raises:
        UserError: another run's folder, one in use, or one that cannot be written.
    """
    lock: int | None = None
    refusal = ""
    try:
        if ranks.first:
            try:
                lock = _locked(out)
                _take(out, identity, observed, begun() or lock is None)
            except UserError as error:
                refusal = str(error)
        # all of them ask, so that none waits for one that has left
        if ranks.which(bool(refusal)):
            raise UserError(refusal or f"the first rank could not take {out}")
        yield
    finally:
        if lock is not None:
            os.close(lock)


def observed_in(out: Path) -> dict[str, Any]:
    """What the run in ``out`` noted beside what it is (``threads``, ``ranks``); may be empty."""
    found = read_record(out / TRAIN_FILE).get(_OBSERVED)
    return found if isinstance(found, dict) else {}


def _take(
    out: Path, identity: Mapping[str, Any], observed: Mapping[str, Any], binding: bool
) -> None:
    """Write the run's file, after comparing it with one that binds."""
    file = out / TRAIN_FILE
    mine = json.loads(json.dumps(identity))
    if file.exists() and binding:
        theirs = read_record(file)
        if not theirs:
            raise UserError(
                f"{file} cannot be read, so that nobody knows what run {out} holds: choose "
                "another folder"
            )
        theirs.pop(_OBSERVED, None)
        wrong = differences(theirs, mine)
        if wrong:
            raise UserError(
                f"{out} holds another run: {'; '.join(wrong[:8])}: choose another folder, or "
                "give what it was started with"
            )
    text = json.dumps(mine | {_OBSERVED: dict(observed)}, indent=1) + "\n"
    if not file.exists() or file.read_text() != text:
        atomic_write(file, text.encode())


def _locked(out: Path) -> int | None:
    """A lock on the folder, which ends with the process at the latest; None: no locks here.

    Raises:
        UserError: another process has it, or the folder cannot be made.
    """
    import fcntl

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if (out / TRAIN_FILE).exists():  # to be read alone, such as another's finished run
            return None
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}): choose another folder"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"{out} is in use by another run: wait for it, or give another --out"
        ) from None
    except OSError:  # some network file systems have none
        os.close(lock)
        return None
    return lock


def differences(theirs: object, mine: object, where: str = "") -> list[str]:
    """Where two plain values differ, as ``name: was 3, is 4``."""
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        found: list[str] = []
        for key in sorted({*theirs, *mine}, key=str):
            name = f"{where}.{key}" if where else str(key)
            found += differences(theirs.get(key), mine.get(key), name)
        return found
    return [] if theirs == mine else [f"{where}: was {theirs!r}, is {mine!r}"]
