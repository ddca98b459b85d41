"""Videos of the world in files: any that PyAV reads, animations, folders of PNG.

Shapes: F frames, H x W pixels in the file, S = the world's size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mla_study.errors import UserError
from mla_study.world.render import render
from mla_study.world.scenes import Scenes

if TYPE_CHECKING:
    from mla_study.rollout.sinks import Sink

_ANIMATIONS = (".webp", ".gif", ".png", ".apng")
_PIECE = 32


def read_video(path: Path | str, size: int) -> UInt8[Tensor, "1 F S S 3"]:
    """All frames of a video, scaled down to the world's size by the mean of each block.

    Args:
        path: an MP4 or another video, a WebP or GIF, a folder of PNG files, or ``name.png`` for
            the files name_000000.png ... that a rollout writes.
        size: rows and columns of the world.

    Raises:
        UserError: nothing that can be read, or frames whose size is no multiple of the world's.
    """
    path = Path(path)
    held = [_shrink(frames, size, path) for frames in _pieces(path)]
    if not held:
        raise UserError(f"{path} holds no frame: give another video")
    return torch.cat(held)[None]


def _pieces(path: Path) -> Iterator[UInt8[Tensor, "F H W 3"]]:
    names = _pictures(path)
    if names is not None:
        for name in names:
            yield from _animation(name)
    elif path.suffix.lower() in _ANIMATIONS:
        yield from _animation(path)
    else:
        from mla_study.rollout.clips import read_clip

        for piece in read_clip(path):
            yield piece[0]


def _pictures(path: Path) -> list[Path] | None:
    """The files of a folder of frames; None for a file."""
    if path.is_dir():
        found = sorted(path.glob("*.png"))
        if not found:
            raise UserError(f"the folder {path} holds no PNG file: give one that holds frames")
        return found
    if path.exists():
        return None
    own = re.compile(rf"{re.escape(path.stem)}_\d{{6,}}\.png")
    if path.suffix == ".png" and path.parent.is_dir():
        found = sorted(file for file in path.parent.iterdir() if own.fullmatch(file.name))
        if found:
            return found
    raise UserError(f"there is no video {path}: give a file, or a folder of PNG frames")


def _animation(path: Path) -> Iterator[UInt8[Tensor, "F H W 3"]]:
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield torch.from_numpy(np.array(frame.convert("RGB")))[None]
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}): give another") from None


def _shrink(frames: UInt8[Tensor, "F H W 3"], size: int, path: Path) -> UInt8[Tensor, "F S S 3"]:
    height, width = frames.shape[1:3]
    if height != width or height % size:
        raise UserError(
            f"{path} has frames of {width} x {height}, but the world's are square and {size} "
            "times a whole number: give another video, or its --size"
        )
    scale = height // size
    if scale == 1:
        return frames
    blocks = frames.reshape(len(frames), size, scale, size, scale, 3).float().mean((2, 4))
    return blocks.round().to(torch.uint8)


def write_clip(scenes: Scenes, path: Path, frames: int, scale: int, fps: float) -> None:
    """Render the one scene of a batch to a file, each pixel as a square of ``scale`` pixels.

    Raises:
        UserError: a file that cannot be written or a suffix that is not known.
    """
    from mla_study.model.codecs import to_uint8
    from mla_study.rollout.sinks import AnimationSink, FrameSink, Mp4Sink, check_place, kind_of

    kind, rate = kind_of(path), Fraction(fps).limit_denominator(1001)
    if kind == "latents":
        raise UserError(f"--out {path} asks for latents: give it .mp4, .png, .webp or .gif")
    check_place(path)
    sink: Sink
    if kind == "mp4":
        sink = Mp4Sink(path, rate)
    elif kind == "frames":
        sink = FrameSink(path)
    else:
        sink = AnimationSink(path, rate)
    for first in range(0, frames, _PIECE):
        video = to_uint8(render(scenes, min(_PIECE, frames - first), first))[0]
        big = video.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        sink.write(big.contiguous().numpy())
    sink.close(True)
