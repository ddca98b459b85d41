"""Who sees whom, as data: one rule, seen as segments, dense mask, flex BlockMask or text.

All masks of the study are constant on pairs of latent frames, and all frames of a chunk see the
same keys. So a rule is a list of :class:`Segment`: some query frames, the key frames that they see,
and the temporal position that each has in the rotary frame of that segment. Attention runs segment
by segment without any mask; the dense and flex views are for checking and for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mla_study.config import WindowConfig
from mla_study.errors import UserError, counted

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Positions = Literal["absolute", "relative"]


@dataclass(frozen=True)
class Segment:
    """Query frames and the key frames they see, as indices into the sequence, with positions."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_positions: tuple[int, ...]
    key_positions: tuple[int, ...]


@dataclass(frozen=True)
class Visibility:
    """The rule for a sequence of ``frames`` latent frames.

    ``times`` is the frame of the video that each of them shows (teacher forcing has two copies of
    every frame); None: 0, 1, 2 ... Segments hold every query frame once, in order.
    """

    frames: int
    segments: tuple[Segment, ...]
    times: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        queries = [q for segment in self.segments for q in segment.queries]
        if queries != list(range(self.frames)):
            raise ValueError(f"segments ask for frames {queries}, not 0 .. {self.frames - 1}")

    @property
    def frame_times(self) -> tuple[int, ...]:
        """``times``, spelt out."""
        return tuple(range(self.frames)) if self.times is None else self.times

    def dense(self) -> np.ndarray:
        """bool [frames, frames]: query frame sees key frame."""
        mask = np.zeros((self.frames, self.frames), dtype=bool)
        for segment in self.segments:
            mask[np.ix_(segment.queries, segment.keys)] = True
        return mask

    def tokens(self, tokens_per_frame: int) -> np.ndarray:
        """bool [frames * tokens, frames * tokens], the dense mask of attention proper."""
        return self.dense().repeat(tokens_per_frame, 0).repeat(tokens_per_frame, 1)

    def block_mask(self, tokens_per_frame: int, device: str = "cpu") -> BlockMask:
        """The same as flex attention's BlockMask."""
        import torch
        from torch.nn.attention.flex_attention import create_block_mask

        frames = torch.from_numpy(self.dense()).to(device)
        size = self.frames * tokens_per_frame

        return create_block_mask(
            lambda b, h, q, k: frames[q // tokens_per_frame, k // tokens_per_frame],
            None,
            None,
            size,
            size,
            device=device,
        )

    def text(self, names: Sequence[str] | None = None) -> str:
        """One line a query frame: '#' where it sees, '.' where not, then the key positions."""
        labels = list(names or [str(i) for i in range(self.frames)])
        width = max(map(len, labels))
        cells = self.dense()
        lines: list[str] = []
        for segment in self.segments:
            keys = " ".join(
                f"{labels[k]}@{p}" for k, p in zip(segment.keys, segment.key_positions, strict=True)
            )
            for frame, at in zip(segment.queries, segment.query_positions, strict=True):
                row = "".join("#" if seen else "." for seen in cells[frame])
                lines.append(f"{labels[frame]:>{width}} @{at:<3} {row}  {keys}")
        return "\n".join(lines)


def bidirectional(frames: int) -> Visibility:
    """Every frame sees every frame: the pretrained teacher."""
    everything = tuple(range(frames))
    return Visibility(frames, (Segment(everything, everything, everything, everything),))


def chunks_of(frames: int, chunk: int, first: int | None = None) -> list[tuple[int, ...]]:
    """Frames cut into chunks; ``first`` frames of their own at the start where given.

    Raises:
        UserError: the frames do not fill whole chunks.
    """
    start = first or 0
    if frames < 1 or chunk < 1 or start < 0 or start > frames or (frames - start) % chunk:
        raise UserError(
            f"whole chunks of {chunk} do not make up {counted(frames, 'frame')}"
            + (f" after a first one of {first}" if first else "")
        )
    head = [tuple(range(start))] if start else []
    return head + [tuple(range(i, i + chunk)) for i in range(start, frames, chunk)]


def window_frames(before: int, sink: int, history: int | None) -> tuple[int, ...]:
    """Cached frames that a chunk sees that begins at frame ``before``: the sink and the latest."""
    if history is None or before <= sink + history:
        return tuple(range(before))
    return (*range(sink), *range(before - history, before))


def chunk_causal(
    frames: int,
    chunk: int,
    window: WindowConfig | None = None,
    positions: Positions = "absolute",
    first: int | None = None,
) -> Visibility:
    """A chunk sees itself and the window before it: what the rollout does, in one pass.

    ``window`` None keeps all earlier frames; the size of a chunk is ``chunk``, whatever the window
    says. With ``relative`` positions each chunk counts the frames that it sees from 0, so that the
    sink's keys are rotated anew for each chunk.
    """
    segments: list[Segment] = []
    for mine in chunks_of(frames, chunk, first):
        sink, history = (0, None) if window is None else (window.sink, window.history)
        keys = (*window_frames(mine[0], sink, history), *mine)
        segments.append(segment_of(mine, keys, keys, positions))
    return Visibility(frames, tuple(segments))


def segment_of(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    key_times: tuple[int, ...],
    positions: Positions,
    query_times: tuple[int, ...] | None = None,
) -> Segment:
    """A segment whose rotary positions are the absolute times, or their ranks in the window."""
    times = queries if query_times is None else query_times
    if positions == "relative":
        rank = {time: index for index, time in enumerate(sorted(set(key_times)))}
        return Segment(
            queries, keys, tuple(rank[t] for t in times), tuple(rank[t] for t in key_times)
        )
    return Segment(queries, keys, times, key_times)


def step_of(chunk: Sequence[int], held: Sequence[int], positions: Positions) -> Segment:
    """One step of the rollout: the frames of ``chunk`` see all slots of a cache.

    Args:
        chunk: ids of the frames that are being made.
        held: ids of the frames in the cache's slots, in slot order, the chunk's among them.
    """
    queries, keys = tuple(range(len(chunk))), tuple(range(len(held)))
    return segment_of(queries, keys, tuple(held), positions, tuple(chunk))


def teacher_forcing(
    frames: int,
    chunk: int,
    window: WindowConfig | None = None,
    positions: Positions = "absolute",
) -> Visibility:
    """Clean and noisy copies in one sequence: frames 0 .. F-1 clean, F .. 2F-1 noisy.

    Clean chunks see themselves and earlier clean ones; a noisy chunk sees itself and the *clean*
    frames before it. With ``window`` both see no more than the rollout does, sink included.
    """
    clean: list[Segment] = []
    noisy: list[Segment] = []
    sink, history = (0, None) if window is None else (window.sink, window.history)
    for mine in chunks_of(frames, chunk):
        past = window_frames(mine[0], sink, history)
        times = (*past, *mine)
        copy = tuple(frames + f for f in mine)
        clean.append(segment_of(mine, times, times, positions))
        noisy.append(segment_of(copy, (*past, *copy), times, positions, mine))
    return Visibility(2 * frames, (*clean, *noisy), (*range(frames), *range(frames)))
