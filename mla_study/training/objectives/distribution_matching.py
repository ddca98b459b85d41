"""Distribution matching distillation: a generator moved along the difference of two scores.

The real score is a frozen teacher, guided; the fake score follows the generator's own output. Both
are asked at x_t = (1 - sigma) x + sigma noise of a generated clip x, and both speak as clean
latents x0 = x_t - sigma flow (Yin et al. 2024, "One-step Diffusion with Distribution Matching
Distillation", eq. 7 and 8; self-rollout as in Self-Forcing).

Shapes as in :mod:`mla_study.training.flow`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.kernels.masks import Positions
from mla_study.rollout.checks import Latents, as_clips, require_like, require_mask
from mla_study.rollout.sampler import flow_from_x0, shifted_timesteps
from mla_study.training.batch import Batch, Draws
from mla_study.training.flow import (
    TRAIN_TIMESTEPS,
    Convention,
    add_noise,
    block_draws,
    flow_matching_loss,
    guide,
    per_frame,
    wide,
    x0_from_flow,
)
from mla_study.training.objective import Objective, Role, Roles, both_flows
from mla_study.training.self_rollout import SelfRollout, draw_exit

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
    x_t: Latents,
    flow: Latents,
    t: Tensor | float,
    tables: MixedTables | None = None,
) -> Latents:
    """The clean latent that a score's flow means: x_t - sigma flow, in the dtype of ``x_t``.

    Args:
        x_t: the score's input, [B, C, F, height, width] or any other [B, ...].
        flow: its prediction, of the shape of ``x_t``.
        t: timesteps 0 .. 1000, float32 or float64: a number, a scalar, [B] or [B, F].
        tables: None: sigma = t / 1000; else the reference's table for scores.

    Raises:
        UserError: as in :func:`~mla_study.rollout.sampler.x0_from_flow`.
    """
    if tables is None:
        return x0_from_flow(x_t, flow, t)
    return x0_from_flow(x_t, flow, t, tables.score, "table")


def kl_gradient(
    x: Latents,
    fake_x0: Latents,
    real_cond: Latents,
    real_uncond: Latents,
    guidance: float,
    convention: Convention = "from_cond",
    normalise: bool = True,
) -> Latents:
    """(fake - real) / mean |x - real|, real = guided teacher; float32 at least, without a graph.

    The gradient of KL(generated || real) in x up to a positive factor (DMD, eq. 7), and its
    normaliser, a mean over each sample (eq. 8). Where that is not finite, as at 0 / 0, it is 0.

    Args:
        x: the generated clip, clean: [B, C, F, height, width], or [N, C, height, width], where each
            frame is a sample with a normaliser of its own.
        fake_x0: the fake score's clean latent, already guided where that is wanted.
        real_cond, real_uncond: the teacher's clean latents with the prompt and without; these
            three have the shape of ``x``, and so has the result.
        guidance: weight w of ``convention``. In distribution matching "CFG 3" is ``from_cond``:
            cond + 3 (cond - uncond), which samplers and consistency code call 4.
        normalise: divide by the mean over the sample's scalars.

    Raises:
        UserError: a shape that is none of latents, unequal shapes, another convention.
    """
    require_like(x, "x", fake_x0=fake_x0, real_cond=real_cond, real_uncond=real_uncond)
    as_clips(x, "x")  # refuses what has no samples
    whole = tuple(range(1, x.ndim))
    with torch.no_grad():
        real = guide(wide(real_cond), wide(real_uncond), guidance, convention)
        gradient = wide(fake_x0) - real
        if normalise:
            gradient = gradient / (wide(x) - real).abs().mean(dim=whole, keepdim=True)
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def gradient_window(
    frames: int, skipped: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "1 1 {frames} 1 1"]:
    """A mask for :func:`generator_loss` that leaves out the first ``skipped`` frames.

    Those of a long rollout that are context only: their gradients would lead out of the window.
    """
    return (torch.arange(frames, device=device) >= skipped)[None, None, :, None, None]


def generator_loss(
    x: Latents,
    gradient: Latents,
    mask: Tensor | None = None,
) -> Float[Tensor, ""]:
    """Half the mean square of ``gradient``, whose own gradient in ``x`` is ``gradient`` / n.

    Equal to 0.5 mean |x - stopgrad(x - gradient)|^2 (DMD, eq. 7 as a loss), in float32 at least,
    without the rounding of that difference.

    Args:
        x: the generated clip, with its graph: [B, C, F, height, width] or of any other shape.
        gradient: from :func:`kl_gradient`, of the shape of ``x``; a constant here.
        mask: bool, True where the loss counts; n is the number of scalars that do. Of the shape of
            ``x``, where any axis may be 1. None: all of them.

    Raises:
        UserError: unequal shapes, a mask that is not bool, does not fit, or leaves nothing.
    """
    require_like(x, "x", gradient=gradient)
    gap = wide(x - x.detach()) + wide(gradient.detach())
    if mask is None:
        return 0.5 * gap.square().mean()
    require_mask("mask", mask, x)
    counted = mask.to(x.device).expand_as(x)
    total = counted.sum()
    if not bool(total):
        raise UserError("the gradient mask leaves no frame to train on: widen the window")
    return 0.5 * torch.where(counted, gap, 0.0).square().sum() / total


def critic_loss(
    flow: Latents,
    x: Latents,
    noise: Latents,
    x_t: Latents,
    t: Tensor | float,
    tables: MixedTables | None = None,
) -> Float[Tensor, ""]:
    """mean |flow - (noise - x)|^2: flow matching of the fake score on generated clips.

    Args:
        flow: the fake score's prediction at (x_t, t), with its graph: [B, C, F, height, width], or
            [N, C, height, width] of single frames.
        x: the generated clip; no gradient flows into the generator.
        noise: what made x_t of x.
        x_t: the critic's input; these three have the shape of ``flow``.
        t: the critic's timesteps 0 .. 1000, float32 or float64: a number, a scalar, [B] or [B, F]
            ([N] or [N, 1] of single frames). The deviation alone reads ``x_t`` and ``t``.
        tables: None: exact; else the flow goes through x0 and back by the reference's two tables.

    Raises:
        UserError: a shape that is none of latents, unequal shapes, timesteps that do not fit, in 16
            bits or outside 0 .. 1000.
    """
    require_like(flow, "flow", x=x, noise=noise, x_t=x_t)
    batch, _, frames = as_clips(flow, "flow").shape[:3]
    per_frame(t, batch, frames)
    if tables is not None:
        x0 = score_x0(wide(x_t), wide(flow), t, tables)
        flow = flow_from_x0(wide(x_t), x0, t, tables.generator, "table")
    return flow_matching_loss(flow, x, noise)


@dataclass(frozen=True)
class DistributionMatching(Objective):
    """Match the teacher's distribution on the student's own rollouts (DMD, Self-Forcing).

    Attributes:
        guidance: of the real score, weight in cond + w (cond - uncond).
        critic_updates: of the fake score, before each one of the generator; at least 1.
        clips: how many training lengths a rollout has; scores see its last one.
        grad_frames: the last frames of a rollout that carry gradients, at least 1; None: all that
            are scored.
        score_range: timesteps before the shift at which scores are asked, the first included.
        mixed_tables: the reference's look-ups, see :class:`MixedTables`.
    """

    roles: ClassVar[tuple[Role, ...]] = ("teacher", "fake_score", "ema")
    needs_latents: ClassVar[bool] = False
    guidance: float = 3.0
    critic_updates: int = 5
    frames: int = 21
    clips: int = 1
    grad_frames: int | None = None
    positions: Positions | None = None
    score_range: tuple[int, int] = (0, TRAIN_TIMESTEPS)
    mixed_tables: bool = False

    def __post_init__(self) -> None:
        grad_frames = 1 if self.grad_frames is None else self.grad_frames
        if min(self.critic_updates, self.frames, self.clips, grad_frames) < 1:
            raise UserError(
                f"distribution_matching has critic_updates {self.critic_updates}, frames "
                f"{self.frames}, clips {self.clips} and grad_frames {self.grad_frames}: give at "
                "least 1 each; grad_frames may be left out, for all that are scored"
            )
        low, high = self.score_range
        if not 0 <= low < high <= TRAIN_TIMESTEPS:
            raise UserError(
                f"distribution_matching asks scores at timesteps {low} to {high}: score_range "
                f"rises, from 0 to {TRAIN_TIMESTEPS} at most"
            )

    def turns(self) -> tuple[Role, ...]:
        """The critic's updates, then the generator's."""
        critic: tuple[Role, ...] = ("fake_score",)
        return (*critic * self.critic_updates, "generator")

    def loss(self, turn: Role, roles: Roles, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The critic's flow matching, or the generator's step along the scores' difference."""
        model = roles.get("generator")
        shift = model.config.flow.shift
        training = turn == "generator"
        with torch.set_grad_enabled(training):
            x, skipped = self._rollout(roles, batch, draws, training)
        count, frames = x.shape[0], x.shape[2]
        low, high = self.score_range
        t = draws.each(lambda own: score_timesteps(1, frames, shift, own, low, high))
        noise = draws.noise(*x.shape[1:])
        x_t = add_noise(x.detach(), noise, t)
        fake = roles.get("fake_score")
        tables = MixedTables() if self.mixed_tables else None
        if not training:
            flow = fake(x_t, t, fake.condition(batch.context))
            return {"loss": critic_loss(flow, x, noise, x_t, t, tables)}
        teacher = roles.get("teacher")
        with torch.no_grad():
            guess = score_x0(x_t, fake(x_t, t, fake.condition(batch.context)), t, tables)
            cond, uncond = both_flows(teacher, x_t, t, batch.context, roles.null)
            real = score_x0(x_t, cond, t, tables), score_x0(x_t, uncond, t, tables)
        gradient = kl_gradient(x, guess, real[0], real[1], self.guidance)
        mask = gradient_window(frames, skipped, x.device) if skipped else None
        size = gradient.square().mean(dim=(1, 2, 3, 4)).sqrt().sum() / count
        return {"loss": generator_loss(x, gradient, mask), "gradient": size}

    def _rollout(
        self, roles: Roles, batch: Batch, draws: Draws, training: bool
    ) -> tuple[Tensor, int]:
        """The last training length of a rollout, and how many of its frames are context only."""
        model = roles.get("generator")
        total = self.frames * self.clips
        learnt = min(self.grad_frames or self.frames, self.frames)
        exit_step = draw_exit(len(model.config.flow.denoise_steps), draws)
        rollout = SelfRollout(model, self.positions, total - learnt if training else total)
        made = rollout.run(batch.context, total, exit_step, draws)
        return made[:, :, total - self.frames :], self.frames - learnt


OBJECTIVE = DistributionMatching
