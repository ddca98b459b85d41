"""What the exact parser says of the frames that a figure shows of a video of the world."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from mla_study.errors import UserError
from mla_study.miniature.clips import frames_of
from mla_study.world.grammar import Caption, parse_caption
from mla_study.world.parser import longest_gap, parse
from mla_study.world.report import verdict_text
from mla_study.world.scenes import World


def verdict(row: Mapping[str, Any]) -> str:
    """The verdict on a row of :func:`mla_study.miniature.clips.clips_table`, from its own frames.

    Returns:
        "all correct", "no sprite", or which of the caption's words are wrong. '' where none can be
        given: the prompt is no caption of the world, the frames are not of its size or a multiple,
        or they are too few or too far apart in time for a speed to be told.
    """
    world, numbers = World(), [int(number) for number in row["frames"]]
    caption = _caption(str(row["prompt"]))
    gaps = [after - before for before, after in pairwise(numbers)]
    if caption is None or not gaps or max(gaps) > longest_gap(world):
        return ""
    frames = frames_of(row)
    count, height, width = frames.shape[:3]
    if height != width or height % world.size:
        return ""
    scale = height // world.size
    small = frames.reshape(count, world.size, scale, world.size, scale, 3).mean((2, 4)) / 255
    parsed = parse(small, world, signed=False, numbers=numbers)
    return verdict_text(parsed.facts[0], caption)


def _caption(prompt: str) -> Caption | None:
    try:
        return parse_caption(prompt)
    except UserError:
        return None
