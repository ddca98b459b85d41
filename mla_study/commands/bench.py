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


@dataclass(frozen=True)
class BenchTrain:
    """Training: latent against dense, DMD, the rank tracker, rendering, two processes at once.

    The small preset against the rate of matrix products, where there is a GPU.

    Example: mla-study bench train --quick
    """

    quick: bool = False
    """Few repeats, to try it; nothing is written."""
    write: bool = True
    """Write results/data/bench_train."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.bench_train import bench_train

        return bench_train(self.quick, self.write)


@dataclass(frozen=True)
class TrainMemory:
    """Memory a rank and time of the three stages of Wan 1.3B on 8 GPUs, counted on no GPU.

    Writes results/data/train_plan. Other stages, ranks and cards: mla-study train --dry-run.

    Example: mla-study bench train-memory
    """

    def run(self) -> int:
        """Count, print and write."""
        from mla_study.evaluation.efficiency.train_plan import write_plans
        from mla_study.evaluation.goals import say

        say("bench", f"wrote {write_plans()}")
        return 0


@dataclass(frozen=True)
class BenchVBench:
    """VBench through workers: overhead, two workers, a second run, memory, decodes.

    Example: mla-study bench vbench --quick
    """

    quick: bool = False
    """Few videos and repeats, to try it; nothing is written."""
    write: bool = True
    """Write results/data/bench_vbench."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.bench_vbench import bench_vbench

        return bench_vbench(self.quick, self.write)


BenchCommand = (
    Annotated[BenchAttention, tyro.conf.subcommand("attention")]
    | Annotated[Step, tyro.conf.subcommand("step")]
    | Annotated[RolloutBench, tyro.conf.subcommand("rollout")]
    | Annotated[BenchMemory, tyro.conf.subcommand("memory")]
    | Annotated[BenchBatch, tyro.conf.subcommand("batch")]
    | Annotated[BenchTrain, tyro.conf.subcommand("train")]
    | Annotated[BenchVBench, tyro.conf.subcommand("vbench")]
    | Annotated[TrainMemory, tyro.conf.subcommand("train-memory")]
    | Annotated[Gpu, tyro.conf.subcommand("gpu")]
)


@dataclass(frozen=True)
class Bench:
    """Measure: a layer of attention, a pass, a rollout, memory, training, all on a GPU.

    Example: mla-study bench memory --no-measure --no-write
    """

    command: BenchCommand = field()

    def run(self) -> int:
        """Run the subcommand."""
        return self.command.run()
