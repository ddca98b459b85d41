"""A training plan held against this machine: its memory, and a time where one was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mla_study.config import ModelConfig
from mla_study.evaluation.efficiency.train_memory import Models, counted_flops
from mla_study.miniature.store import STEP_SECONDS
from mla_study.study.observe import memory_gib
from mla_study.training.recipe import Stage, stages


@dataclass(frozen=True)
class Host:
    """This machine.

    Attributes:
        memory: bytes that processes may still take; None where it cannot be told.
        step_s: seconds of a step on one thread; None where none was measured.
        why: what the time rests on, or why there is none.
    """

    memory: float | None
    step_s: float | None
    why: str


def this_host(
    preset: str, stage: Stage, model: ModelConfig, teacher: ModelConfig, ranks: int = 1
) -> Host:
    """What this machine has, and how long it takes for a step.

    Args:
        preset: whose stage it is; of the miniature alone a time was measured on a CPU.
        stage: it may differ from the preset's, by which the time is scaled.
    """
    free = memory_gib()
    memory = None if free is None else free * 2**30
    if preset != "mini" or stage.objective not in STEP_SECONDS:
        own = f"preset {preset}" if preset != "mini" else "this objective"
        return Host(memory, None, f"none of {own} was measured on a CPU")
    if ranks > 1:
        return Host(memory, None, "one rank alone was measured on a CPU")
    base, taken = stages(preset)[stage.objective], STEP_SECONDS[stage.objective]
    why = f"the study's {taken:g} CPU s a step of this stage on one thread, observers included"
    # rates of learning, steps and the like cost nothing
    alike = replace(base, batch=stage.batch, frames=stage.frames, options=stage.options)
    if alike != base:
        taken *= _flops(stage, model, teacher) / _flops(base, model, teacher)
        why += ", scaled by FLOPs"
    return Host(memory, taken, f"{why}; another CPU takes more or less")


def _flops(stage: Stage, model: ModelConfig, teacher: ModelConfig) -> float:
    """Of a step on one rank."""
    models = Models(stage, model, teacher)
    turns = models.objective().turns()
    return sum(
        turns.count(role) * counted_flops(models, role, stage.batch)
        for role in dict.fromkeys(turns)
    )
