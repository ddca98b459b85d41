"""Hyperparameters of the training stages: frozen dataclasses, and a preset a model size.

``wan-1.3b`` holds the paper's (Table 4 and appendix; what it leaves open is marked), ``small`` the
50 M recipe for one GPU, ``mini`` the study's on a laptop CPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mla_study.config import PRESETS as MODELS
from mla_study.config import from_dict, to_dict
from mla_study.errors import UserError

Precision = Literal["fp32", "bf16"]
_LARGEST = 1e30


@dataclass(frozen=True)
class Optimiser:
    """AdamW, or Muon on the blocks' matrices with AdamW on the rest.

    Attributes:
        lr: of AdamW; ``lr_matrix`` of Muon, per unit of spectral norm (0: AdamW everywhere).
        warmup: updates over which both rise linearly from 0.
        decay: share of the run, its last, over which they fall linearly to 0.
        clip: largest norm of the whole gradient; 0 clips nothing.
    """

    lr: float = 1e-4
    lr_matrix: float = 0.0
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    warmup: int = 0
    decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.lr_matrix < 0 or self.warmup < 0 or self.clip < 0:
            raise UserError(
                f"Optimiser has lr {self.lr}, lr_matrix {self.lr_matrix}, warmup {self.warmup} and "
                f"clip {self.clip}: lr must be positive, none of the others negative"
            )
        if max(self.lr, self.lr_matrix) > _LARGEST:
            raise UserError(
                f"Optimiser has lr {self.lr} and lr_matrix {self.lr_matrix}, which float32 cannot "
                f"count with: neither may exceed {_LARGEST:g}"
            )
        if not 0 <= self.decay <= 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"Optimiser has decay {self.decay} and betas {self.betas}: decay lies from 0 to 1, "
                "betas from 0 up to below 1"
            )

    def factor(self, update: int, updates: int) -> float:
        """What ``update`` (0, 1, ...) of so many multiplies the learning rates by."""
        rise = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        falling = self.decay * updates
        fall = min(1.0, (updates - update) / falling) if falling else 1.0
        return rise * fall


@dataclass(frozen=True)
class Stage:
    """One run of the trainer.

    Attributes:
        objective: a module of :mod:`mla_study.training.objectives`, or a ``.py`` file.
        options: fields of the objective's dataclass that differ from its defaults.
        steps: of the generator.
        batch: samples of an update over all ranks and micro-batches.
        frames: latent frames of a clip.
        micro_batch: samples of one pass of a rank; None: the rank's whole share.
        critic: of the fake score; None: as ``optimiser``.
        ema: decay of the generator's moving average, which is the result; 0 keeps none.
        precision: of the passes; weights, gradients and optimiser states stay float32.
        recompute: blocks are run again in the backward, which saves their activations.
        compile: blocks are compiled.
        save_every: steps between checkpoints (the last one is always saved).
    """

    objective: str
    steps: int
    batch: int
    optimiser: Optimiser
    frames: int = 21
    options: dict[str, Any] = field(default_factory=dict)
    micro_batch: int | None = None
    critic: Optimiser | None = None
    ema: float = 0.0
    precision: Precision = "fp32"
    recompute: bool = False
    compile: bool = False
    save_every: int = 100
    log_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        least = min(self.steps, self.batch, self.frames, self.save_every, self.log_every)
        if least < 1 or (self.micro_batch is not None and self.micro_batch < 1):
            raise UserError(
                f"stage {self.objective}: steps, batch, frames, micro_batch, save_every and "
                "log_every must be at least 1"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"stage {self.objective}: ema is {self.ema}, but it lies in [0, 1)")


def mini() -> dict[str, Stage]:
    """The miniature's stages on one CPU thread."""
    student = Optimiser(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=20, decay=0.5)
    common: dict[str, Any] = {"frames": 12, "save_every": 50}
    return {
        "flow": Stage(
            "flow", 3600, 16,
            Optimiser(2e-3, 2e-2, (0.9, 0.99), weight_decay=0.0, warmup=100, decay=0.3),
            options={"independent": 0.5, "drop": 0.1}, ema=0.99, **common,
        ),
        "teacher_forcing": Stage(
            "teacher_forcing", 250, 8, student, options={"drop": 0.1}, ema=0.95, **common
        ),
        "consistency": Stage(
            "consistency", 100, 8, dataclasses.replace(student, lr=5e-4),
            options={"guidance": 2.0, "intervals": 32}, ema=0.95, **common,
        ),
        "distribution_matching": Stage(
            "distribution_matching", 40, 8,
            Optimiser(2e-4, betas=(0.0, 0.99), weight_decay=0.0),
            critic=Optimiser(4e-4, betas=(0.0, 0.99), weight_decay=0.0),
            options={"guidance": 1.0, "critic_updates": 4}, ema=0.9, **common,
        ),
    }  # fmt: skip


