"""Frames of a video file, in pieces and at the size that the VAE takes.

Shapes: n frames of a piece, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mla_study.errors import UserError
from mla_study.model.codecs import from_uint8

_PIECE = 16
_MULTIPLE = 16  # VAE stride 8, patches of 2


def read_clip(
    path: str | Path, limit: int | None = None, piece: int = _PIECE, fps: float | None = None
) -> Iterator[UInt8[Tensor, "1 n H W 3"]]:
    """RGB frames of a video, at most ``piece`` at a time, all in the size of the first.

    Args:
        limit: frames to give at most.
        fps: frames a second to give, each the nearest in time of the video's; None gives all.

    Raises:
        UserError: PyAV is absent, or the file is no video that it reads.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise UserError("reading video needs the package av: pip install av") from None
    held: list[np.ndarray] = []
    total = 0
    try:
        with av.open(str(path)) as container:
            for frame in _sampled(container, fps):
                held.append(frame.to_ndarray(format="rgb24"))
                total += 1
                if len(held) == piece or total == limit:
                    yield torch.from_numpy(np.stack(held))[None]
                    held = []
                if total == limit:
                    return
    except (FFmpegError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a video after frame {total} ({error}): give another file"
        ) from None
    if held:
        yield torch.from_numpy(np.stack(held))[None]
    if not total:
        raise UserError(f"{path} holds no frame: give another file")


def _sampled(container: Any, fps: float | None) -> Iterable[Any]:
    """The frames nearest to the moments 0, 1 / fps, 2 / fps, ... after the first frame."""
    if fps is None:
        yield from container.decode(video=0)
        return
    wanted = Fraction(fps).limit_denominator(1001)
    rate = Fraction(container.streams.video[0].average_rate or wanted)
    made, before, start, time = 0, None, Fraction(0), Fraction(0)
    for index, frame in enumerate(container.decode(video=0)):
        # a container without time stamps has frames of equal length
        now = index / rate if frame.pts is None else frame.pts * Fraction(frame.time_base)
        if before is None:
            start = now
        while before is not None and made / wanted < (time + now) / 2 - start:
            yield before
            made += 1
        before, time = frame, now
    while before is not None and made / wanted < time + 1 / (2 * rate) - start:
        yield before
        made += 1


def parse_size(text: str) -> tuple[int, int]:
    """``480x832`` as (height, width); UserError for anything else or no multiples of 16."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--size {text}: give HEIGHTxWIDTH in pixels, such as 480x832")
    height, width = (int(part) for part in parts)
    if min(height, width) < _MULTIPLE or height % _MULTIPLE or width % _MULTIPLE:
        raise UserError(f"--size {text}: height and width must be multiples of {_MULTIPLE}")
    return height, width


def fitted(
    frames: UInt8[Tensor, "1 n H W 3"],
    size: tuple[int, int] | None,
    mode: Literal["bilinear", "bicubic"] = "bilinear",
) -> Float[Tensor, "1 3 n H2 W2"]:
    """Frames in [-1, 1], scaled to cover ``size`` and cropped to it about the middle.

    Without a size they are only cropped, to multiples of 16.

    Raises:
        UserError: frames smaller than 16 x 16.
    """
    pixels = from_uint8(frames)
    height, width = pixels.shape[3:]
    if size is None:
        size = height // _MULTIPLE * _MULTIPLE, width // _MULTIPLE * _MULTIPLE
        if not min(size):
            raise UserError(f"frames of {height} x {width} are too small: give --size")
    else:
        scale = max(size[0] / height, size[1] / width)
        height, width = max(size[0], round(scale * height)), max(size[1], round(scale * width))
        flat = pixels[0].transpose(0, 1)
        flat = F.interpolate(flat, (height, width), mode=mode, antialias=True).clamp_(-1, 1)
        pixels = flat.transpose(0, 1)[None]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return pixels[:, :, :, top : top + size[0], left : left + size[1]]
