"""Frames of a video, all of them one by one or some evenly, at the memory of a few.

Shapes: H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mla_study.errors import UserError
from mla_study.rollout.clips import read_clip

_PIECE = 4


def each(path: Path) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Every RGB frame in order.

    Raises:
        UserError: the file is no video, or its frames change their size.
    """
    size: tuple[int, ...] | None = None
    try:
        for piece in read_clip(path, piece=_PIECE):
            for frame in piece[0].numpy():
                size = size or frame.shape
                if frame.shape != size:
                    raise UserError(f"{path} changes its frames' size on the way: give another")
                yield frame
    except ValueError as error:  # frames of unlike sizes within a piece
        raise UserError(f"{path} changes its frames' size on the way ({error})") from None


def length(path: Path) -> int:
    """Frames that the file holds, by its packets; nothing is decoded.

    Raises:
        UserError: the file is no video.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    except (FFmpegError, IndexError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a video ({error}): give another file") from None


def evenly(total: int, count: int) -> tuple[int, ...]:
    """Up to ``count`` indices of ``total`` frames, each the middle of one of ``count`` equal parts.

    >>> evenly(10, 2), evenly(3, 16)
    ((2, 7), (0, 1, 2))
    """
    if total <= count:
        return tuple(range(total))
    return tuple((2 * part + 1) * total // (2 * count) for part in range(count))


def sampled(path: Path, count: int) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Up to ``count`` RGB frames, evenly over the video.

    Raises:
        UserError: the file is no video.
    """
    wanted = evenly(length(path), count)
    last = wanted[-1] if wanted else 0
    for index, frame in enumerate(each(path)):
        if index in wanted:
            yield frame
        if index >= last:
            return
