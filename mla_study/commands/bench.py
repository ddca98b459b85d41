"""``mla-study bench``: measure the toolkit against its goals, one part at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from mla_study.commands.bench_attention import BenchAttention
from mla_study.commands.bench_rollout import Gpu, RolloutBench, Step


@dataclass(frozen=True)
class BenchMemory:
    """Cache bytes and peak memory of one step, for each layout, form, storage and window.

    In closed form and counted at Wan's shapes, and measured on a small model here (on Wan's own
    where there is a GPU).

    Example: mla-study bench memory --no-measure --no-write
    """

    write: bool = True
    """Write results/data/bench_memory."""
    measure: bool = True
    """Also measure; else only what is modelled."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.efficiency.bench_memory import bench_memory

        return bench_memory(self.write, self.measure)


@dataclass(frozen=True)
class BenchBatch:
    """Memory against batch (Fig. 7): slope a request, largest batch a card, the paper beside it.

    Example: mla-study bench batch --no-write
    """

    write: bool = True
    """Write results/data/fig7_batch_scaling."""
    measure: bool = True
    """Also measure, where there is a GPU; else only what is modelled."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.efficiency.bench_memory import bench_batch

        return bench_batch(self.write, self.measure)


BenchCommand = (
    Annotated[BenchAttention, tyro.conf.subcommand("attention")]
    | Annotated[Step, tyro.conf.subcommand("step")]
    | Annotated[RolloutBench, tyro.conf.subcommand("rollout")]
    | Annotated[BenchMemory, tyro.conf.subcommand("memory")]
    | Annotated[BenchBatch, tyro.conf.subcommand("batch")]
    | Annotated[Gpu, tyro.conf.subcommand("gpu")]
)


@dataclass(frozen=True)
class Bench:
    """Measure: a layer of attention, a pass, a rollout, memory, memory against batch, all on a GPU.

    Example: mla-study bench memory --no-measure --no-write
    """

    command: BenchCommand = field()

    def run(self) -> int:
        """Run the subcommand."""
        return self.command.run()
