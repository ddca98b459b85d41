"""Distribution matching distillation: a generator moved along the difference of two scores.

The real score is a frozen teacher, guided; the fake score follows the generator's own output. Both
are asked at x_t = (1 - sigma) x + sigma noise of a generated clip x, and both speak as clean
latents x0 = x_t - sigma flow (Yin et al. 2024, "One-step Diffusion with Distribution Matching
Distillation", eq. 7 and 8; self-rollout as in Self-Forcing).

Shapes as in :mod:`mla_study.training.flow`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.rollout.sampler import flow_from_x0, shifted_timesteps
from mla_study.training.flow import (
    TRAIN_TIMESTEPS,
    Convention,
    block_draws,
    flow_matching_loss,
    guide,
    wide,
    x0_from_flow,
)

SCORE_BOUNDS = (20.0, 980.0)
"""Timesteps at which scores are asked: 2 % and 98 % of the range, after the shift."""


@dataclass(frozen=True)
class MixedTables:
    """The reference's look-ups, a deviation from the exact sigma = t / 1000.

    It turns the scores' flow into x0 by the table of one shift (the default of its model wrapper,
    8), and x0 into the flow that its critic loss scores by the table of another (the generator's,
    5). Nearest entries of the two differ, which scales the flow that is scored: by up to 20 % at
    timesteps below 50, and by less than 0.4 % above 500.
    """

    score: float = 8.0
    generator: float = 5.0


def bounded_timesteps(
    u: Tensor, shift: float, bounds: tuple[float, float] = SCORE_BOUNDS
) -> Tensor:
    """Uniform timesteps 0 .. 1000 moved to ``shift``, then clamped; float64, shape kept.

    As in the reference, a shift of 1 or less moves nothing.
    """
    moved = shifted_timesteps(u, max(shift, 1.0))
    return moved.clamp(*bounds)


def score_timesteps(
    batch: int,
    frames: int,
    shift: float,
    generator: torch.Generator,
    low: int = 0,
    high: int = TRAIN_TIMESTEPS,
    bounds: tuple[float, float] = SCORE_BOUNDS,
) -> Float[Tensor, "{batch} {frames}"]:
    """Timesteps at which both scores are asked, float32: one a sample, equal in all its frames.

    Args:
        shift: timestep shift.
        generator: its device is that of the result.
        low, high: range before the shift, ``low`` included; a schedule that follows the rollout's
            last step narrows it.
        bounds: clamp after the shift.
    """
    drawn = block_draws(batch, frames, frames, low, high, generator)
    return bounded_timesteps(drawn.double(), shift, bounds).float()


def score_x0(
    x_t: Float[Tensor, "B C F height width"],
    flow: Float[Tensor, "B C F height width"],
    t: Tensor,
    tables: MixedTables | None = None,
) -> Float[Tensor, "B C F height width"]:
    """The clean latent that a score's flow means: x_t - sigma flow, in the dtype of ``x_t``.

    Args:
        x_t, t: the score's input; t 0 .. 1000, float32 or float64: a scalar, [B] or [B, F].
        tables: None: sigma = t / 1000; else the reference's table for scores.
    """
    if tables is None:
        return x0_from_flow(x_t, flow, t)
    return x0_from_flow(x_t, flow, t, tables.score, "table")


def kl_gradient(
    x: Float[Tensor, "B C F height width"],
    fake_x0: Float[Tensor, "B C F height width"],
    real_cond: Float[Tensor, "B C F height width"],
    real_uncond: Float[Tensor, "B C F height width"],
    guidance: float,
    convention: Convention = "from_cond",
    normalise: bool = True,
) -> Float[Tensor, "B C F height width"]:
    """(fake - real) / mean |x - real|, real = guided teacher; float32 at least, without a graph.

    The gradient of KL(generated || real) in x up to a positive factor (DMD, eq. 7), and its
    normaliser, a mean over each sample (eq. 8). Where that is not finite, as at 0 / 0, it is 0.

    Args:
        x: the generated clip, clean.
        fake_x0: the fake score's clean latent, already guided where that is wanted.
        real_cond, real_uncond: the teacher's clean latents with the prompt and without.
        guidance: weight w of ``convention``. In distribution matching "CFG 3" is ``from_cond``:
            cond + 3 (cond - uncond), which samplers and consistency code call 4.
        normalise: divide by the mean over the sample's scalars.
    """
    with torch.no_grad():
        real = guide(wide(real_cond), wide(real_uncond), guidance, convention)
        gradient = wide(fake_x0) - real
        if normalise:
            gradient = gradient / (wide(x) - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def gradient_window(
    frames: int, skipped: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "1 1 {frames} 1 1"]:
    """A mask for :func:`generator_loss` that leaves out the first ``skipped`` frames.

    Those of a long rollout that are context only: their gradients would lead out of the window.
    """
    return (torch.arange(frames, device=device) >= skipped)[None, None, :, None, None]


def generator_loss(
    x: Float[Tensor, "B C F height width"],
    gradient: Float[Tensor, "B C F height width"],
    mask: Bool[Tensor, "#B #C #F #height #width"] | None = None,
) -> Float[Tensor, ""]:
    """Half the mean square of ``gradient``, whose own gradient in ``x`` is ``gradient`` / n.

    Equal to 0.5 mean |x - stopgrad(x - gradient)|^2 (DMD, eq. 7 as a loss), in float32 at least,
    without the rounding of that difference.

    Args:
        x: the generated clip, with its graph.
        gradient: from :func:`kl_gradient`; a constant here.
        mask: True where the loss counts; n is the number of scalars that do. None: all of them.

    Raises:
        UserError: a mask that leaves nothing.
    """
    gap = wide(x - x.detach()) + wide(gradient.detach())
    if mask is None:
        return 0.5 * gap.square().mean()
    counted = mask.to(x.device).expand_as(x)
    total = counted.sum()
    if not bool(total):
        raise UserError("the gradient mask leaves no frame to train on: widen the window")
    return 0.5 * torch.where(counted, gap, 0.0).square().sum() / total


def critic_loss(
    flow: Float[Tensor, "B C F height width"],
    x: Float[Tensor, "B C F height width"],
    noise: Float[Tensor, "B C F height width"],
    x_t: Float[Tensor, "B C F height width"],
    t: Tensor,
    tables: MixedTables | None = None,
) -> Float[Tensor, ""]:
    """mean |flow - (noise - x)|^2: flow matching of the fake score on generated clips.

    Args:
        flow: the fake score's prediction at (x_t, t), with its graph.
        x: the generated clip; no gradient flows into the generator.
        noise: what made x_t of x.
        x_t, t: the critic's input, which the deviation alone reads; t as in :func:`score_x0`.
        tables: None: exact; else the flow goes through x0 and back by the reference's two tables.
    """
    if tables is not None:
        x0 = score_x0(wide(x_t), wide(flow), t, tables)
        flow = flow_from_x0(wide(x_t), x0, t, tables.generator, "table")
    return flow_matching_loss(flow, x, noise)
