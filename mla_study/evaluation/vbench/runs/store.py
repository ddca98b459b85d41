"""What has been scored, in one SQLite file: a killed run goes on, a finished one is instant.

A score is kept by the content of the video (SHA-256), the scorer, the *version* (a hash of VBench's
version, the worker's code and the weights) and the *question* (a hash of the prompt and whatever
else the scorer is told). A changed video is thus scored again, and the others are not.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.runs.videos import LOOK

if TYPE_CHECKING:
    from collections.abc import Generator

FILE = "scores.sqlite"
LOCK = ".lock"
_TABLES = """
create table if not exists files (
    path text primary key, size integer, mtime integer, facts text not null);
create table if not exists scores (
    sha256 text, scorer text, version text, question text, value real, terms real, frames integer,
    counted integer, seconds real, rss_mib real, more text,
    primary key (sha256, scorer, version, question));
"""


@dataclass(frozen=True)
class Key:
    """What a score answers: which content, which scorer, in which version, told what."""

    sha256: str
    scorer: str
    version: str
    question: str


@dataclass(frozen=True)
class Scored:
    """A worker's answer for one video (see the protocol in ``worker``)."""

    value: float
    terms: float
    frames: int
    counted: bool
    seconds: float
    rss_mib: float
    more: Mapping[str, Any]


class Scores:
    """The file of scores in a folder; for one process at a time (:func:`locked`).

    Raises:
        UserError: the file cannot be opened or written, or is no such file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            self._db.execute("pragma journal_mode=wal")
            self._db.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"{self.path} cannot be opened as a file of scores ({error}): give another --out"
            ) from None

    def close(self) -> None:
        self._db.close()

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path} cannot be written ({error}): free some space; the same command goes "
                "on with what is there"
            ) from None

    def seen(self, path: Path) -> Mapping[str, Any] | None:
        """What :func:`videos.look` saw of a file, unless its size or time has changed since."""
        state = path.stat()
        row = self._db.execute(
            "select facts from files where path = ? and size = ? and mtime = ?",
            (str(path.resolve()), state.st_size, state.st_mtime_ns),
        ).fetchone()
        facts = {} if row is None else json.loads(row[0])
        return facts if facts.pop("look", None) == LOOK else None

    def see(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Remember what was seen of a file."""
        state = path.stat()
        self._write(
            "insert or replace into files values (?, ?, ?, ?)",
            (
                str(path.resolve()),
                state.st_size,
                state.st_mtime_ns,
                json.dumps({**facts, "look": LOOK}),
            ),
        )

    def get(self, key: Key) -> Scored | None:
        """The score, if it is there."""
        row = self._db.execute(
            "select value, terms, frames, counted, seconds, rss_mib, more from scores "
            "where sha256 = ? and scorer = ? and version = ? and question = ?",
            (key.sha256, key.scorer, key.version, key.question),
        ).fetchone()
        if row is None:
            return None
        value, terms, frames, counted, seconds, rss_mib, more = row
        return Scored(value, terms, frames, bool(counted), seconds, rss_mib, json.loads(more))

    def put(self, key: Key, scored: Scored) -> None:
        """Keep a score; it is on disk when this returns."""
        self._write(
            "insert or replace into scores values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key.sha256, key.scorer, key.version, key.question, scored.value, scored.terms,
                scored.frames, int(scored.counted), scored.seconds, scored.rss_mib,
                json.dumps(dict(scored.more), sort_keys=True),
            ),
        )  # fmt: skip

    def forget(self, key: Key) -> None:
        """Drop a score whose files are gone."""
        self._write(
            "delete from scores where sha256 = ? and scorer = ? and version = ? and question = ?",
            (key.sha256, key.scorer, key.version, key.question),
        )

    def absorb(self, other: Path) -> int:
        """Take over the scores of another folder's file; how many were new.

        Raises:
            UserError: that folder has none.
        """
        file = other / FILE
        if not file.is_file():
            raise UserError(f"{other} holds no {FILE}: give the --out folder of a run")
        before = self.count()
        self._write("attach database ? as other", (str(file),))
        try:
            self._write("insert or ignore into scores select * from other.scores", ())
        finally:
            self._write("detach database other", ())
        return self.count() - before

    def count(self) -> int:
        """Number of scores."""
        return int(self._db.execute("select count(*) from scores").fetchone()[0])


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold a folder for this process.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give another --out"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(
                f"another run (process {owner}) works in {folder}: wait for it, or give another "
                "--out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
