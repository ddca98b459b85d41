"""Captions of training data: a list of prompts, or a table that says which video shows what.

``.txt`` has a prompt a line. ``.csv``, ``.jsonl`` and ``.parquet`` have a column ``caption``
(or ``prompt``, ``text``) and, for videos, ``file`` (or ``path``, ``video``, ``file_name``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_study.errors import UserError

TEXTS = ("caption", "prompt", "text")
FILES = ("file", "path", "video", "file_name")
TABLES = (".csv", ".jsonl", ".parquet")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp")


Check = Callable[[str], object]
"""Raises a UserError for a caption that the model's text encoder cannot read."""


@dataclass(frozen=True)
class Captioned:
    """A video and what it shows."""

    video: Path
    caption: str


def read_prompts(path: Path, check: Check | None = None) -> list[str]:
    """The captions of a list or table, in order; empty lines of a ``.txt`` are left out.

    Raises:
        UserError: it cannot be read, a row has no caption or one that fails the check (named), or
            there is none at all.
    """
    if path.suffix.lower() in TABLES:
        found = [_told(row, n, path, check) for n, row in enumerate(_rows(path), start=1)]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}): give a prompt a line") from None
        numbered = [(n, line.strip()) for n, line in enumerate(lines, start=1) if line.strip()]
        found = [_checked(line, f"{path}, line {n}", check) for n, line in numbered]
    if not found:
        raise UserError(f"{path} holds no prompt: give one a line")
    return found


def read_folder(folder: Path, check: Check | None = None) -> list[Captioned]:
    """The videos of a folder with their captions, by file name.

    A table in the folder names videos and captions; without one each video has a ``.txt`` of its
    own name.

    Raises:
        UserError: no video, several tables, a row that does not parse or fails the check (named),
            a video that is not there, or one without a caption.
    """
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in TABLES)
    if len(tables) > 1:
        names = ", ".join(p.name for p in tables)
        raise UserError(f"{folder} holds several tables ({names}): leave one of captions there")
    if tables:
        rows = enumerate(_rows(tables[0]), start=1)
        found = [_captioned(row, n, tables[0], check) for n, row in rows]
    else:
        videos = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in VIDEOS]
        found = [_beside(video, check) for video in videos]
    if not found:
        raise UserError(
            f"{folder} holds no video with a caption: add captions.csv with the columns file and "
            "caption, or a .txt beside each video"
        )
    return sorted(found, key=lambda one: str(one.video))


def _captioned(row: Mapping[str, Any], number: int, path: Path, check: Check | None) -> Captioned:
    video = path.parent / _text(row, number, path, FILES)
    if not video.is_file():
        raise UserError(f"{path}, row {number}: {video.name} is not there")
    return Captioned(video, _told(row, number, path, check))


def _beside(video: Path, check: Check | None) -> Captioned:
    text = video.with_suffix(".txt")
    if not text.is_file():
        raise UserError(
            f"{video} has no caption: add {text.name} beside it, or a table of captions"
        )
    try:
        caption = text.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{text} cannot be read ({error}): write the caption anew") from None
    if not caption:
        raise UserError(f"{text} is empty: write what {video.name} shows")
    return Captioned(video, _checked(caption, str(text), check))


def _told(row: Mapping[str, Any], number: int, path: Path, check: Check | None) -> str:
    return _checked(_text(row, number, path, TEXTS), f"{path}, row {number}", check)


def _checked(caption: str, where: str, check: Check | None) -> str:
    if check is not None:
        try:
            check(caption)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return caption


def _text(row: Mapping[str, Any], number: int, path: Path, names: tuple[str, ...]) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise UserError(
        f"{path}, row {number}: there is no {names[0]} (a column {', '.join(names)} of text)"
    )


def _rows(path: Path) -> list[Mapping[str, Any]]:
    import pandas as pd

    kind = path.suffix.lower()
    try:
        if kind == ".jsonl":
            return _json_rows(path)
        frame = pd.read_parquet(path) if kind == ".parquet" else pd.read_csv(path, dtype=str)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a table ({reason}): mend it") from None
    return frame.to_dict("records")  # type: ignore[return-value]


def _json_rows(path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, row {number} is no JSON ({error.msg}): mend it") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number} is no JSON object: give file and caption")
        rows.append(row)
    return rows
