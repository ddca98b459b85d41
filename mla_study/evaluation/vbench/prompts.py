"""Which prompt a video was made from, and which of VBench's dimensions look at it.

VBench names a video ``{prompt}-{index}.mp4`` by its short prompt, also where the model was told a
longer one. A table (CSV or JSONL) with the columns ``file``, ``prompt`` and, if there are several
videos of a prompt, ``index`` frees videos from that rule; ``told`` holds the longer prompt.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_study.errors import UserError

KNOWN = {
    "f9b50654f81ab732b9235d5bb91f0c3a4d152fac19249ce3a3a9185b2d80d8c3": "VBench, short",
    "58ed0665de52c1bdb4820af01327f5cc1138bedbeedcc63902751056f6bf5768": "VBench's GPT-longer",
    "54fb940aea8f1ede1e8728f62d3e67efacdd7b341fb8a6c91308bcba874d5d5d": "Wan2.1's (seed 42)",
    "c78f1ad32974503efaa8cc935347ace88f3a8b571adde6687bc8425bbf417cf3": "Self-Forcing's",
    "ae02a4bbebcb55067dbeea369e43d52a4817d57fd0ac223071b9aa236ac027c4": "MovieGen, short",
    "50293c2717c8f2df5773154d4680c74e636ecb08eb4fe13cdce7357d0ab9d121": "MovieGen, extended",
}
"""Prompt files by the SHA-256 of their bytes."""
INFO = "VBench_full_info.json"
TABLES = ("prompts.csv", "prompts.jsonl")
"""What a folder's own table of prompts may be called."""
QUOTED = 'a prompt that holds a comma must stand in "quotation marks"'
SURPLUS = "more cells than columns"
_INDEXED = re.compile(r"^(.*)-(\d{1,9})$", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """A prompt of VBench's suite: the dimensions whose suite it is in, and what these must know."""

    prompt: str
    dimensions: frozenset[str]
    auxiliary: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Told:
    """What is known of a video: its prompt, which of the prompt's videos it is, what was told."""

    prompt: str
    index: int | None = None
    told: str | None = None


def read_suite(path: Path) -> dict[str, Entry]:
    """VBench's own list (``VBench_full_info.json`` in its package): prompt -> entry.

    Two prompts are listed twice for different dimensions; they are joined here.

    Raises:
        UserError: it cannot be read as that list.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Entry] = {}
        for row in rows:
            prompt, dimensions = row["prompt_en"], frozenset(row["dimension"])
            auxiliary = dict(row.get("auxiliary_info") or {})
            if prompt in found:
                dimensions |= found[prompt].dimensions
                auxiliary = {**found[prompt].auxiliary, **auxiliary}
            found[prompt] = Entry(prompt, dimensions, auxiliary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as VBench's list of prompts ({error}): make setup-vbench"
        ) from None
    return found


def split_name(name: str) -> Told:
    """``a cat-3.mp4`` -> prompt ``a cat``, index 3; without a number the name is the prompt."""
    stem = Path(name).stem
    matched = _INDEXED.match(stem)
    return Told(matched[1], int(matched[2])) if matched else Told(stem)


def read_table(path: Path) -> dict[str, Told]:
    """A table of prompts: name of a file -> what is known of it.

    Raises:
        UserError: unreadable, a row without file or prompt or with more cells than columns, an
            index that is no number, a file or a prompt with the same index twice; the row is named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table of prompts: {error}") from None
    rows: list[dict[str, Any]]
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise UserError(f"{path}, line {number} is no JSON ({error})") from None
            if row is not None and not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is no object with file and prompt")
            rows += [row] if row is not None else []
    else:
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey=SURPLUS))
        except csv.Error as error:
            raise UserError(f"{path} cannot be read as a table of prompts: {error}") from None
    found: dict[str, Told] = {}
    places: dict[tuple[str, int], str] = {}
    for number, row in enumerate(rows, 1):
        name, prompt = row.get("file"), row.get("prompt")
        if not name or not isinstance(name, str) or not isinstance(prompt, str):
            raise UserError(f"{path}, row {number} lacks file or prompt: give both columns")
        if row.get("told") is not None and not isinstance(row["told"], str):
            raise UserError(f"{path}, row {number}: told is no text")
        if row.get(SURPLUS):
            raise UserError(
                f"{path}, row {number} ({name}) has more cells than there are columns: {QUOTED}"
            )
        if not prompt.strip():
            raise UserError(
                f"{path}, row {number} ({name}) has an empty prompt: give it, or no row"
            )
        if name in found:
            raise UserError(f"{path}, row {number} names {name} a second time")
        index, told = _index(row.get("index"), name, f"{path}, row {number}"), row.get("told")
        first = places.setdefault((prompt, index or 0), name)
        if first != name:
            raise UserError(
                f"{path}, row {number}: {name} is video {index or 0} of its prompt, as {first} is: "
                "give each another index"
            )
        found[name] = Told(prompt, index, told or None)
    if not found:
        raise UserError(f"{path} holds no row with the columns file and prompt")
    return found


def _index(given: object, name: str, where: str) -> int | None:
    """A row's index; without one, that of the file's name."""
    if given in (None, ""):
        return split_name(name).index
    text = str(given)
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{where}: index '{text}' is no number from 0 ({QUOTED})")
    return int(text)


def table_beside(folder: Path) -> Path | None:
    """The folder's own table of prompts, if it has one."""
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def text_sha256(path: Path) -> str:
    """SHA-256 (hex) of a prompt file. UserError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a prompt file") from None


def told_by(sha256: str | None) -> str:
    """Who wrote a file of longer prompts, as far as its hash says."""
    return "nobody: short prompts" if sha256 is None else KNOWN.get(sha256, "unknown")
