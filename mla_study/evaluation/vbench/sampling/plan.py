"""Which videos are to be sampled: prompts, what the model is told, file names and seeds.

A video is named ``{prompt}-{index}.mp4`` by its short prompt, also where the model is told a longer
one. Its seed follows from the base seed, the prompt and the index alone, so that neither the number
of processes nor the choice of prompts changes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, SAMPLES, SUBSTITUTES, choose
from mla_study.evaluation.vbench.prompts import INFO, text_sha256, told_by

FLICKER = "temporal_flickering"
LINES = 946
"""Of VBench's list; two prompts stand in it twice."""
MINI_COUNT, MINI_SAMPLES = 8, 2
_LONGEST = 240  # bytes of a name, which file systems limit to 255


@dataclass(frozen=True)
class Line:
    """A prompt, what the model is told for it, and VBench's dimensions that look at its videos."""

    prompt: str
    told: str
    dimensions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PromptSet:
    """A list of prompts.

    Attributes:
        sha256: of the file that they come from, of VBench's list as all_dimension.txt has it; of
            all captions for ``mini``, however many are drawn.
        extended_sha256: of the file of longer prompts; None where the short ones are told.
    """

    name: str
    lines: tuple[Line, ...]
    sha256: str
    extended_sha256: str | None = None

    @property
    def extended_by(self) -> str:
        """Who wrote the longer prompts, as far as the file's hash says."""
        return told_by(self.extended_sha256)


@dataclass(frozen=True)
class Sample:
    """A video to be made."""

    prompt: str
    told: str
    index: int
    seed: int
    file: str


def prompt_set(
    name: str, extended: Path | None, vbench: Path | None, count: int | None, seed: int
) -> PromptSet:
    """The prompts that a name or file stands for.

    Args:
        name: ``mini``, ``vbench``, ``vbench-extended``, or a file with a prompt a line.
        extended: file with what the model is told, line by line.
        vbench: folder of VBench's package, which holds its list; None where it is not asked for.
        count: take the first ones only (of ``mini``: draw so many).
        seed: of the captions of ``mini``.

    Raises:
        UserError: a file that cannot be read, or lines that do not go with each other.
    """
    if count is not None and count < 1:
        raise UserError(f"--count is {count}, but it must be at least 1")
    if name == "vbench-extended" and extended is None:
        raise UserError(
            "--prompts vbench-extended needs --extended FILE with the longer prompts, line by line "
            "as in VBench's all_dimension.txt: VBench's repository has such files"
        )
    if name in ("vbench", "mini") and extended is not None:
        other = "vbench-extended" if name == "vbench" else "a file"
        raise UserError(f"--prompts {name} tells its own prompts: with --extended, give {other}")
    if name == "mini":
        return _mini(MINI_COUNT if count is None else count, seed)
    if name in ("vbench", "vbench-extended"):
        if vbench is None:
            raise UserError("VBench's prompts need its environment: make setup-vbench")
        prompts, sets, sha256 = _suite(vbench / INFO)
    else:
        prompts, sha256 = read_lines(Path(name)), text_sha256(Path(name))
        sets = [frozenset[str]()] * len(prompts)
    told, extended_sha256 = prompts, None
    if extended is not None:
        told, extended_sha256 = read_lines(extended), text_sha256(extended)
        if len(told) != len(prompts):
            raise UserError(
                f"{extended} has {len(told)} prompts, but {len(prompts)} are wanted, one for each "
                f"line of {'all_dimension.txt' if name == 'vbench-extended' else name}"
            )
    lines = [Line(*line) for line in zip(prompts, told, sets, strict=True)]
    return PromptSet(name, tuple(_once(lines))[:count], sha256, extended_sha256)


