"""Memory a rank and time a step of a training stage, before anything is trained.

Weights, gradients and optimiser states follow from the shapes and from how FSDP2 splits them;
activations and FLOPs are counted on the meta device (:mod:`train_memory`). All of it is of class
``modelled``: an allocator's rounding, libraries' workspaces and waiting for other ranks are not
seen.

Example::

    plan_training(stages("wan-1.3b")["teacher_forcing"], wan_1_3b(True), wan_1_3b(), 8).text()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla_study.config import ModelConfig, preset, to_dict
from mla_study.errors import UserError, counted
from mla_study.evaluation.efficiency.devices import CARDS, TERA, Card
from mla_study.evaluation.efficiency.host import Host
from mla_study.evaluation.efficiency.memory import GB, RUNTIME
from mla_study.evaluation.efficiency.train_bytes import (
    gathered_bytes,
    gradient_bytes,
    kept_bytes,
    optimiser_bytes,
)
from mla_study.evaluation.efficiency.train_memory import (
    Models,
    counted_activations,
    counted_flops,
)
from mla_study.evaluation.vbench.needs.costs import time_text
from mla_study.model.transformer import WanTransformer, meta_model
from mla_study.study.notebooks import Project
from mla_study.study.runs import write_result
from mla_study.training.objective import Role
from mla_study.training.ranks import Ranks
from mla_study.training.recipe import Stage, stages

UTILISATION = 0.4
"""Assumed share of a card's bf16 rate that training reaches."""
HOUR = 3600.0
MB = 1e6


@dataclass(frozen=True)
class Update:
    """One kind of update of a step.

    Attributes:
        count: how often a step does it.
        gradients, gathered, activations: bytes at its peak, beside what always lies there.
        optimiser: bytes that applying the gradients needs beside them.
        flops: of one rank, all micro-batches.
    """

    role: Role
    count: int
    gradients: int
    gathered: int
    activations: int
    optimiser: int
    flops: float

    @property
    def peak(self) -> int:
        """Bytes of the passes or of the optimiser, whichever needs more."""
        return self.gradients + max(self.gathered + self.activations, self.optimiser)


