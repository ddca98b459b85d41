"""Rules of VBench's long mode for one video: where clips begin, and how its two branches meet."""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction
from pathlib import PurePath

from mla_study.errors import UserError
from mla_study.evaluation.vbench.long.configs import Table

SHORTEST = 5.0
"""Seconds that a video should last for the long mode to say anything."""
NAN = float("nan")


def clips_of(
    frames: int, fps: Fraction | float, seconds: float, exact: bool
) -> list[tuple[int, int]]:
    """Where the clips of a part begin and end, in frames, half open.

    The last clip is moved back to full length, so it may overlap the one before. A part that is
    shorter than a clip is one clip.

    Args:
        exact: as upstream, which cuts the fractions of fps and seconds off. Otherwise a clip has
            the whole number of frames that is nearest to its length.

    Raises:
        UserError: upstream's rule gives clips of no frames.
    """
    if exact:
        size = int(fps) * int(seconds)
    else:
        size = max(1, math.floor(_fraction(fps) * _fraction(seconds) + Fraction(1, 2)))
    if size < 1:
        raise UserError(
            f"{seconds:g} s at {float(fps):g} frames a second: upstream's code cuts both down to "
            "whole numbers and gets clips of no frames; choose the corrected way"
        )
    if frames < size:
        return [(0, frames)]
    starts = [*range(0, frames - size + 1, size)]
    if frames % size:
        starts.append(frames - size)
    return [(start, start + size) for start in starts]


def mapped(score: float, table: Table) -> float:
    """Clip-to-clip score on the scale of in-clip scores: linear between the table's points.

    Below the first and above the last it is theirs.
    """
    place = bisect_left(table, score, key=lambda pair: pair[0])
    if place == 0:
        return table[0][1]
    if place == len(table):
        return table[-1][1]
    (x0, y0), (x1, y1) = table[place - 1], table[place]
    return y0 + (y1 - y0) * (score - x0) / (x1 - x0)


def fuse(
    in_clip: float, clip_to_clip: float, weights: tuple[float, float], table: Table, one_clip: bool
) -> tuple[float, float]:
    """(fused score, mapped clip-to-clip score).

    The in-clip score stands alone where there is one clip only, and, as upstream has it, where the
    mapped score is exactly 0.
    """
    if one_clip:
        return in_clip, NAN
    other = mapped(clip_to_clip, table)
    if other == 0.0:
        return in_clip, other
    return in_clip * weights[0] + other * weights[1], other


def part_of(clip: str) -> str:
    """Name of the part that a clip (its file's name without folder and ending) belongs to."""
    return clip.rpartition("_")[0]


def notes_of(
    name: str, frames: int, fps: Fraction | float, seconds: float, exact: bool
) -> list[str]:
    """Sentences on what is unusual about a video in long mode; none for most."""
    rate, notes = float(fps), list[str]()
    length = frames / rate
    if length < SHORTEST:
        notes.append(f"{name} lasts {length:.3g} s, less than the {SHORTEST:g} s of a long video")
    if frames and len(clips_of(frames, fps, seconds, exact)) == 1:
        notes.append(
            f"{name} makes a single clip of {seconds:g} s: its in-clip score stands alone, and it "
            "says nothing of change over time"
        )
    if exact and rate != int(rate):
        real = int(rate) * int(seconds) / rate
        notes.append(
            f"{name} plays at {rate:.4g} frames a second, which upstream's code takes for "
            f"{int(rate)}: its clips last {real:.4g} s instead of {int(seconds)} s"
        )
    if exact and "_" in PurePath(name).stem:
        notes.append(
            f"{name} has a '_' in its name, where upstream's code cuts it: it takes the video for "
            f"'{name.split('_')[0]}' and does not find its clip-to-clip score"
        )
    return notes


def _fraction(value: Fraction | float) -> Fraction:
    # a float stands for the rate or length that was meant: 29.97002997 for 30000/1001
    return value if isinstance(value, Fraction) else Fraction(value).limit_denominator(10_000)
