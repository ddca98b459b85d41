"""Sample the videos that VBench scores: named its way, resumable, by any number of processes.

The folder holds videos and nothing else, as VBench's own code wants it. What is known of them lies
beside it in ``NAME.sampling``: ``samples.csv``, a row a video (prompt, what was told, index, seed,
file, frames, frames a second, hashes of the weights, the file and the latents), and
``sampling.json``, how they were made. A video has its final name only when it is whole and its row
is written.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.prompts import told_by
from mla_study.evaluation.vbench.sampling.plan import PromptSet, Sample, shard_of
from mla_study.evaluation.vbench.sampling.records import RECORD, TABLE, records_of
from mla_study.evaluation.vbench.sampling.sampler import CODEC, Recipe, Sampler, Say
from mla_study.study.runs import atomic_write, file_sha256, run_record

_ENCODED = 32  # prompts that the text encoder, which is loaded anew each time, gets at once
_EVERY = 10.0  # seconds between lines of progress


@dataclass(frozen=True)
class Row:
    """A finished video, as in samples.csv."""

    prompt: str
    told: str
    index: int
    seed: int
    file: str
    frames: int
    fps: str
    checkpoint: str
    sha256: str
    latents: str


@dataclass(frozen=True)
class Sampled:
    """What a call did: videos of its share that are there, how many it made, and where."""

    there: int
    made: int
    folder: Path
    records: Path


def sample(
    prompts: PromptSet,
    wanted: Sequence[Sample],
    recipe: Recipe,
    folder: Path,
    *,
    base: int = 0,
    shard: tuple[int, int] = (0, 1),
    say: Say,
    sampler: Callable[[Recipe, Say], Sampler] = Sampler,
) -> Sampled:
    """Make the videos of ``wanted`` that are not there yet.

    Args:
        base: the seed that the videos' seeds follow from, for the record.
        shard: (index, count) of this process' share.
        sampler: builds the model.

    Raises:
        UserError: the folder holds videos that were made otherwise, another process makes the same
            share, or something that the recipe names does not suit.
        KeyboardInterrupt: what is finished stays and is recorded.
    """
    records = records_of(folder)
    mine = shard_of(wanted, *shard)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        records.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another --out") from None
    name = f"{shard[0]}-of-{shard[1]}"
    with _alone(records / f".{name}.lock", f"share {shard[0]}/{shard[1]} of {folder}"):
        known = {row.file: row for row in _rows(records)}
        to_do = [s for s in mine if s.file not in known or not (folder / s.file).is_file()]
        studio = sampler(recipe, say)
        studio.check([s.told for s in wanted])
        _begin(records, prompts, wanted, studio, base)
        _agree(mine, known, folder)
        kept = len(mine) - len(to_do)
        if kept:
            say(f"{kept} of {len(mine)} videos are there already")
        progress = _Progress(len(to_do), say)
        partial = records / f".{name}.mp4"
        try:
            for video, told in _told(to_do, studio):
                made = studio.make(told, video.seed, partial)
                row = Row(
                    **asdict(video), frames=made.frames, fps=str(studio.fps),
                    checkpoint=studio.digest, sha256=file_sha256(partial), latents=made.latents,
                )  # fmt: skip
                # first the row: a video under its final name is always told of
                _append(records / f"rows-{name}.jsonl", row)
                partial.replace(folder / video.file)
                progress.step()
        finally:
            partial.unlink(missing_ok=True)
            _join(records, folder, wanted)
    return Sampled(len(mine), len(to_do), folder, records)


def _told(to_do: Sequence[Sample], studio: Sampler) -> Generator[tuple[Sample, Any], None, None]:
    """Each video with the embedding [1, T, E] of what is told for it."""
    texts = list(dict.fromkeys(video.told for video in to_do))
    for start in range(0, len(texts), _ENCODED):
        some = texts[start : start + _ENCODED]
        rows = dict(zip(some, studio.encode(some).split(1), strict=True))
        for video in to_do:
            if video.told in rows:
                yield video, rows[video.told]


def _begin(
    records: Path, prompts: PromptSet, wanted: Sequence[Sample], studio: Sampler, base: int
) -> None:
    """Write sampling.json, or see that what it says is how these videos are made too."""
    inputs = {"prompts": prompts.sha256, "weights": studio.digest}
    if prompts.extended_sha256 is not None:
        inputs["extended"] = prompts.extended_sha256
    config = studio.facts()
    path = records / RECORD
    if path.exists():
        _same(path, {"config": config, "inputs": inputs, "seed": base})
        return
    place = studio.recipe.checkpoint
    observed = {
        "checkpoint": place or "the shipped miniature",
        "checkpoint_sha256": file_sha256(place) if place and Path(place).is_file() else None,
        "device": studio.recipe.device,
        "codec": CODEC,
        "videos": len(wanted),
    }
    record = run_record(
        config=config, inputs=inputs, seed=base,
        modules=["mla_study.evaluation.vbench.sampling.sample"], provenance="measured",
        validity="full", observed=observed,
    )  # fmt: skip
    record["prompts"] = {
        "from": Path(prompts.name).name, "known_as": told_by(prompts.sha256),
        "extended_by": prompts.extended_by,
    }  # fmt: skip
    atomic_write(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def _same(path: Path, now: dict[str, Any]) -> None:
    from mla_study.rollout.resume import differences

    try:
        held = json.loads(path.read_text(encoding="utf-8"))["identity"]
        saved = {name: held[name] for name in now}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): sample into a new folder") from None
    unlike = differences(saved, json.loads(json.dumps(now)))
    if unlike:
        raise UserError(
            f"the videos that are there were made otherwise ({'; '.join(unlike)}): sample into a "
            "new folder"
        )


def _agree(wanted: Iterable[Sample], known: dict[str, Row], folder: Path) -> None:
    """See that a finished video is the one that is wanted under its name."""
    for video in wanted:
        row = known.get(video.file) if (folder / video.file).exists() else None
        if row is not None and (row.told, row.seed) != (video.told, video.seed):
            raise UserError(
                f"{video.file} is there already, of another text or seed: sample into a new folder"
            )


def _rows(records: Path) -> list[Row]:
    """All rows that any process wrote; a line cut off by a kill is left out."""
    names, found = {field.name for field in fields(Row)}, list[Row]()
    for path in sorted(records.glob("rows-*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                held = json.loads(line)
            except ValueError:
                continue
            if isinstance(held, dict) and held.keys() == names:
                found.append(Row(**held))
    return found


def _append(path: Path, row: Row) -> None:
    """Add a row; after a cut-off line it starts on a line of its own."""
    text = json.dumps(asdict(row), ensure_ascii=False)
    try:
        with path.open("ab") as file:
            if file.tell():
                with path.open("rb") as before:
                    before.seek(-1, os.SEEK_END)
                    text = text if before.read() == b"\n" else f"\n{text}"
            file.write(f"{text}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): free some space") from None


def _join(records: Path, folder: Path, wanted: Sequence[Sample]) -> None:
    """Write samples.csv anew: all finished videos of all processes, in the order of the prompts."""
    with (records / ".join.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        order = {video.file: place for place, video in enumerate(wanted)}
        there = {row.file: row for row in _rows(records) if (folder / row.file).is_file()}
        rows = sorted(
            there.values(), key=lambda row: (order.get(row.file, len(order)), row.prompt, row.index)
        )
        text = io.StringIO()
        table = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
        atomic_write(records / TABLE, text.getvalue().encode())


@contextmanager
def _alone(path: Path, what: str) -> Generator[None, None, None]:
    """Hold a lock that ends with the process, however that ends."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process makes {what}: give each its own --shard") from None
        yield


class _Progress:
    """How far it has come, and how long it will take; a line every ten seconds, and the last."""

    def __init__(self, total: int, say: Say) -> None:
        self._total, self._say, self._done = total, say, 0
        self._start = self._told = time.monotonic()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._told < _EVERY and self._done < self._total:
            return
        self._told = now
        left = (now - self._start) / self._done * (self._total - self._done)
        rest = f"{spell_time(left)} left" if self._done < self._total else "finished"
        self._say(f"{self._done} of {self._total} videos, {rest}")


def spell_time(seconds: float) -> str:
    """A length of time for people.

    >>> spell_time(5), spell_time(130), spell_time(8000)
    ('5 s', '2 min 10 s', '2 h 13 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
