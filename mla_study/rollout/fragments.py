"""Fragmented MP4 that grows by appending: each call encodes some frames into bytes of its own.

The first bytes of a file are its header (boxes ftyp and moov); then come fragments (moof and mdat),
each of which starts with a key frame and says its own start time. So a file may end after any
fragment and still plays, and a file that is cut back to a fragment's end can go on.

Shapes: n frames, height x width pixels.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from mla_study.errors import UserError

_OPTIONS = {"preset": "veryfast", "crf": "17", "bf": "0", "sc_threshold": "0"}
_MUXER = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def encode(frames: np.ndarray, fps: Fraction, first: int, sequence: int) -> tuple[bytes, bytes]:
    """H.264 of uint8 frames [n, height, width, 3] as (header, fragment).

    Args:
        frames: RGB; odd sizes are filled up to even ones by their last row and column.
        fps: frames a second.
        first: index of the first frame in the whole video.
        sequence: number of the fragment, from 1.

    Raises:
        UserError: PyAV is not installed or lacks H.264.
    """
    frames = np.pad(frames, [(0, 0), *((0, s % 2) for s in frames.shape[1:3]), (0, 0)], "edge")
    lacking = (
        "writing MP4 needs the package av (pip install av); or write .png frames, .webp, .gif "
        "or .safetensors latents"
    )
    # one key frame a fragment: a scene cut must not start another
    data = mp4_bytes(frames, fps, _OPTIONS, _MUXER, len(frames) + 1, lacking)
    return _split(data, fps, first, sequence)


def mp4_bytes(
    frames: np.ndarray, fps: Fraction, codec: Mapping[str, str], muxer: Mapping[str, str],
    key_every: int, lacking: str,
) -> bytes:  # fmt: skip
    """An MP4 of uint8 frames [n, height, width, 3] of even sizes, in H.264.

    Args:
        codec, muxer: options of x264 and of the MP4 muxer.
        key_every: frames from one key frame to the next, at the most.
        lacking: what to say where PyAV is not installed.

    Raises:
        UserError: PyAV is not installed or lacks H.264.
    """
    try:
        import av
    except ImportError:
        raise UserError(lacking) from None
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options=dict(muxer)) as container:
        try:
            stream: Any = container.add_stream("libx264", rate=fps, options=dict(codec))
        except ValueError as error:
            raise UserError(f"this build of PyAV has no H.264 encoder ({error})") from None
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = 1 / fps
        stream.codec_context.gop_size = key_every
        for index, pixels in enumerate(frames):
            frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = index, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _split(data: bytes, fps: Fraction, first: int, sequence: int) -> tuple[bytes, bytes]:
    """The header, and the one fragment moved to its place in the video."""
    header, fragment = bytearray(), bytearray()
    for kind, start, stop in boxes(data, 0, len(data)):
        if kind in (b"ftyp", b"moov"):
            header += data[start:stop]
        elif kind in (b"moof", b"mdat"):
            fragment += data[start:stop]
    timescale = _timescale(bytes(header))
    ticks = round(first * timescale / fps)
    _, moof, end = next(b for b in boxes(fragment, 0, len(fragment)) if b[0] == b"moof")
    _, mfhd, _ = _child(fragment, moof, end, b"mfhd")
    struct.pack_into(">I", fragment, mfhd + 12, sequence)
    _, traf, traf_end = _child(fragment, moof, end, b"traf")
    _, tfdt, _ = _child(fragment, traf, traf_end, b"tfdt")
    if fragment[tfdt + 8] != 1:
        raise UserError("this build of PyAV writes 32-bit fragment times: update the package av")
    struct.pack_into(">Q", fragment, tfdt + 12, ticks)
    return bytes(header), bytes(fragment)


def _timescale(header: bytes) -> int:
    """Ticks a second of the one track."""
    start, stop = 0, len(header)
    for kind in (b"moov", b"trak", b"mdia", b"mdhd"):
        _, start, stop = _child(header, start, stop, kind, top=kind == b"moov")
    wide = header[start + 8] == 1
    return struct.unpack_from(">I", header, start + (28 if wide else 20))[0]


def boxes(data: bytes | bytearray, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the complete boxes that lie side by side."""
    while start + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, start)
        if size == 1 and start + 16 <= stop:
            size = struct.unpack_from(">Q", data, start + 8)[0]
        if size < 8 or start + size > stop:
            return
        yield kind, start, start + size
        start += size


def _child(
    data: bytes | bytearray, start: int, stop: int, kind: bytes, top: bool = False
) -> tuple[bytes, int, int]:
    inside = start if top else start + 8
    for box in boxes(data, inside, stop):
        if box[0] == kind:
            return box
    raise UserError(f"the MP4 writer made no {kind.decode()} box: update the package av")
