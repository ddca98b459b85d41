"""What is looked at along a training run of the study: the held-out loss, and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.model.transformer import WanTransformer
from mla_study.probes.tracker import State, Tracker, attention_inputs
from mla_study.training.batch import Batch, Data, Draws
from mla_study.training.flow import add_noise, block_timesteps, flow_matching_loss
from mla_study.training.objective import Roles
from mla_study.training.objectives.teacher_forcing import rule_for, teacher_forcing_flow

HELD_OUT = 2**40
"""Number of the first sample that no run trains on."""


class HeldOutLoss:
    """Flow matching of every chunk over perfect history, on the same clips and noise each time.

    The plain mean over frames of |flow - (noise - x0)|^2 at timesteps of the training's own
    distribution.
    """

    def __init__(self, data: Data, config: ModelConfig, clips: int = 64) -> None:
        samples = range(HELD_OUT, HELD_OUT + clips)
        batch: Batch = data.batch(samples)
        assert batch.latents is not None
        self.x0, self.context = batch.latents, batch.context
        draws = Draws(0, samples, 0)
        frames, window = self.x0.shape[2], config.window
        self.t: Tensor = draws.each(
            lambda own: block_timesteps(1, frames, window.chunk, config.flow.shift, own)
        )
        self.noise = draws.noise(*self.x0.shape[1:])

    @torch.no_grad()
    def __call__(self, model: WanTransformer) -> float:
        """The loss of a model, in its training mode or not."""
        rule = rule_for(model.config, self.x0.shape[2], True, None)
        x_t = add_noise(self.x0, self.noise, self.t)
        told = model.condition(self.context)
        flow = teacher_forcing_flow(model, x_t, self.x0, self.t, told, rule)
        return float(flow_matching_loss(flow, self.x0, self.noise))


@dataclass(frozen=True)
class Compared:
    """States of models that ranks stand beside; see :class:`~mla_study.probes.tracker.Tracker`.

    Attributes:
        start: the student before any training.
        source: the dense teacher.
        untrained: of the student's shapes, made of a network that has seen nothing.
        others: further inits of the student's shapes, by name.
    """

    start: State
    source: State
    untrained: State
    others: Mapping[str, State]


class Watch:
    """An observer: the held-out loss, and ranks on the inputs that it is computed from."""

    def __init__(self, data: Data, config: ModelConfig, compared: Compared | None) -> None:
        self.loss = HeldOutLoss(data, config)
        self.few = HeldOutLoss(data, config, 8)
        self.tracker = None
        if compared is not None:
            references = {"start": compared.start, **compared.others}
            self.tracker = Tracker(compared.source, compared.untrained, references)

    def __call__(self, step: int, roles: Roles) -> Iterable[dict[str, Any]]:
        """Rows for the log, of the model that the run will give."""
        model = roles.ema or roles.generator
        rows: list[dict[str, Any]] = [{"name": "held_out", "value": self.loss(model)}]
        if self.tracker is not None:
            inputs = attention_inputs(model, lambda: self.few(model))
            for row in self.tracker.measure(model, step, inputs):
                rows.append({"name": row.pop("metric"), **row})
        return rows
