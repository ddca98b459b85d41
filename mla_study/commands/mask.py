"""``mla-study mask``: print who sees whom."""

from __future__ import annotations

from dataclasses import dataclass

from mla_study.errors import UserError


@dataclass(frozen=True)
class Mask:
    """Print which latent frames a chunk sees, and at which rotary position.

    A line a query frame: its position, the frames it sees as '#', then key@position.

    Example: mla-study mask --chunks 4 --sink 1 --window 6
    """

    chunks: int = 4
    """Chunks of the video."""
    chunk: int = 3
    """Frames made together."""
    sink: int = 1
    """First frames that are kept for good."""
    window: int | None = None
    """Latest frames kept beside sink and chunk (default: all)."""
    teacher_forcing: bool = False
    """Clean copies (c) and noisy ones (n) in one sequence: what training sees."""
    relative: bool = False
    """Positions count the frames of the window from 0; else those of the video."""

    def run(self) -> int:
        """Print."""
        from mla_study.config import WindowConfig
        from mla_study.kernels.masks import chunk_causal, teacher_forcing

        if self.chunks < 1:
            raise UserError(f"--chunks is {self.chunks}, but it must be at least 1")
        history = self.chunks * self.chunk if self.window is None else self.window
        window = WindowConfig(self.sink, history, self.chunk)
        frames = self.chunks * self.chunk
        make = teacher_forcing if self.teacher_forcing else chunk_causal
        rule = make(frames, self.chunk, window, "relative" if self.relative else "absolute")
        copies = ("c", "n") if self.teacher_forcing else ("",)
        print(rule.text([f"{copy}{frame}" for copy in copies for frame in range(frames)]))
        kept = "all earlier frames" if self.window is None else f"history {self.window}"
        most = max(len(segment.keys) for segment in rule.segments)
        pairs = int(rule.dense().sum())
        print(
            f"sink {self.sink}, {kept}, chunk {self.chunk}; "
            f"{'relative' if self.relative else 'absolute'} positions; at most {most} key frames a "
            f"step; {pairs} of {rule.frames**2} pairs of frames are seen"
        )
        return 0
