"""Flow matching of the bidirectional teacher: every frame sees every frame.

Shapes as in :mod:`mla_study.training.flow`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.training.batch import Batch, Draws
from mla_study.training.flow import (
    Weighting,
    add_noise,
    block_timesteps,
    weighted_loss,
)
from mla_study.training.objective import Objective, Role, Roles


def teacher_timesteps(
    batch: int,
    frames: int,
    shift: float,
    generator: torch.Generator,
    independent: float = 0.0,
) -> Float[Tensor, "{batch} {frames}"]:
    """Timesteps of a teacher's batch, float32: one a sample, and in some samples one a frame.

    A teacher that has seen frames of unequal noise is a better start for a chunk-causal student,
    whose chunks are at noise levels of their own.

    Args:
        shift: timestep shift of :func:`~mla_study.training.flow.block_timesteps`.
        generator: its device is that of the result.
        independent: probability of a sample to get a timestep a frame, 0 .. 1.
    """
    share = _probability("independent", independent)
    alone = block_timesteps(batch, frames, 1, shift, generator)
    together = block_timesteps(batch, frames, frames, shift, generator)
    drawn = torch.rand(batch, 1, generator=generator, device=generator.device)
    return torch.where(drawn < share, alone, together)


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}, but a probability lies from 0 to 1")
    return value


@dataclass(frozen=True)
class Flow(Objective):
    """Train a bidirectional teacher.

    Attributes:
        independent: share of samples with a timestep a frame.
        drop: share of captions dropped, for guidance.
    """

    independent: float = 0.0
    drop: float = 0.1
    weighting: Weighting = "uniform"

    def loss(self, turn: Role, roles: Roles, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Flow matching at (1 - sigma) x0 + sigma noise."""
        model, x0 = roles.get(turn), batch.latents
        assert x0 is not None
        frames, shift = x0.shape[2], model.config.flow.shift
        t = draws.each(lambda own: teacher_timesteps(1, frames, shift, own, self.independent))
        noise = draws.noise(*x0.shape[1:])
        context = dropped(batch.context, roles.null, self.drop, draws)
        flow = model(add_noise(x0, noise, t), t, model.condition(context))
        return {"loss": weighted_loss(flow, x0, noise, t, shift, self.weighting)}


def dropped(context: Tensor, null: Tensor, share: float, draws: Draws) -> Tensor:
    """Embeddings [B, T, E] with each sample's replaced by ``null`` at probability ``share``."""
    _probability("drop", share)
    lot = draws.each(lambda own: torch.rand((1, 1, 1), generator=own))
    return torch.where(lot < share, null.to(context), context)


OBJECTIVE = Flow
