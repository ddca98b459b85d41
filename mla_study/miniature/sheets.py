"""Pictures and videos of a study for people: all variants and prompts side by side.

Shapes: V variants (rows), P prompts (columns), F frames, H = W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from mla_study.config import mini
from mla_study.miniature.clips import even, shown_nodes, videos_of
from mla_study.miniature.plan import Node, Plan
from mla_study.miniature.store import Store
from mla_study.study.runs import atomic_write

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

SCALE = 5
SHEET_FRAMES = 8
_SHEET_SCALE = 2
_LEFT, _ABOVE, _GAP, _TYPE = 118, 58, 6, 12
_PIECE = 48


def write_videos(plan: Plan, store: Store, folder: Path) -> list[Path]:
    """A contact sheet and an MP4 for each stage and length: ``dmd-10x.png``, ``dmd-10x.mp4`` ...

    The teacher stands first where videos are as long as its own.

    Args:
        folder: made if absent; files of the same names are replaced.

    Raises:
        UserError: frames are missing, or the folder cannot be written.
    """
    written: list[Path] = []
    nodes = shown_nodes(plan)
    teacher = [node for node in nodes if node.about["stage"] == "teacher"]
    kinds = {(str(n.about["stage"]), int(n.about["clips"])) for n in nodes if n not in teacher}
    for stage, clips in sorted(kinds):
        mine = [n for n in nodes if (n.about["stage"], n.about["clips"]) == (stage, clips)]
        both = [n for n in teacher if n.about["clips"] == clips] + mine
        found = [videos_of(plan, store, node) for node in both]
        prompts, labels = found[0][0], [label_of(node) for node in both]
        videos = np.stack([frames for _, frames in found])
        stem = folder / f"{stage}-{clips}x"
        atomic_write(stem.with_suffix(".png"), partial(_sheet, videos, labels, prompts))
        atomic_write(stem.with_suffix(".mp4"), partial(_film, videos, labels, prompts))
        written += [stem.with_suffix(".png"), stem.with_suffix(".mp4")]
    return written


def label_of(node: Node) -> str:
    """``teacher``, ``dense`` or ``latent, INIT``."""
    variant = str(node.about["variant"])
    return f"latent, {node.about['init']}" if variant == "latent" else variant


def _sheet(
    videos: UInt8[np.ndarray, "V P F H W 3"],
    labels: Sequence[str],
    prompts: Sequence[str],
    to: Path,
) -> None:
    """Frames at even times of each video, from left to right."""
    from PIL import Image

    times = even(videos.shape[2], SHEET_FRAMES)
    apart = np.full((*videos.shape[:2], videos.shape[3], 1, 3), 255, np.uint8)
    parts = [part for n in times for part in (videos[:, :, n], apart)][:-1]
    strips = np.concatenate(parts, axis=3)
    grid = _Grid(labels, prompts, strips.shape[2], strips.shape[3], _SHEET_SCALE)
    Image.fromarray(grid.filled(strips)).save(to)


def _film(
    videos: UInt8[np.ndarray, "V P F H W 3"],
    labels: Sequence[str],
    prompts: Sequence[str],
    to: Path,
) -> None:
    """All videos at once, their pixels as squares."""
    from mla_study.rollout.sinks import Mp4Sink

    grid = _Grid(labels, prompts, videos.shape[3], videos.shape[4], SCALE)
    sink = Mp4Sink(to, Fraction(mini().fps))
    try:
        for first in range(0, videos.shape[2], _PIECE):
            piece = videos[:, :, first : first + _PIECE]
            sink.write(np.stack([grid.filled(piece[:, :, n]) for n in range(piece.shape[2])]))
    finally:
        sink.close(True)


class _Grid:
    """A picture with a name before each row and a prompt above each column."""

    def __init__(
        self, labels: Sequence[str], prompts: Sequence[str], height: int, width: int, scale: int
    ) -> None:
        from PIL import Image, ImageDraw

        self.scale = scale
        self.tall, self.wide = height * scale + _GAP, width * scale + _GAP
        # encoders take even sizes
        rows = (_ABOVE + self.tall * len(labels) + 1) // 2 * 2
        columns = (_LEFT + self.wide * len(prompts) + 1) // 2 * 2
        blank = Image.new("RGB", (columns, rows), "white")
        pen, font = ImageDraw.Draw(blank), _font()
        for row, label in enumerate(labels):
            middle = _ABOVE + row * self.tall + height * scale // 2
            pen.multiline_text(
                (4, middle), label.replace(", ", ",\n"), "black", font, anchor="lm", spacing=1
            )
        letters = max(8, int(self.wide / (0.56 * _TYPE)))
        for column, prompt in enumerate(prompts):
            told = "\n".join(textwrap.wrap(prompt, letters)[:4])
            place = (_LEFT + column * self.wide, _ABOVE - 4)
            pen.multiline_text(place, told, "black", font, anchor="ld", spacing=1)
        self.blank = np.asarray(blank)

    def filled(self, pictures: UInt8[np.ndarray, "V P h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """The picture with these in its cells."""
        made = self.blank.copy()
        for row, across in enumerate(pictures):
            for column, picture in enumerate(across):
                big = picture.repeat(self.scale, 0).repeat(self.scale, 1)
                y, x = _ABOVE + row * self.tall, _LEFT + column * self.wide
                made[y : y + len(big), x : x + big.shape[1]] = big
        return made


def _font() -> ImageFont | FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(_TYPE)
