"""The trainer: one loop for every objective, on one process or torchrun's many.

A run lives in a folder: ``train.json`` (what it is), ``checkpoints``, ``log.parquet`` (step, name,
value), ``tensorboard``, and at the end ``model.safetensors`` (the moving average where there is
one) with ``run.json``. The same call goes on after an interruption, with the same numbers.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mla_study.config import ModelConfig, to_dict
from mla_study.errors import UserError
from mla_study.model.attention import LatentSelfAttention
from mla_study.model.transformer import WanTransformer
from mla_study.training.batch import Data, Draws
from mla_study.training.board import Board
from mla_study.training.checkpoint import Checkpoints, complete, step_of, whole_state
from mla_study.training.fit import require_fit
from mla_study.training.folder import claimed
from mla_study.training.objective import (
    TRAINED,
    Objective,
    Role,
    Roles,
    make_objective,
    require_loss,
)
from mla_study.training.optimisers import make_optimisers, set_rates
from mla_study.training.ranks import Ranks, accumulating
from mla_study.training.recipe import Optimiser, Stage

LOG_FILE = "log.parquet"
MODEL_FILE = "model.safetensors"

Record = dict[str, Any]
Observer = Callable[[int, Roles], Iterable[Record]]
"""(steps done, roles) -> further rows of the log: ``name``, ``value`` and columns of its own."""


@dataclass(frozen=True)
class Run:
    """What is trained, on what, where to.

    Attributes:
        start: the generator's weights.
        teacher: frozen weights, also the fake score's start; None: the generator's own.
        observers: asked after the steps in ``observe_at`` (0 is before the first).
        inputs: SHA-256 of what the weights came from, by name.
    """

    stage: Stage
    out: Path
    start: WanTransformer
    data: Data
    teacher: WanTransformer | None = None
    observers: Sequence[Observer] = ()
    observe_at: Sequence[int] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    def objective(self) -> Objective:
        """What the stage minimises."""
        return objective_of(self.stage)

    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to go on."""
        teacher = None if self.teacher is None else to_dict(self.teacher.config)
        free = ("save_every", "log_every", "micro_batch")
        stage = {k: v for k, v in to_dict(self.stage).items() if k not in free}
        return {
            "stage": stage,
            "model": to_dict(self.start.config),
            "teacher": teacher,
            "data": self.data.facts(),
            "inputs": dict(self.inputs),
        }


def objective_of(stage: Stage) -> Objective:
    """A stage's objective; one that rolls out gets the stage's number of frames."""
    made = make_objective(stage.objective, stage.options)
    if "frames" in made.__dataclass_fields__ and "frames" not in stage.options:
        made = replace(made, frames=stage.frames)  # type: ignore[call-arg]
    return made


def roles_of(stage: Stage, objective: Objective) -> tuple[Role, ...]:
    """The models of a stage: generator, what the objective names, and an average where asked."""
    needed = objective.roles
    average: tuple[Role, ...] = ("ema",) if stage.ema and "ema" not in needed else ()
    return ("generator", *needed, *average)


