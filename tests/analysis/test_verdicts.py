"""Verdicts on rows of frames: right where they can be given, none where they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis.verdicts import verdict
from mla_study.miniature.clips import clip_row, even
from mla_study.world.render import render
from mla_study.world.scenes import World, sample_scenes


def clip(seed: int, frames: int = 12, size: int = 24) -> tuple[str, np.ndarray]:
    """A caption and the video that shows it, uint8 [F, H, W, 3]."""
    scenes = sample_scenes(World(size), 1, seed % 2**31)
    pixels = render(scenes, frames)[0].add(1).mul(127.5).round().byte()
    return str(scenes.captions[0]), pixels.permute(1, 2, 3, 0).contiguous().numpy()


def row(prompt: str, video: np.ndarray, kept: int = 6) -> dict[str, Any]:
    numbers = even(len(video), kept)
    return clip_row({"run": "r"}, prompt, 8.0, numbers, video[numbers])


def test_the_frames_shown_are_judged(seed: int) -> None:
    prompt, video = clip(seed)
    assert verdict(row(prompt, video)) == "all correct"
    assert verdict(row(prompt.capitalize(), video.repeat(4, 1).repeat(4, 2))) == "all correct"
    speed, _, others = prompt.partition(" ")
    other = {"slow": "fast", "fast": "slow"}[speed]
    assert verdict(row(f"{other} {others}", video)) == "speed wrong"
    assert verdict(row(prompt, np.full_like(video, 255))) == "no sprite, background wrong"


@pytest.mark.parametrize(
    ("prompt", "frames", "kept", "size"),
    [
        ("a kite over the sea", 12, 6, 24), (None, 120, 8, 24), (None, 12, 1, 24),
        (None, 12, 6, 32),
    ],
)  # fmt: skip
def test_no_verdict_is_made_up(
    prompt: str | None, frames: int, kept: int, size: int, seed: int
) -> None:
    own, video = clip(seed, frames, size)
    assert verdict(row(prompt or own, video, kept)) == ""
    if size == 24:
        assert verdict(row(own, video[:, :12], min(kept, 6))) == ""
