"""``mla-study bench step``, ``bench rollout`` and ``bench gpu``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    """Time one denoising pass of the model, its window full, for each layout, form and window.

    Example: mla-study bench step --scale small --repeats 2 --no-write
    """

    scale: Literal["small", "quarter", "full"] = "quarter"
    """full: Wan 1.3B at 480x832 in bf16 on a GPU; quarter: a quarter of it on one CPU thread."""
    reading: Literal["beside", "within", "both"] = "both"
    """Whether the window's 6 frames lie beside the chunk (15600 keys) or hold it (10920)."""
    repeats: int = 30
    """Turns, each with every variant once."""
    write: bool = True
    """Write results/data/bench_step_SCALE_READING."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.efficiency.runs import bench

        return bench(("step",), self.scale, self.reading, self.repeats, 0, self.write)


@dataclass(frozen=True)
class RolloutBench:
    """Time chunks of the steady state and whole clips: FPS, latency, memory, share of the ceilings.

    Each change (window, layout, form, clean pass, cache storage; on a GPU graphs, compilation,
    fp8) is made alone, and its factor printed beside what FLOPs predict.

    Example: mla-study bench rollout --scale small --repeats 2 --clips 1 --no-write
    """

    scale: Literal["small", "quarter", "full"] = "quarter"
    """full: Wan 1.3B at 480x832 in bf16 on a GPU; quarter: a quarter of it on one CPU thread."""
    reading: Literal["beside", "within", "both"] = "both"
    """Whether the window's 6 frames lie beside the chunk (15600 keys) or hold it (10920)."""
    repeats: int = 12
    """Turns, each with every variant once."""
    clips: int = 3
    """Turns of clips of 81 frames from an empty cache; 0 leaves them out."""
    write: bool = True
    """Write results/data/bench_rollout_SCALE_READING."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.efficiency.runs import bench

        return bench(("chunk",), self.scale, self.reading, self.repeats, self.clips, self.write)


@dataclass(frozen=True)
class Gpu:
    """Calibrate a GPU, and run every benchmark at Wan 1.3B on it, piece by piece.

    What is there already is skipped, and no piece starts after --minutes: the same command goes on.

    Example: mla-study bench gpu --pieces step rollout
    """

    pieces: tuple[str, ...] = ()
    """calibrate, attention, step, step-within, rollout, rollout-within, memory, batch (default:
    all)."""
    minutes: float = 8.0
    """Start no piece later than this."""
    again: bool = False
    """Measure also what is there."""

    def run(self) -> int:
        """Run the pieces."""
        from mla_study.evaluation.efficiency.runs import bench_gpu

        return bench_gpu(self.pieces, self.minutes, self.again)