@dataclass(frozen=True)
class TrainPlan:
    """What one rank of a stage holds and does.

    Attributes:
        samples: of a micro-batch. pieces: micro-batches of an update.
        held: part -> bytes that lie there all the time.
        assumptions: what all of it rests on, a sentence each.
        host: this machine, where the ranks are its processes and there is no card.
    """

    stage: Stage
    name: str
    ranks: int
    samples: int
    pieces: int
    card: Card | None
    held: dict[str, int]
    updates: tuple[Update, ...]
    assumptions: tuple[str, ...]
    host: Host | None = None

    @property
    def peak(self) -> int:
        """Bytes of a rank at the worst moment of a step."""
        return sum(self.held.values()) + max(update.peak for update in self.updates)

    @property
    def flops(self) -> float:
        """Of one rank and one step, all updates."""
        return sum(update.count * update.flops for update in self.updates)

    @property
    def seconds(self) -> float | None:
        """Of a step at the assumed utilisation; None without a card, or in float32."""
        if self.card is None or self.stage.precision != "bf16":
            return None
        return self.flops / (UTILISATION * self.card.bf16)

    def rows(self) -> list[dict[str, Any]]:
        """Tidy rows: objective, model, ranks, update, part, value, unit, provenance."""
        found: list[tuple[str, str, float, str]] = [
            ("", part, size / GB, "GB a rank") for part, size in self.held.items()
        ]
        for update in self.updates:
            parts = {
                "gradients": update.gradients,
                "gathered": update.gathered,
                "activations": update.activations,
                "optimiser step": update.optimiser,
            }
            found += [(update.role, part, size / GB, "GB a rank") for part, size in parts.items()]
            found.append((update.role, "FLOPs", update.count * update.flops / TERA, "TF a step"))
        found.append(("", "peak", self.peak / GB, "GB a rank"))
        if self.seconds is not None:
            found.append(("", "step", self.seconds, "s"))
            found.append(("", "stage", self.seconds * self.stage.steps / HOUR, "h"))
        return [
            {
                "objective": self.stage.objective,
                "model": self.name,
                "ranks": self.ranks,
                "update": update,
                "part": part,
                "value": value,
                "unit": unit,
                "provenance": "modelled",
            }
            for update, part, value, unit in found
        ]

    def text(self) -> str:
        """The plan as a table, and every assumption below it."""
        lines = [
            f"{self.stage.objective}, {self.name}, {counted(self.ranks, 'rank')}, batch "
            f"{self.stage.batch}: {self.pieces} x {counted(self.samples, 'sample')} of "
            f"{counted(self.stage.frames, 'frame')} a rank and update"
        ]
        lines += [_line(part, size) for part, size in self.held.items()]
        for update in self.updates:
            lines.append(f"  update of {update.role}, {update.count} a step")
            lines += [
                _line("  gradients", update.gradients),
                _line("  gathered weights and their gradients", update.gathered),
                _line("  activations", update.activations),
                _line("  optimiser step, after these are gone", update.optimiser),
            ]
        lines.append(_line(self._each(), self.peak) + self._fits())
        lines.append(f"  {self.flops / TERA:.4g} TF a step and rank{self._time()}")
        told = [f"  {line}" for line in self.assumptions]
        return "\n".join([*lines, "modelled, under these assumptions:", *told])

    def _each(self) -> str:
        return (
            "peak of rank 0" if self.ranks == 1 else f"peak of each of ranks 0 to {self.ranks - 1}"
        )

    def _fits(self) -> str:
        if self.card is not None:
            room = "fits" if self.peak <= self.card.memory * GB else "DOES NOT FIT"
            return f"   {room} {self.card.memory:g} GB ({self.card.name})"
        if self.host is None or self.host.memory is None:
            return ""
        # its memory is shared by all ranks
        room = "fits" if self.ranks * self.peak <= self.host.memory else "DOES NOT FIT"
        times = f"{self.ranks} times into " if self.ranks > 1 else ""
        return f"   {room} {times}{self.host.memory / GB:.3g} GB (free on this machine)"

    def _time(self) -> str:
        if self.host is not None and self.host.step_s is not None:
            whole = time_text(self.host.step_s * self.stage.steps)
            return (
                f": about {self.host.step_s:.2g} s a step, {whole} for "
                f"{counted(self.stage.steps, 'step')}"
            )
        if self.host is not None:
            return f"; no time: {self.host.why}"
        if self.card is None:
            return ""
        if self.seconds is None:
            return f"; no time: the rate of {self.card.name} is of bf16"
        hours = self.seconds * self.stage.steps / HOUR
        return (
            f": {self.seconds:.3g} s a step on {self.card.name}, {hours:.3g} h for "
            f"{counted(self.stage.steps, 'step')}"
        )


def plan_training(
    stage: Stage,
    model: ModelConfig,
    teacher: ModelConfig,
    ranks: int,
    card: str | None = None,
    host: Host | None = None,
) -> TrainPlan:
    """Memory a rank of a stage, and its time on a card.

    Args:
        model: of the generator and of its moving average.
        teacher: of the teacher and of the fake score, where the objective has them.
        ranks: GPUs, or processes.
        card: one of :data:`~mla_study.evaluation.efficiency.devices.CARDS` in any case.
        host: this machine, in place of a card.

    Raises:
        UserError: an unknown card or objective, no rank, a batch that the ranks cannot share,
            models of unequal depth, or an objective that reads the values of tensors.
    """
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}, but it must be at least 1")
    known = None if card is None else _card(card)
    # as the trainer decides it, see mla_study.training.ranks
    sharded = ranks > 1 or stage.precision == "bf16"
    alone = Ranks(0, ranks, torch.device("meta"), sharded)
    share = len(alone.share(stage.batch))
    samples = min(stage.micro_batch or share, share)
    pieces = math.ceil(share / samples)
    models = Models(stage, model, teacher)
    metas: dict[Role, WanTransformer] = {r: meta_model(models.config(r)) for r in models.named()}
    turns = models.objective().turns()
    held = {f"{role}, fp32": kept_bytes(metas[role].parameters(), alone) for role in metas}
    for role in dict.fromkeys(turns):
        for name, size in optimiser_bytes(metas[role], stage, role, alone).items():
            held[f"{name} states of {role}"] = size
    held["runtime"] = round(RUNTIME)
    updates = tuple(
        _update(models, metas, role, samples, pieces, alone) for role in dict.fromkeys(turns)
    )
    told = _assumptions(stage, alone, pieces, known, host)
    name = model.name
    return TrainPlan(stage, name, ranks, samples, pieces, known, held, updates, told, host)


