"""What is looked at along a training run of the study: the held-out loss, and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mla_study.model.transformer import WanTransformer
from mla_study.training.batch import Batch, Data, Draws
from mla_study.training.flow import add_noise, block_timesteps, flow_matching_loss
from mla_study.training.objective import Roles
from mla_study.training.objectives.teacher_forcing import rule_for, teacher_forcing_flow

if TYPE_CHECKING:
    from mla_study.training.loop import Observer

HELD_OUT = 2**40
"""Number of the first sample that no run trains on."""


class HeldOutLoss:
    """Flow matching of every chunk over perfect history, on the same clips and noise each time.

    The plain mean over frames of |flow - (noise - x0)|^2 at timesteps of the training's own
    distribution.
    """

    def __init__(self, data: Data, config: Any, clips: int = 64) -> None:
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


def watchers(data: Data, start: WanTransformer, seed: int) -> Sequence[Observer]:
    """The observers of a student's run."""
    loss = HeldOutLoss(data, start.config)

    def held_out(step: int, roles: Roles) -> Iterable[dict[str, Any]]:
        yield {"name": "held_out", "value": loss(roles.ema or roles.generator)}

    return (held_out,)
