"""Flow matching of the bidirectional teacher: every frame sees every frame.

Shapes as in :mod:`mla_study.training.flow`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.training.flow import (
    Weighting,
    block_timesteps,
    flow_matching_loss,
    loss_weights,
    per_frame,
)


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


def drop_captions(
    context: Float[Tensor, "B T text"],
    null: Float[Tensor, "#B T text"],
    share: float,
    generator: torch.Generator,
) -> Float[Tensor, "B T text"]:
    """Text embeddings in which each sample's is replaced by ``null`` with probability ``share``.

    What classifier-free guidance needs of the teacher: its unconditional prediction is the one
    at ``null``.
    """
    chance = _probability("share", share)
    shape = (context.shape[0], 1, 1)
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    return torch.where(drawn.to(context.device) < chance, null.to(context), context)


def teacher_loss(
    flow: Float[Tensor, "B C F height width"],
    x0: Float[Tensor, "B C F height width"],
    noise: Float[Tensor, "B C F height width"],
    t: Tensor,
    shift: float,
    weighting: Weighting = "uniform",
) -> Float[Tensor, ""]:
    """|flow - (noise - x0)|^2, mean over everything; weighted by timestep where asked.

    Args:
        flow: the teacher's prediction at (1 - sigma) x0 + sigma noise.
        x0, noise: clean latents and Gaussian noise.
        t: timesteps 0 .. 1000 of that input, float32 or float64: a scalar, [B] or [B, F].
        shift: timestep shift, which the ``bell`` weighting needs.
    """
    weight = loss_weights(per_frame(t, flow.shape[0], flow.shape[2]), shift, weighting)
    return flow_matching_loss(flow, x0, noise, weight)


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}, but a probability lies from 0 to 1")
    return value