class Trainer:
    """Trains one run; :meth:`train` does all of it."""

    def __init__(self, run: Run, ranks: Ranks, progress: bool = True) -> None:
        self.run, self.ranks, self.stage = run, ranks, run.stage
        self.objective = run.objective()
        self.turns = self.objective.turns()
        ranks.share(self.stage.batch)
        teacher = None if run.teacher is None else run.teacher.config
        require_fit(run.stage, self.objective, run.start.config, teacher, run.data)
        self.progress = progress
        self.log: list[Record] = []
        self.step = 0
        self.roles = self._make_roles()
        trained = set(self.turns)
        self.optimisers = {
            role: make_optimisers(self.roles.get(role), self._optimiser(role)) for role in trained
        }
        kept = {r: m for r, m in self.roles.named().items() if r != "teacher"}
        self.checkpoints = Checkpoints(run.out, kept, self.optimisers, ranks)

    def _optimiser(self, role: Role) -> Optimiser:
        critic = self.stage.critic if role == "fake_score" else None
        return critic or self.stage.optimiser

    def _make_roles(self) -> Roles:
        run, stage = self.run, self.stage
        teacher = run.teacher or run.start
        made: dict[str, WanTransformer] = {}
        for role in roles_of(stage, self.objective):
            source = teacher if role in ("teacher", "fake_score") else run.start
            model = copy.deepcopy(source).to(self.ranks.device, torch.float32)
            model.train().requires_grad_(role in TRAINED)
            model.recompute = stage.recompute
            if stage.compile:
                compile_blocks(model)
            self.ranks.shard(model, stage.precision)
            made[role] = model
        null = self.run.data.null.to(self.ranks.device)
        return Roles(**made, null=null)  # type: ignore[arg-type]

    @property
    def result(self) -> WanTransformer:
        """The moving average where there is one, else the generator."""
        return self.roles.ema or self.roles.generator

    def train(self) -> Path:
        """Train to the end, from the start or from the last checkpoint; the model's file.

        Raises:
            UserError: another run's folder, a loss that is not finite, no space.
        """
        target = self.run.out / MODEL_FILE

        def begun() -> bool:
            return target.exists() or self.checkpoints.latest() is not None

        with claimed(self.run.out, self.run.identity(), self._observed(), self.ranks, begun):
            return self._train(target)

    def _train(self, target: Path) -> Path:
        out, stage = self.run.out, self.stage
        latest = self.checkpoints.latest()
        if latest is not None:
            self.step, self.log = self.checkpoints.load(latest)
        if target.exists() and self.step >= stage.steps:
            return target
        board = Board(out / "tensorboard", self.step) if self.ranks.first else None
        if self.step == 0:
            self._observe()
        bar = self._bar()
        try:
            while self.step < stage.steps:
                began = time.perf_counter()
                rows = self._one_step()
                self.step += 1
                if self.step in self.run.observe_at:
                    self._observe()
                if self.step % stage.log_every == 0 or self.step == stage.steps:
                    self.log += rows
                    if board is not None:
                        board.add(rows, time.perf_counter() - began)
                if bar is not None:
                    bar.set_postfix_str(f"loss {rows[-1]['value']:.4g}", refresh=False)
                    bar.update()
                if self.step % stage.save_every == 0 or self.step == stage.steps:
                    self._save()
        finally:
            if bar is not None:
                bar.close()
            if board is not None:
                board.close()
        self._finish(target)
        # none leaves while the first is still writing
        self.ranks.wait()
        return target

    def _one_step(self) -> list[Record]:
        """One update of each turn, then the moving average; the rows to log."""
        sums: dict[str, list[float]] = {}
        counts: dict[str, int] = {}
        for turn, role in enumerate(self.turns):
            share = 1 / self.turns.count(role)
            found = self._update(turn, role)
            for name, value in found.items():
                key = name if role == "generator" else f"{role}_{name}"
                sums.setdefault(key, []).append(value * share)
            counts[role] = counts.get(role, 0) + 1
        if self.roles.ema is not None:
            self._average(self.roles.ema, self.roles.generator)
        rows = [self._row(name, math.fsum(values)) for name, values in sums.items()]
        return sorted(rows, key=lambda row: row["name"] == "loss")

    def _row(self, name: str, value: float) -> Record:
        return {"step": self.step + 1, "name": name, "value": value}

    def _update(self, turn: int, role: Role) -> dict[str, float]:
        stage, model = self.stage, self.roles.get(role)
        chosen, optimisers = self._optimiser(role), self.optimisers[role]
        number = self.step * len(self.turns) + turn
        mine = [number * stage.batch + place for place in self.ranks.share(stage.batch)]
        micro = stage.micro_batch or len(mine)
        pieces = [mine[i : i + micro] for i in range(0, len(mine), micro)]
        terms: dict[str, Tensor] = {}
        for piece in pieces:
            batch = self.run.data.batch(piece).to(self.ranks.device)
            draws = Draws(stage.seed, piece, number, self.ranks.device)
            with accumulating(model, piece is pieces[-1]):
                made = self.objective.loss(role, self.roles, batch, draws)
                found = require_loss(made, stage.objective, role)
                weight = len(piece) / len(mine)
                (found["loss"] * weight).backward()
            for name, value in found.items():
                terms[name] = terms.get(name, 0) + weight * value.detach().float()
        norm = _clip(model, chosen.clip)
        own = torch.stack([*terms.values(), norm])
        values = self.ranks.mean(own.clone())
        held = dict(zip([*terms, "gradient_norm"], values.tolist(), strict=True))
        self._require_finite(held, role, own[:-1], mine)
        of_role = self.turns.count(role)
        update = self.step * of_role + self.turns[:turn].count(role)
        factor = chosen.factor(update, stage.steps * of_role)
        set_rates(optimisers, chosen, factor)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return held

    def _require_finite(
        self, found: Mapping[str, float], role: Role, own: Tensor, mine: Sequence[int]
    ) -> None:
        bad = [name for name, value in found.items() if not math.isfinite(value)]
        if not bad:
            return
        # the mean is NaN everywhere; a bad gradient alone is nobody's
        where = self.ranks.which(not bool(own.isfinite().all())) or range(self.ranks.count)
        spoilt = self.ranks.which(not self.run.data.batch(mine).finite())
        saved = complete(self.run.out)
        good = f"{saved[-1]} is the last good" if saved else "there is no checkpoint yet"
        if saved and not spoilt and step_of(saved[-1]) == self.step:
            # no step could be taken from it, and not for its data
            before = f"{saved[-2]} is the last good" if saved[1:] else "there is none before"
            good = f"{saved[-1]} led to this, {before}"
        advice = (
            f"the data of rank {', '.join(map(str, spoilt))} hold NaN or infinite values: mend them"
            if spoilt
            else "lower the learning rate, or look at the data of this step"
        )
        raise UserError(
            f"{self.stage.objective}, step {self.step + 1}, rank {', '.join(map(str, where))}: the "
            f"{role}'s {' and '.join(bad)} became NaN or infinite; {good}; {advice}"
        )

    @torch.no_grad()
    def _average(self, average: WanTransformer, model: WanTransformer) -> None:
        # the first steps weigh more, so that the start does not linger
        decay = min(self.stage.ema, (self.step + 1) / (self.step + 10))
        for old, new in zip(average.parameters(), model.parameters(), strict=True):
            _local(old).lerp_(_local(new), 1 - decay)

    def _observe(self) -> None:
        for observer in self.run.observers:
            with torch.no_grad():
                self.log += [{"step": self.step, **row} for row in observer(self.step, self.roles)]

    def _save(self) -> None:
        self.checkpoints.save(self.step, self.log)
        if self.ranks.first:
            from mla_study.study.runs import atomic_write, parquet_bytes

            atomic_write(self.run.out / LOG_FILE, parquet_bytes(self.table()))

    def table(self) -> Any:
        """The log as a data frame."""
        import pandas as pd

        return pd.DataFrame(self.log)

    def _finish(self, target: Path) -> None:
        state = whole_state(self.result)
        if not self.ranks.first:
            return
        from mla_study.checkpoints.wan.save import save_model
        from mla_study.study.runs import run_record

        record = run_record(
            config=self.run.identity(),
            inputs=dict(self.run.inputs),
            seed=self.stage.seed,
            modules=("mla_study.training.loop", *self._objective_module()),
            provenance="measured",
            validity="full",
            observed=self._observed(),
        )
        from mla_study.study.runs import atomic_write

        atomic_write(self.run.out / "run.json", (json.dumps(record, indent=1) + "\n").encode())
        # the last thing, which says that the run is done; atomic by itself
        config: ModelConfig = self.result.config
        save_model(state, target, "latent", config=config, overwrite=True)

    def _observed(self) -> dict[str, Any]:
        device = self.ranks.device
        threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
        return {"ranks": self.ranks.count, "device": str(device), **threads}

    def _objective_module(self) -> tuple[str, ...]:
        name = type(self.objective).__module__
        return (name,) if name.startswith("mla_study.") else ()

    def _bar(self) -> Any:
        if not (self.progress and self.ranks.first):
            return None
        from tqdm import tqdm

        return tqdm(
            total=self.stage.steps, initial=self.step, desc=self.stage.objective, unit="step"
        )


def compile_blocks(model: WanTransformer) -> None:
    """Compile a model's blocks, in place."""
    for block in model.blocks:
        attention = block.self_attn
        if isinstance(attention, LatentSelfAttention) and attention.form == "auto":
            # the choice reads files of rates, which breaks the graph
            attention.form = "reconstruct"
        block.compile()


def _clip(model: WanTransformer, largest: float) -> Tensor:
    parameters = [p for p in model.parameters() if p.grad is not None]
    limit = largest or math.inf
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole.float().detach()


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