def small() -> dict[str, Stage]:
    """The 50 M model on one GPU (see :func:`mla_study.config.small`); not run on one yet."""
    student = Optimiser(lr=3e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup=50, decay=0.3)
    common: dict[str, Any] = {"precision": "bf16", "compile": True, "save_every": 250}
    return {
        "flow": Stage(
            "flow", 3000, 64,
            Optimiser(5e-4, 2e-2, (0.9, 0.99), weight_decay=0.0, warmup=100, decay=0.3),
            options={"independent": 0.5, "drop": 0.1}, ema=0.995, **common,
        ),
        "teacher_forcing": Stage(
            "teacher_forcing", 700, 64, student, options={"drop": 0.1}, ema=0.99, **common
        ),
        "consistency": Stage(
            "consistency", 300, 64, dataclasses.replace(student, lr=1e-4),
            options={"guidance": 2.0, "intervals": 32}, ema=0.95, **common,
        ),
        "distribution_matching": Stage(
            "distribution_matching", 60, 64,
            Optimiser(5e-5, betas=(0.0, 0.99), weight_decay=0.0),
            critic=Optimiser(1e-4, betas=(0.0, 0.99), weight_decay=0.0),
            options={"guidance": 1.0, "critic_updates": 4}, ema=0.9, **common,
        ),
    }  # fmt: skip


def wan_1_3b() -> dict[str, Stage]:
    """The paper's three stages on 8 GPUs: learning rates, total batch and precision of its Table 4.

    Its text says batch 128 and its appendix 2 / 2 / 16: the batch is the text's, in passes of 2, 2
    and 1 samples a rank. The moving average's decay rises to .99 over some 900 steps, where the
    paper has it from the first. Numbers of steps are not given; 9.5 k is the
    last point of its Fig. 8, divided here in the proportion of common practice.
    """
    adam = Optimiser(lr=5e-6, betas=(0.0, 0.999), weight_decay=0.01)
    slower = dataclasses.replace(adam, lr=2e-6)
    common: dict[str, Any] = {"precision": "bf16", "recompute": True, "save_every": 250}
    return {
        "teacher_forcing": Stage("teacher_forcing", 6000, 128, adam, micro_batch=2, **common),
        "consistency": Stage(
            "consistency", 3000, 128, slower, micro_batch=2, ema=0.99,
            options={"guidance": 3.0}, **common,
        ),
        "distribution_matching": Stage(
            "distribution_matching", 500, 128, slower, micro_batch=1, ema=0.99,
            critic=dataclasses.replace(adam, lr=4e-7),
            options={"guidance": 3.0, "critic_updates": 5}, **common,
        ),
    }  # fmt: skip


RECIPES = {"mini": mini, "small": small, "wan-1.3b": wan_1_3b}


def stages(preset: str) -> dict[str, Stage]:
    """The stages of a preset by objective.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in RECIPES:
        known = ", ".join(name for name in MODELS if name in RECIPES)
        raise UserError(f"There are no stages for preset '{preset}'; there are some for {known}.")
    return RECIPES[preset]()


def changed(stage: Stage, settings: tuple[str, ...]) -> Stage:
    """The stage with ``name=value`` settings applied, such as ``steps=50``, ``optimiser.lr=1e-4``.

    Raises:
        UserError: a setting without ``=``, an unknown name, or a value of the wrong type.
    """
    import json

    data = to_dict(stage)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: give name=value, such as steps=50")
        *parents, last = name.strip().split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else {}
            if place is None:
                raise UserError(f"--set {setting}: the stage has no {parent}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        place[last] = value
    return from_dict(data, Stage, "--set")