def _update(
    models: Models,
    metas: Mapping[Role, WanTransformer],
    role: Role,
    samples: int,
    pieces: int,
    ranks: Ranks,
) -> Update:
    model, stage = metas[role], models.stage
    return Update(
        role=role,
        count=models.objective().turns().count(role),
        gradients=gradient_bytes(model, ranks, pieces),
        gathered=gathered_bytes(model, list(metas.values()), ranks, stage.precision),
        activations=counted_activations(models, role, samples),
        # all square roots of the second moments at once
        optimiser=kept_bytes(model.parameters(), ranks),
        flops=pieces * counted_flops(models, role, samples),
    )


def _card(name: str) -> Card:
    card = CARDS.get(name.upper().replace(" ", "").replace("-", ""))
    if card is None:
        raise UserError(f"there is no card '{name}': give one of {', '.join(CARDS)}")
    return card


def _line(part: str, size: int) -> str:
    small = size < GB
    return f"  {part:<42}{size / MB:>9.1f} MB" if small else f"  {part:<42}{size / GB:>9.3f} GB"


def _assumptions(
    stage: Stage, ranks: Ranks, pieces: int, card: Card | None, host: Host | None
) -> tuple[str, ...]:
    told = [
        f"passes in {stage.precision}, weights, gradients and optimiser states in fp32"
        + (", split over the ranks by FSDP2" if ranks.sharded else ", whole on the one rank"),
        "activations: counted on the meta device through the objective's own loss and backward, "
        + ("blocks run again in the backward" if stage.recompute else "nothing run again")
        + ", attention as a fused kernel; the peak of one micro-batch",
        f"runtime: {RUNTIME / GB:g} GB for the device's context and libraries; rounding of the "
        "allocator, workspaces and buffers of the network are not counted",
    ]
    if pieces > 1 and ranks.sharded:
        told.append("gradients: not reduced between micro-batches, so whole on every rank")
    if stage.compile:
        told.append("torch.compile: not seen; it keeps fewer activations")
    if card is not None and stage.precision == "bf16":
        told.append(
            f"time: {UTILISATION:.0%} of {card.bf16 / TERA:g} TF/s bf16 ({card.source}, data "
            "sheet), nothing else waited for"
        )
    if host is not None and host.step_s is not None:
        told.append(f"time: {host.why}")
    return tuple(told)


def write_plans(name: str = "wan-1.3b", ranks: int = 8, card: str = "H100") -> Path:
    """Print the plan of every stage of a preset, and write ``results/data/train_plan``.

    Returns:
        that folder.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    made = stages(name)
    for stage in made.values():
        student = preset(name, latent=stage.objective != "flow")
        found = plan_training(stage, student, preset(name), ranks, card)
        print(found.text(), end="\n\n", flush=True)
        rows += found.rows()
    folder = Project.find().data / "train_plan"
    write_result(
        folder,
        {"table": pd.DataFrame(rows)},
        config={
            "preset": name,
            "ranks": ranks,
            "card": card,
            "utilisation": UTILISATION,
            "stages": [to_dict(stage) for stage in made.values()],
        },
        inputs={},
        seed=None,
        modules=(__name__,),
        provenance="modelled",
        validity="full",
        units={"value": "see column unit; GB are 1e9 bytes"},
    )
    return folder
