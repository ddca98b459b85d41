"""What the objectives share: timesteps drawn a block, loss weights, and the flow-matching loss.

x_t = (1 - sigma) x0 + sigma noise with sigma = t / 1000, flow = noise - x0 (method, section
"Training"). The arithmetic is that of :mod:`mla_study.rollout.sampler`, offered here again.

Shapes: B batch, C channels, F latent frames, height x width of the latent. Latents are
[B, C, F, height, width] of any floating dtype, normalised by the codec; losses are computed in
float32 at least. They take [N, C, height, width] too, where each of N samples is one frame; what
is a mean over a sample is then one over a frame. A timestep tensor ``t`` is float32 or float64 on
the scale 0 .. 1000, where 0 is a clean latent: a number, a scalar, one a sample [B], or one a frame
[B, F] ([N] or [N, 1] of single frames). Nothing is broadcast but timesteps and masks.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mla_study.errors import UserError
from mla_study.kernels.masks import chunks_of
from mla_study.rollout.checks import Latents, as_clips, require_like, require_shape, timesteps
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


def per_frame(
    t: Tensor | float, batch: int, frames: int, name: str = "t"
) -> Float[Tensor, "{batch} {frames}"]:
    """Timesteps, given as a scalar, [B] or [B, F], spelt out for every frame.

    Floating dtypes are kept, numbers and integers become float64; messages call them ``name``.

    Raises:
        UserError: a 16-bit dtype, a shape that does not fit, NaN or outside 0 .. 1000.
    """
    t = timesteps(t, name)
    spread = t[:, None] if t.ndim == 1 else t
    sizes = spread.shape
    if len(sizes) > 2 or any(n not in (1, m) for n, m in zip(sizes, (batch, frames), strict=False)):
        raise UserError(
            f"timesteps {name} of shape {list(t.shape)} do not fit {batch} samples of {frames} "
            "frames: give one, one a sample, or one a frame"
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


def loss_weights(t: Tensor | float, shift: float, weighting: Weighting) -> Tensor:
    """Weights of timesteps in the flow-matching loss; float64, the shape of ``t``.

    Args:
        t: timesteps of any shape.
        shift: shift of the table over which ``bell`` has mean 1.

    Raises:
        UserError: another weighting; timesteps in 16 bits, NaN or outside 0 .. 1000.
    """
    if weighting not in get_args(Weighting):
        raise UserError(f"loss weighting '{weighting}': give {' or '.join(get_args(Weighting))}")
    if weighting == "bell":
        return bell_weight_at(t, shift)
    return torch.ones_like(sigma_at(t))


def flow_matching_loss(
    flow: Latents,
    x0: Latents,
    noise: Latents,
    weight: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """mean over samples and frames of w |flow - (noise - x0)|^2, a mean over C, height, width.

    The flow-matching objective of the method's section "Training"; float32 at least. ``x0`` and
    ``noise`` are data: no gradient flows into them.

    Args:
        flow: the model's prediction at x_t, [B, C, F, height, width] or [N, C, height, width], any
            floating dtype.
        x0, noise: the clean latent and the Gaussian noise that made x_t, of that shape.
        weight: a weight a frame, [B, F] ([N] or [N, 1] of single frames); None: all 1.

    Raises:
        UserError: a shape that is none of latents, or differs from the one wanted.
    """
    require_like(flow, "flow", x0=x0, noise=noise)
    predicted = as_clips(wide(flow), "flow")
    target = as_clips(flow_target(wide(x0.detach()), wide(noise.detach())), "x0")
    error = (predicted - target).square().mean(dim=(1, 3, 4))
    if weight is None:
        return error.mean()
    single = flow.ndim == 4 and weight.ndim == 1
    require_shape("weight", weight, error.shape[: 1 if single else 2], "one a frame")
    return (weight.to(error).reshape(error.shape) * error).mean()


def weighted_loss(
    flow: Latents,
    x0: Latents,
    noise: Latents,
    t: Tensor | float,
    shift: float,
    weighting: Weighting,
) -> Float[Tensor, ""]:
    """:func:`flow_matching_loss` with the weights of its timesteps.

    Args:
        flow: the prediction at (1 - sigma) x0 + sigma noise, [B, C, F, height, width] or
            [N, C, height, width].
        x0, noise: the clean latent and the noise, of the shape of ``flow``.
        t: timesteps of that input: a scalar, [B] or [B, F] ([N] or [N, 1] of single frames).
        shift: timestep shift of the table over which the ``bell`` weights have mean 1.

    Raises:
        UserError: as in :func:`flow_matching_loss`, :func:`per_frame` and :func:`loss_weights`.
    """
    batch, _, frames = as_clips(flow, "flow").shape[:3]
    weight = loss_weights(per_frame(t, batch, frames), shift, weighting)
    return flow_matching_loss(flow, x0, noise, weight)