def read_lines(path: Path) -> list[str]:
    """The prompts of a file, a line each.

    Raises:
        UserError: it cannot be read, is empty, or has an empty line among the others.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a file of prompts: {error}") from None
    # not splitlines: a prompt may hold an unusual separator
    found = [line.strip() for line in text.rstrip().split("\n")]
    if not text.strip():
        raise UserError(f"{path} holds no prompt: give one a line")
    if not all(found):
        raise UserError(f"{path}, line {found.index('') + 1} is empty: give a prompt a line")
    return found


def _suite(path: Path) -> tuple[list[str], list[frozenset[str]], str]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        prompts = [str(row["prompt_en"]) for row in rows]
        sets = [frozenset(map(str, row["dimension"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as VBench's list of prompts ({error}): make setup-vbench"
        ) from None
    if len(prompts) != LINES:
        raise UserError(f"{path} has {len(prompts)} prompts in place of {LINES}: make setup-vbench")
    return prompts, sets, _sha256(prompts)


def _mini(count: int, seed: int) -> PromptSet:
    """Captions of the world, all unlike."""
    from mla_study.world.grammar import all_captions, sample_captions

    known = len(all_captions())
    if count > known:
        raise UserError(f"--count is {count}, but the world has {known} captions")
    # more of them change none of the earlier ones
    found: dict[str, None] = {}
    drawn = count
    while len(found) < count:
        found = dict.fromkeys(str(caption) for caption in sample_captions(drawn, seed))
        drawn *= 2
    texts = list(found)[:count]
    whole = _sha256([str(caption) for caption in all_captions()])
    return PromptSet("mini", tuple(Line(text, text) for text in texts), whole)


def _sha256(lines: Iterable[str]) -> str:
    """Of a file with these lines."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def _once(lines: Iterable[Line]) -> list[Line]:
    """Each prompt once: the first text that is told for it, the dimensions of all its lines."""
    found: dict[str, Line] = {}
    for line in lines:
        held = found.get(line.prompt, line)
        found[line.prompt] = Line(line.prompt, held.told, held.dimensions | line.dimensions)
    return list(found.values())


def samples(
    prompts: PromptSet,
    dimensions: Sequence[str] = (),
    each: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """The videos that are wanted.

    Args:
        dimensions: take only prompts that these need (names or groups, substitutes too).
        each: videos a prompt; by default 5, of temporal flickering's prompts 25, of ``mini`` 2.
        seed: base of all seeds.

    Raises:
        UserError: unknown dimensions, dimensions of other prompts than VBench's, no video at all.
    """
    if each is not None and each < 1:
        raise UserError(f"--samples is {each}, but it must be at least 1")
    lines: Sequence[Line] = prompts.lines
    if dimensions:
        wanted = {SUBSTITUTES.get(name, name) for name in choose(dimensions)}
        extras = sorted(wanted - set(DIMENSIONS))
        if extras:
            raise UserError(f"{', '.join(extras)} take any video: name dimensions of VBench's")
        if not any(line.dimensions for line in lines):
            raise UserError("--dimensions chooses among VBench's prompts: leave it out")
        lines = [line for line in lines if line.dimensions & wanted]
        if not lines:
            raise UserError("none of these prompts is needed by --dimensions: raise --count")
    made: list[Sample] = []
    for number, line in enumerate(lines):
        usual = MINI_SAMPLES if prompts.name == "mini" else SAMPLES
        if FLICKER in line.dimensions:
            usual = DIMENSIONS[FLICKER].samples
        for index in range(usual if each is None else each):
            name = file_name(line.prompt, index, number)
            made.append(
                Sample(line.prompt, line.told, index, seed_of(seed, line.prompt, index), name)
            )
    return made


def file_name(prompt: str, index: int, number: int) -> str:
    """``{prompt}-{index}.mp4``; of a prompt that no file can be named by, its number's name.

    None of VBench's needs that: those of others may hold a slash, or more bytes than a name has.
    """
    unfit = "/" in prompt or "\0" in prompt or prompt.startswith(".")
    if unfit or len(prompt.encode()) > _LONGEST:
        return f"prompt {number:04d}-{index}.mp4"
    return f"{prompt}-{index}.mp4"


def seed_of(base: int, prompt: str, index: int) -> int:
    """The seed of a video, from 0 to 2^31 - 1."""
    digest = hashlib.sha256(f"{base}/{index}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def shard_of(wanted: Sequence[Sample], index: int, count: int) -> list[Sample]:
    """The videos of every ``count``-th prompt from the ``index``-th."""
    order = {prompt: place for place, prompt in enumerate(dict.fromkeys(s.prompt for s in wanted))}
    return [sample for sample in wanted if order[sample.prompt] % count == index]


def parse_shard(text: str | None) -> tuple[int, int]:
    """``0/4`` as (0, 4); without a text the rank's own under torchrun, else all.

    Raises:
        UserError: not of that form.
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    index, slash, count = text.partition("/")
    if not slash or not index.isdigit() or not count.isdigit() or int(index) >= int(count):
        raise UserError(f"--shard {text}: give I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)
