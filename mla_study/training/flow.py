"""What the objectives share: timesteps drawn a block, loss weights, and the flow-matching loss.

x_t = (1 - sigma) x0 + sigma noise with sigma = t / 1000, flow = noise - x0 (method, section
"Training"). The arithmetic is that of :mod:`mla_study.rollout.sampler`, offered here again.

Shapes: B batch, C channels, F latent frames, height x width of the latent. Latents are
[B, C, F, height, width] of any floating dtype, normalised by the codec; losses are computed in
float32 at least. A timestep tensor ``t`` is float32 or float64 on the scale 0 .. 1000,
where 0 is a clean latent: a scalar, one a sample [B], or one a frame [B, F].
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mla_study.errors import UserError
from mla_study.kernels.masks import chunks_of
from mla_study.rollout.sampler import (
    TRAIN_TIMESTEPS,
    Convention,
    Lookup,
    add_noise,
    bell_weight_at,
    flow_target,
    guide,
    shifted_timesteps,
    sigma_at,
    x0_from_flow,
)

__all__ = [
    "TRAIN_TIMESTEPS",
    "Convention",
    "Lookup",
    "Weighting",
    "add_noise",
    "block_draws",
    "block_timesteps",
    "flow_matching_loss",
    "flow_target",
    "guide",
    "loss_weights",
    "per_frame",
    "sigma_at",
    "weighted_loss",
    "wide",
    "x0_from_flow",
]

Weighting = Literal["bell", "uniform"]
"""How frames of different timesteps count. ``bell``: Self-Forcing's weights, highest at t = 500,
of mean 1 over the shifted table and 0 at t = 1000. ``uniform``: all 1."""


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least, in which all losses are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_frame(t: Tensor, batch: int, frames: int) -> Float[Tensor, "{batch} {frames}"]:
    """Timesteps, given as a scalar, [B] or [B, F], spelt out for every frame; dtype kept.

    Raises:
        UserError: a 16-bit dtype, or a shape that does not fit.
    """
    sigma_at(t)  # refuses what cannot hold a timestep
    spread = t[:, None] if t.ndim == 1 else t
    sizes = spread.shape
    if len(sizes) > 2 or any(n not in (1, m) for n, m in zip(sizes, (batch, frames), strict=False)):
        raise UserError(
            f"timesteps of shape {list(t.shape)} do not fit {batch} samples of {frames} frames: "
            "give one, one a sample, or one a frame"
        )
    return spread.expand(batch, frames)


def block_draws(
    batch: int,
    frames: int,
    chunk: int,
    low: int,
    high: int,
    generator: torch.Generator,
    first: int | None = None,
) -> Int[Tensor, "{batch} {frames}"]:
    """Whole numbers ``low`` .. ``high`` - 1, drawn once a sample and a block of ``chunk`` frames.

    Args:
        chunk: frames that share a draw; ``frames`` gives one a sample, 1 one a frame.
        generator: its device is that of the result.
        first: frames of a block of their own at the start.

    Raises:
        UserError: frames that do not fill whole blocks, or an empty range.
    """
    if low >= high:
        raise UserError(f"no number lies from {low} up to below {high}: give low < high")
    blocks = chunks_of(frames, chunk, first)
    device = generator.device
    drawn = torch.randint(low, high, (batch, len(blocks)), generator=generator, device=device)
    lengths = torch.tensor([len(block) for block in blocks], device=device)
    return drawn.repeat_interleave(lengths, dim=1, output_size=frames)


def block_timesteps(
    batch: int,
    frames: int,
    chunk: int,
    shift: float,
    generator: torch.Generator,
    low: int = 0,
    high: int = TRAIN_TIMESTEPS,
    first: int | None = None,
) -> Float[Tensor, "{batch} {frames}"]:
    """Timesteps of the training table, drawn once a sample and block; float32.

    A uniform whole number u in ``low`` < u <= ``high`` is moved to 1000 shift v / (1 + (shift - 1)
    v), v = u / 1000. So the values are entries of the table of 1000 points, 1000 among them and 0
    not, and the ``exact`` and ``table`` look-ups agree on them.

    Args:
        chunk, generator, first: as in :func:`block_draws`.
        shift: timestep shift, 5 for Wan.
        low, high: bounds before the shift, within 0 .. 1000.
    """
    if low < 0 or high > TRAIN_TIMESTEPS:
        raise UserError(f"timesteps from {low} to {high} leave the range 0 .. {TRAIN_TIMESTEPS}")
    drawn = block_draws(batch, frames, chunk, low + 1, high + 1, generator, first)
    return shifted_timesteps(drawn.double(), shift).float()


def loss_weights(t: Tensor, shift: float, weighting: Weighting) -> Tensor:
    """Weights of timesteps in the flow-matching loss; float64, the shape of ``t``.

    Args:
        t: timesteps of any shape.
        shift: shift of the table over which ``bell`` has mean 1.
    """
    if weighting not in get_args(Weighting):
        raise UserError(f"loss weighting '{weighting}': give {' or '.join(get_args(Weighting))}")
    if weighting == "bell":
        return bell_weight_at(t, shift)
    return torch.ones_like(sigma_at(t))


def flow_matching_loss(
    flow: Float[Tensor, "B C F height width"],
    x0: Float[Tensor, "B C F height width"],
    noise: Float[Tensor, "B C F height width"],
    weight: Float[Tensor, "B F"] | None = None,
) -> Float[Tensor, ""]:
    """mean over samples and frames of w |flow - (noise - x0)|^2, a mean over C, height, width.

    The flow-matching objective of the method's section "Training"; float32 at least. ``x0`` and
    ``noise`` are data: no gradient flows into them.

    Args:
        flow: the model's prediction at x_t, any floating dtype.
        x0, noise: the clean latent and the Gaussian noise that made x_t.
        weight: a weight a frame; None: all 1.
    """
    target = flow_target(wide(x0.detach()), wide(noise.detach()))
    error = (wide(flow) - target).square().mean(dim=(1, 3, 4))
    return error.mean() if weight is None else (weight.to(error) * error).mean()


def weighted_loss(
    flow: Float[Tensor, "B C F height width"],
    x0: Float[Tensor, "B C F height width"],
    noise: Float[Tensor, "B C F height width"],
    t: Tensor,
    shift: float,
    weighting: Weighting,
) -> Float[Tensor, ""]:
    """:func:`flow_matching_loss` with the weights of its timesteps.

    Args:
        flow: the prediction at (1 - sigma) x0 + sigma noise.
        t: timesteps of that input: a scalar, [B] or [B, F].
        shift: timestep shift of the table over which the ``bell`` weights have mean 1.
    """
    weight = loss_weights(per_frame(t, flow.shape[0], flow.shape[2]), shift, weighting)
    return flow_matching_loss(flow, x0, noise, weight)
