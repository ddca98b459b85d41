"""Which videos of a prompt the protocol looks at, and what is missing of them.

VBench looks at the videos ``{prompt}-0`` to ``{prompt}-4`` of each prompt of a dimension, and at 25
before the static filter of temporal flickering. A set is complete prompt by prompt: many videos of
one say nothing of another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from mla_study.evaluation.vbench.dimensions import DIMENSIONS, SAMPLES
from mla_study.evaluation.vbench.prompts import Entry
from mla_study.evaluation.vbench.runs.videos import Problem, Video

Wanted = Mapping[str, int]
"""Prompt -> number of its videos."""


def place_of(video: Video) -> int:
    """Which of its prompt's videos it is; one without a number is the first."""
    return video.index or 0


def without_doubles(videos: Iterable[Video]) -> tuple[list[Video], list[Problem]]:
    """One video for each prompt and index, with a problem for each that is left out.

    Of several the one that bears VBench's own name stays, else the first.
    """
    held: dict[tuple[str, int], Video] = {}
    kept, problems = list[Video](), list[Problem]()
    for video in sorted(videos, key=lambda v: v.name != f"{v.prompt}-{v.index}.mp4"):
        if video.prompt is None:
            kept.append(video)
            continue
        first = held.setdefault((video.prompt, place_of(video)), video)
        if first is video:
            kept.append(video)
        else:
            what = f"is video {place_of(video)} of its prompt, as {first.name} is: left out"
            problems.append(Problem(video.name, what, False))
    return sorted(kept, key=lambda video: video.path), problems


def taken(videos: Iterable[Video], wanted: Wanted) -> list[Video]:
    """Those that the protocol looks at: of each prompt as many as are wanted, from index 0."""
    return [video for video in videos if place_of(video) < wanted.get(video.prompt or "", 0)]


def lack(videos: Iterable[Video], wanted: Wanted) -> str:
    """A clause on the prompts that have fewer videos than are wanted; empty if none has.

    >>> lack([], {"a cat": 5, "rain": 5})
    '2 of 2 prompts lack videos'
    """
    held = _held(videos)
    short = sum(len(held.get(prompt, ())) < count for prompt, count in wanted.items())
    return f"{short} of {len(wanted)} prompts lack videos" if short else ""


def absent(videos: Iterable[Video], wanted: Wanted, suite: Mapping[str, Entry]) -> list[Problem]:
    """What a set of prompts lacks, and what is there and no part of it.

    Args:
        wanted: of the dimensions that are asked for. suite: all prompts, which are no strays.
    """
    videos = list(videos)
    held = _held(taken(videos, wanted))
    problems = list[Problem]()
    for prompt, count in wanted.items():
        mine = held.get(prompt, set())
        if not mine:
            problems.append(Problem(prompt, f"no video of this prompt ({count} wanted)", False))
        elif len(mine) < count:
            lost = ranges(place for place in range(count) if place not in mine)
            what = f"{len(mine)} of {count} videos of this prompt, without index {lost}"
            problems.append(Problem(prompt, what, False))
    for video in videos:
        entry = suite.get(video.prompt or "")
        if entry is None:
            whose = (
                "it has no prompt" if video.prompt is None else "its prompt is none of the suite"
            )
            problems.append(Problem(video.name, f"{whose}: left out", False))
        elif place_of(video) >= (most := _most(entry.dimensions)):
            what = f"its index is beyond the {most} videos of a prompt that are looked at: left out"
            problems.append(Problem(video.name, what, False))
    return problems


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in a few words.

    >>> ranges([3, 5, 6, 7, 9])
    '3, 5 to 7, 9'
    """
    runs = list[list[int]]()
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def _held(videos: Iterable[Video]) -> dict[str, set[int]]:
    held: dict[str, set[int]] = {}
    for video in videos:
        held.setdefault(video.prompt or "", set()).add(place_of(video))
    return held


def _most(dimensions: Collection[str]) -> int:
    return max((DIMENSIONS[d].samples for d in dimensions if d in DIMENSIONS), default=SAMPLES)
