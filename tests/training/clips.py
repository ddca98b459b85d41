"""Tiny video files with frames that can be told apart."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest


def levels(count: int) -> np.ndarray:
    """The grey of each frame, 12 apart."""
    return 20 + 12 * np.arange(count)


def write_video(
    path: Path,
    frames: int = 6,
    size: tuple[int, int] = (24, 24),
    fps: int = 8,
    offset: int = 0,
) -> Path:
    """A video whose frame i is grey of ``levels(frames)[i] + offset``, nearly lossless."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "1"}
        for level in levels(frames) + offset:
            picture = np.full((*size, 3), level, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
