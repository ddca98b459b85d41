"""A long video judged in windows of the training length.

In each of them the true sprite moves as the caption says from where the sprite was first seen
there, so that overlap and velocity tell what a window shows by itself; how far the sprite has
strayed from its path since the start is ``phase_error``.

Shapes: B videos, F frames, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.world.fitting import apart
from mla_study.world.grammar import Caption
from mla_study.world.parser import as_pixels, parse
from mla_study.world.scenes import Scenes, World, velocities
from mla_study.world.score import Scores, compare

PLACE = ("row", "column")
"""Slots that only the first window can show."""


def windows(
    video: Float[Tensor, "B 3 F H W"], captions: Sequence[Caption], world: World
) -> list[Scores]:
    """Scores of each window of the training length."""
    found: list[Scores] = []
    for start in range(0, video.shape[2], world.frames):
        parsed = parse(video[:, :, start : start + world.frames], world)
        seen, where = parsed.seen.cpu(), parsed.where.cpu()
        first = seen.float().argmax(1)
        rows = torch.arange(len(captions))
        speed = velocities(world, captions)
        origin = where[rows, first] - first[:, None] * speed
        found.append(compare(parsed, captions, Scenes(world, tuple(captions), origin)))
    return found


def records(
    found: Sequence[Scores], captions: Sequence[Caption], world: World
) -> list[dict[str, Any]]:
    """A row a video and window: what is shown (True or False), and how well.

    ``all_correct`` of a later window leaves out the place; ``phase_error`` is that of the window's
    last frame on the path that the first window began, in pixels, NaN where nothing is seen.
    """
    speed = velocities(world, captions)
    origin = None
    rows: list[dict[str, Any]] = []
    for index, scores in enumerate(found):
        parsed = scores.parsed
        where, seen = parsed.where.cpu(), parsed.seen.cpu()
        if origin is None:
            origin = where[:, 0]
        last = (index + 1) * world.frames - 1
        true = origin + last * speed
        stray = apart(where[:, -1] - true, world.size).norm(dim=-1)
        stray = stray.masked_fill(~(seen[:, -1] & found[0].parsed.seen[:, 0].cpu()), float("nan"))
        shown = {s: v for s, v in scores.correct.items() if index == 0 or s not in PLACE}
        everything = torch.stack(list(shown.values())).all(0)
        for video in range(len(captions)):
            rows.append(
                {"window": index}
                | {slot: bool(values[video]) for slot, values in shown.items()}
                | {
                    "all_correct": bool(everything[video]),
                    "has_sprite": bool(scores.has_sprite[video]),
                    "iou": float(scores.iou[video]),
                    "velocity_error": float(scores.velocity_error[video]),
                    "colour_kept": float(scores.colour_kept[video]),
                    "phase_error": float(stray[video]),
                }
            )
    return rows


def by_windows(video: Tensor, caption: Caption, world: World) -> dict[str, Any] | None:
    """What the windows of one video say together, as plain values; None where there is but one.

    Args:
        video: [1, F, H, W, 3]; frames after the last whole window are left out.

    Returns:
        ``frames`` of a window, ``count``, means over windows of ``iou`` and of ``all_correct``
        (later windows leave out the place), ``phase_error_last`` in pixels, None where no sprite
        is seen in the last frame or in the first.
    """
    count = video.shape[1] // world.frames
    if count < 2:
        return None
    whole = as_pixels(video)[:, : count * world.frames].permute(0, 2, 1, 3, 4)
    rows = records(windows(whole, [caption], world), [caption], world)
    last = rows[-1]["phase_error"]
    return {
        "frames": world.frames,
        "count": count,
        "iou": sum(row["iou"] for row in rows) / count,
        "all_correct": sum(row["all_correct"] for row in rows) / count,
        "phase_error_last": last if last == last else None,
    }


def windows_text(windowed: dict[str, Any]) -> str:
    """A line of :func:`by_windows`."""
    last = windowed["phase_error_last"]
    strayed = "unknown" if last is None else f"{last:.2f} px"
    return (
        f"in {windowed['count']} windows of {windowed['frames']} frames, as the study judges long "
        "videos (the true path begins anew in each, where the sprite is first seen): IoU "
        f"{windowed['iou']:.3f}, all correct in {windowed['all_correct']:.0%}; strayed from the "
        f"first window's path by {strayed} at the end"
    )
