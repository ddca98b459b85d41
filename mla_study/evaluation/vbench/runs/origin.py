"""What the models were told and from which seeds, as far as anything says.

Three things may: the column ``told`` of a table of prompts, the records that ``vbench sample``
leaves beside its folder, and a file of longer prompts that the user names. Where they contradict
each other, the run is refused: a record must not be false for want of an option.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_study.checkpoints.formats.container import shown
from mla_study.errors import UserError, counted
from mla_study.evaluation.vbench.prompts import read_table, table_beside, text_sha256, told_by
from mla_study.evaluation.vbench.runs.protocol import Protocol, field_text
from mla_study.evaluation.vbench.runs.videos import Video
from mla_study.evaluation.vbench.sampling.records import TABLE, Records, read_records
from mla_study.study.runs import json_sha256


@dataclass(frozen=True)
class Origin:
    """Where the videos of a run are from.

    Attributes:
        extended: hash of the file of longer prompts, None where none is known of.
        records: of ``vbench sample``. table: the table of prompts.
        told: whether that table tells longer prompts.
    """

    extended: str | None
    records: Records | None
    table: Path | None
    told: bool


def origin_of(place: Path, prompts: Path | None, extended: Path | None) -> Origin:
    """What is known before any video is looked at.

    Args:
        place: the videos. prompts: the table of prompts, where it is not in the folder.
        extended: the file of longer prompts that the user names.

    Raises:
        UserError: the option, the records and the table contradict each other, or one cannot be
            read.
    """
    records = read_records(place)
    named = None if extended is None else text_sha256(extended)
    if records is not None and named is not None and named != records.extended:
        raise UserError(
            f"--extended {extended} is {_who(named)}, but {records.path} says that the model was "
            f"told {_who(records.extended)}: leave --extended out, or move the record away if it "
            "is of other videos"
        )
    table = prompts or (table_beside(place) if place.is_dir() else None)
    listed = {} if table is None else read_table(table)
    told = {name: row.told for name, row in listed.items() if row.told is not None}
    if records is not None:
        for name, text in told.items():
            row = records.videos.get(name)
            if row is not None and row.told != text:
                raise UserError(
                    f"{table} says that {shown(text, 60)} was told for {name}, "
                    f"{records.path.with_name(TABLE)} that it was {shown(row.told, 60)}: correct "
                    "the one that is wrong"
                )
    if extended is not None and told:
        lost = _strangers(extended, told)
        if lost:
            name, text = lost[0]
            raise UserError(
                f"{table} says that {shown(text, 60)} was told for {name}, which --extended "
                f"{extended} does not hold: leave --extended out, or correct the table"
            )
    whose = named or (records.extended if records is not None else None)
    longer = any(text != listed[name].prompt for name, text in told.items())
    return Origin(whose, records, table, longer)


def by_whom(origin: Origin) -> str:
    """Who wrote the longer prompts, as far as anything says."""
    if origin.extended is None and origin.told and origin.table is not None:
        return f"unknown: the column told of {origin.table.name}"
    return told_by(origin.extended)


def texts_told(origin: Origin, seen: Sequence[Video]) -> dict[str, str]:
    """Prompt -> hash of what was told for it; empty where only the prompts themselves were."""
    texts: dict[str, set[str]] = {}
    for video in seen:
        if video.prompt is None:
            continue
        row = origin.records.videos.get(video.name) if origin.records is not None else None
        told = video.told
        if told is None and row is not None and row.told != row.prompt:
            told = row.told
        texts.setdefault(video.prompt, set()).add(told or video.prompt)
    if all(held == {prompt} for prompt, held in texts.items()):
        return {}
    return {
        prompt: hashlib.sha256("\n".join(sorted(held)).encode()).hexdigest()[:16]
        for prompt, held in sorted(texts.items())
    }


def told_sha256(texts: Mapping[str, str]) -> str | None:
    """One hash of :func:`texts_told`; None where only the prompts themselves were told."""
    return json_sha256(texts) if texts else None


def sampling_facts(origin: Origin, seen: Sequence[Video]) -> dict[str, Any] | None:
    """For the run record: what ``vbench sample`` recorded, with the seed of each video.

    A video whose content is not what was sampled has no seed: it was made anew, nobody knows how.
    """
    records = origin.records
    if records is None:
        return None
    rows = {video.name: records.videos.get(video.name) for video in seen}
    seeds = {
        video.name: row.seed
        for video in seen
        if (row := rows[video.name]) is not None and row.sha256 == video.sha256
    }
    return {
        "prompts": records.prompts, "known_as": records.known_as, "extended": records.extended,
        "extended_by": records.extended_by, "seed": records.seed, "seeds": seeds,
        "other_content": sum(row is not None for row in rows.values()) - len(seeds),
    }  # fmt: skip


def seeds_text(observed: Mapping[str, Any]) -> str:
    """The seeds of a run record's ``observed``, as people read them; '' where none is known.

    >>> seeds_text({"sampling": {"seed": 0, "seeds": {"a.mp4": 7, "b.mp4": 3}}})
    'seeds of 2 videos, 3 to 7, from base seed 0'
    """
    sampling = observed.get("sampling") or {}
    seeds = sorted(sampling.get("seeds", {}).values())
    if not seeds:
        return ""
    of = f"{seeds[0]}" if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]}"
    other = sampling.get("other_content")
    lost = f"; {other} were changed since they were sampled, and have none" if other else ""
    return f"seeds of {counted(len(seeds), 'video')}, {of}, from base seed {sampling['seed']}{lost}"


def told_text(protocol: Protocol, observed: Mapping[str, Any]) -> str:
    """What the models were told, as people read it.

    Args:
        observed: of the run record. Without ``vbench sample``'s word nobody vouches for short ones.
    """
    texts = "" if protocol.told is None else f", texts {field_text(protocol.told)}"
    if protocol.extended_by == told_by(None):
        sure = "" if texts or observed.get("sampling") else ", as far as is known"
        return f"told the short prompts{texts}{sure}"
    return f"told longer prompts ({protocol.extended_by}{texts})"


def _who(sha256: str | None) -> str:
    return "the short prompts" if sha256 is None else f"{told_by(sha256)} ({sha256[:12]})"


def _strangers(extended: Path, told: Mapping[str, str]) -> list[tuple[str, str]]:
    """The files, with their texts, whose text a file of longer prompts does not hold."""
    try:
        held = extended.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{extended} cannot be read as a file of prompts: {error}") from None
    lines = {line.strip() for line in held.split("\n")}
    return [
        (name, text)
        for name, text in told.items()
        if text.strip() not in lines
        and not any(json.dumps(text, ensure_ascii=plain) in held for plain in (True, False))
    ]
