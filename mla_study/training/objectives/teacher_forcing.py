"""Teacher forcing: chunk-causal flow matching with the clean earlier frames as context.

Clean and noisy copies of a clip run in one sequence of 2 F frames under the mask of
:func:`mla_study.kernels.masks.teacher_forcing`; only the noisy half is scored (method, section
"Training"). With a window both copies see what the rollout's cache would hold, sink included.

Shapes as in :mod:`mla_study.training.flow`.

Example::

    t = block_timesteps(batch, frames, window.chunk, shift, generator)
    rule = teacher_forcing(frames, window.chunk, window, "relative")
    flow = teacher_forcing_flow(model, add_noise(x0, noise, t), x0, t, conditioning, rule)
    loss = teacher_forcing_loss(flow, x0, noise, t, shift)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import Positions, Visibility, teacher_forcing
from mla_study.model.transformer import Conditioning, WanTransformer
from mla_study.rollout.checks import Latents, require_like
from mla_study.rollout.stream import positions_of
from mla_study.training.batch import Batch, Draws
from mla_study.training.flow import (
    Weighting,
    add_noise,
    block_timesteps,
    per_frame,
    weighted_loss,
)
from mla_study.training.objective import Objective, Role, Roles
from mla_study.training.objectives.flow import dropped

__all__ = [
    "TeacherForcing",
    "clean_and_noisy",
    "rule_for",
    "teacher_forcing",
    "teacher_forcing_flow",
    "teacher_forcing_loss",
]


def clean_and_noisy(
    clean: Latents,
    noisy: Float[Tensor, "B C F height width"],
    t: Tensor | float,
    clean_t: Tensor | float | None = None,
) -> tuple[Float[Tensor, "B C 2*F height width"], Float[Tensor, "B 2*F"]]:
    """The sequence of teacher forcing and its timesteps: frames 0 .. F-1 clean, then the noisy.

    Args:
        clean: context latents; those of noise augmentation are x_t at ``clean_t``.
        noisy: latents to denoise, of the shape of ``clean``: [B, C, F, height, width].
        t: timesteps 0 .. 1000 of ``noisy``, float32 or float64: a number, a scalar, [B] or [B, F].
        clean_t: the same of ``clean``; None: 0, a clean latent.

    Raises:
        UserError: unequal shapes, timesteps as in :func:`~mla_study.training.flow.per_frame`.
    """
    require_like(noisy, "noisy", clean=clean)
    batch, _, frames = noisy.shape[:3]
    times = per_frame(t, batch, frames).to(noisy.device)
    earlier = 0.0 if clean_t is None else clean_t
    both = torch.cat([per_frame(earlier, batch, frames, "clean_t").to(times), times], dim=1)
    return torch.cat([clean.to(noisy), noisy], dim=2), both


def teacher_forcing_flow(
    model: WanTransformer,
    noisy: Float[Tensor, "B C F height width"],
    clean: Latents,
    t: Tensor | float,
    conditioning: Conditioning,
    rule: Visibility,
    clean_t: Tensor | float | None = None,
) -> Float[Tensor, "B C2 F height width"]:
    """The model's flow at every noisy frame, given the clean frames before its chunk.

    One pass stands for one step of each chunk of a rollout over perfect history; consistency
    distillation asks student, target and teacher in this way too.

    Args:
        noisy, clean, t, clean_t: as in :func:`clean_and_noisy`.
        conditioning: of the prompts, from ``model.condition``.
        rule: from :func:`mla_study.kernels.masks.teacher_forcing` for F frames.

    Raises:
        UserError: a rule of another number of frames, and as in :func:`clean_and_noisy`.
    """
    frames = noisy.shape[2]
    if rule.frames != 2 * frames:
        raise UserError(
            f"the rule is for {rule.frames} frames, but clean and noisy copies of {frames} are "
            f"{2 * frames}: make it by teacher_forcing({frames}, ...)"
        )
    both, times = clean_and_noisy(clean, noisy, t, clean_t)
    return model(both, times, conditioning, rule)[:, :, frames:]


def teacher_forcing_loss(
    flow: Latents,
    clean: Latents,
    noise: Latents,
    t: Tensor | float,
    shift: float,
    weighting: Weighting = "bell",
) -> Float[Tensor, ""]:
    """mean over samples and frames of w(t) |flow - (noise - clean)|^2 (flow matching).

    Args:
        flow: the noisy half's prediction, see :func:`teacher_forcing_flow`:
            [B, C, F, height, width], or [N, C, height, width] of single frames.
        clean, noise: clean latents and the Gaussian noise that was added to them, of that shape.
        t: timesteps 0 .. 1000 of the noisy half, float32 or float64: a number, a scalar, [B] or
            [B, F] ([N] or [N, 1] of single frames).
        shift: timestep shift of the table over which the ``bell`` weights have mean 1.

    Raises:
        UserError: a shape that is none of latents, unequal shapes, another weighting, timesteps
            that do not fit, in 16 bits or outside 0 .. 1000.
    """
    require_like(flow, "flow", clean=clean, noise=noise)
    return weighted_loss(flow, clean, noise, t, shift, weighting)


def rule_for(
    config: ModelConfig, frames: int, windowed: bool, positions: Positions | None
) -> Visibility:
    """The teacher-forcing rule of a model: its chunk, and its window where ``windowed``."""
    window = config.window if windowed else None
    return teacher_forcing(frames, config.window.chunk, window, positions_of(config, positions))


@dataclass(frozen=True)
class TeacherForcing(Objective):
    """Train a chunk-causal student on data.

    Attributes:
        windowed: see what the rollout's cache would hold, sink included; else all earlier frames.
        positions: temporal positions; None: the rollout's own.
        drop: share of captions dropped.
    """

    windowed: bool = True
    positions: Positions | None = None
    drop: float = 0.0
    weighting: Weighting = "bell"

    def loss(self, turn: Role, roles: Roles, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Flow matching of every chunk over perfect history."""
        model, x0 = roles.get(turn), batch.latents
        assert x0 is not None
        config, frames = model.config, x0.shape[2]
        chunk, shift = config.window.chunk, config.flow.shift
        t = draws.each(lambda own: block_timesteps(1, frames, chunk, shift, own))
        noise = draws.noise(*x0.shape[1:])
        told = model.condition(dropped(batch.context, roles.null, self.drop, draws))
        rule = rule_for(config, frames, self.windowed, self.positions)
        flow = teacher_forcing_flow(model, add_noise(x0, noise, t), x0, t, told, rule)
        return {"loss": teacher_forcing_loss(flow, x0, noise, t, shift, self.weighting)}


OBJECTIVE = TeacherForcing
