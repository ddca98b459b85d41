"""``mla-study bench attention``: one self-attention layer, latent against dense."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from mla_study.errors import UserError

DEFAULT_SHAPES = ("1x15600", "4x15600", "16x15600", "1560x15600", "4680x15600", "1560x10920")


@dataclass(frozen=True)
class BenchAttention:
    """One self-attention layer of a rollout's step: latent forms against dense, at equal windows.

    Projections of the new tokens, writing them to the ring, rotation of the keys and attention all
    count; weights are random, for speed does not depend on values.

    Example: mla-study bench attention --shapes 1560x15600 --width quarter --dtypes fp32 --no-write
    """

    shapes: tuple[str, ...] = DEFAULT_SHAPES
    """QUERIESxKEYS of a step, the queries among the keys."""
    width: Literal["full", "quarter", "both"] = "both"
    """Wan 1.3B's width 1536 with 12 heads, or 384 with 3."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16, fp16."""
    repeats: int = 9
    """Interleaved turns after a warm-up; fewer, but three, where a shape takes minutes."""
    threads: int = 1
    """Threads of torch on the CPU; seconds are the process's CPU seconds."""
    device: str = "cpu"
    """cpu or cuda."""
    write: bool = True
    """Write results/data/bench_attention."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.efficiency.attention import bench_attention
        from mla_study.evaluation.goals import results_name, say, show, write_rows
        from mla_study.evaluation.timing import threads
        from mla_study.kernels.latent_attention.calibrations import device_key
        from mla_study.rollout.setup import usable_device

        shapes = [parse_shape(text) for text in self.shapes]
        for dtype in self.dtypes:
            if dtype not in ("fp32", "bf16", "fp16"):
                raise UserError(f"--dtypes {dtype}: give some of fp32, bf16, fp16")
        if not shapes or not self.dtypes:
            raise UserError("--shapes and --dtypes name what is measured: give at least one each")
        if self.repeats < 1 or self.threads < 1:
            raise UserError("--repeats and --threads must be at least 1")
        device = usable_device(self.device)
        widths = ("full", "quarter") if self.width == "both" else (self.width,)
        say("bench attention", f"{device_key(self.device)}, {self.threads} threads")
        with threads(self.threads):
            rows, table = bench_attention(shapes, widths, self.dtypes, device, self.repeats, show)
        if self.write:
            folder = write_rows(
                results_name("bench_attention", device),
                rows,
                config={
                    "shapes": [list(shape) for shape in shapes],
                    "widths": list(widths),
                    "dtypes": list(self.dtypes),
                    "repeats": self.repeats,
                    "threads": self.threads,
                    "device": device_key(self.device),
                },
                modules=("mla_study.evaluation.efficiency.attention",),
                more={"layers": table},
                notes=["random weights and inputs: speed does not depend on values"],
            )
            print(f"wrote {folder}", file=sys.stderr)
        return 0


def parse_shape(text: str) -> tuple[int, int]:
    """``1560x15600`` as (queries, keys); UserError for anything else."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise UserError(f"--shapes {text}: give QUERIESxKEYS, such as 1560x15600")
    queries, keys = int(parts[0]), int(parts[1])
    if queries > keys:
        raise UserError(
            f"--shapes {text}: the queries are among the keys, so there must be at least as many "
            "of these"
        )
    return queries, keys
