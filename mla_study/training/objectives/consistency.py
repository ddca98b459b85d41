"""Consistency distillation: a student whose x0 is the same all along the teacher's guided flow.

A grid of falling timesteps ends at 0. From x_t the guided teacher makes one Euler step to x_t';
the student's x0 at (x_t, t) is drawn to that of its moving average at (x_t', t') (Song et al. 2023,
"Consistency Models", eq. 7, with the flow's own x0 = x_t - sigma flow as the consistency function,
whose boundary condition holds by itself: sigma = 0 returns the input).

Shapes as in :mod:`mla_study.training.flow`.

Example::

    grid = consistency_grid(48, shift)
    t, later = interval_timesteps(grid, batch, frames, chunk, generator)
    x_t = add_noise(x0, noise, t)
    x_next = consistency_step(x_t, cond, uncond, t, later, guidance=3.0)
    loss = consistency_loss(x0_from_flow(x_t, student, t), x0_from_flow(x_next, average, later))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.kernels.masks import Positions
from mla_study.rollout.checks import Latents, require_like, require_shape
from mla_study.rollout.sampler import over_latents, timestep_table
from mla_study.training.batch import Batch, Draws
from mla_study.training.flow import (
    Convention,
    add_noise,
    block_draws,
    guide,
    sigma_at,
    wide,
    x0_from_flow,
)
from mla_study.training.objective import Objective, Role, Roles, condition_both
from mla_study.training.objectives.teacher_forcing import rule_for, teacher_forcing_flow

__all__ = [
    "HUBER",
    "Consistency",
    "Distance",
    "consistency_grid",
    "consistency_loss",
    "consistency_step",
    "interval_timesteps",
    "x0_from_flow",
]

HUBER = 0.00054
"""Constant of the pseudo-Huber distance for a root mean square over D scalars: Song and Dhariwal
(2024, "Improved Techniques for Training Consistency Models", sec. 3.3) take 0.00054 sqrt(D) for the
Euclidean norm, which divided by sqrt(D) is this."""

Distance = Literal["pseudo_huber", "squared"]


def consistency_grid(intervals: int, shift: float) -> Float[Tensor, " N"]:
    """``intervals`` + 1 timesteps falling from 1000 to 0, uniform before the shift; float64.

    All but the last are those of the reference's grid, which stops one interval above 0 and so
    never trains the interval that ties x0 to the data.

    Raises:
        UserError: fewer than one interval, or a shift that is not positive.
    """
    if intervals < 1:
        raise UserError(f"a grid of {intervals} intervals is none: give at least 1")
    return timestep_table(shift, intervals + 1, extra_one_step=False)


def interval_timesteps(
    grid: Float[Tensor, " N"],
    batch: int,
    frames: int,
    chunk: int,
    generator: torch.Generator,
    first: int | None = None,
) -> tuple[Float[Tensor, "{batch} {frames}"], Float[Tensor, "{batch} {frames}"]]:
    """Neighbouring timesteps (t, t') of the grid, t > t', drawn uniformly; float32.

    Args:
        grid: falling timesteps, see :func:`consistency_grid`.
        chunk, generator, first: as in :func:`~mla_study.training.flow.block_draws`; a ``chunk`` of
            ``frames`` draws one interval a sample.
    """
    drawn = block_draws(batch, frames, chunk, 0, grid.numel() - 1, generator, first)
    points = grid.to(drawn.device, torch.float32)
    return points[drawn], points[drawn + 1]


def consistency_step(
    x_t: Latents,
    flow_cond: Latents,
    flow_uncond: Latents | None,
    t: Tensor | float,
    t_next: Tensor | float,
    guidance: float,
    convention: Convention = "from_uncond",
) -> Latents:
    """One Euler step of dx / dsigma = flow along the guided teacher: x_t + (sigma' - sigma) flow.

    Computed in float32 at least, returned in the dtype of ``x_t`` and cut from the graph: nothing
    flows into the teacher.

    Args:
        x_t: latents at ``t``, [B, C, F, height, width] or any other [B, ...].
        flow_cond, flow_uncond: the teacher's flow at (x_t, t) with the prompt and without, of the
            shape of ``x_t``; without the second there is no guidance.
        t, t_next: timesteps 0 .. 1000, float32 or float64, t_next <= t: numbers, scalars, [B] or
            [B, F]. At ``t_next`` = 0 the result is the teacher's x0.
        guidance: weight w of ``convention``. In consistency code "CFG 3" is ``from_uncond``:
            uncond + 3 (cond - uncond), which distribution matching calls 2.

    Raises:
        UserError: flows of another shape, timesteps that do not fit, in 16 bits or outside
            0 .. 1000, a step towards more noise.
    """
    require_like(x_t, "x_t", flow_cond=flow_cond, flow_uncond=flow_uncond)
    sigma, later = (
        over_latents(sigma_at(time, name=name), wide(x_t), name)
        for name, time in (("t", t), ("t_next", t_next))
    )
    if bool((later > sigma).any()):
        raise UserError("a consistency step goes to less noise, but t_next is above t: swap them")
    with torch.no_grad():
        flow = wide(flow_cond)
        if flow_uncond is not None:
            flow = guide(flow, wide(flow_uncond), guidance, convention)
        return (wide(x_t) + (later - sigma) * flow).to(x_t.dtype)


def consistency_loss(
    student_x0: Latents,
    ema_x0: Latents,
    weight: Float[Tensor, "..."] | None = None,
    distance: Distance = "pseudo_huber",
    constant: float = HUBER,
) -> Float[Tensor, ""]:
    """Mean over samples of the distance of two clean latents; float32 at least.

    With m the mean square of their difference over a sample's scalars, ``pseudo_huber`` is
    sqrt(m + c^2) - c and ``squared`` is m. No gradient flows into ``ema_x0``.

    Args:
        student_x0: x_t - sigma flow of the student at t, [B, C, F, height, width] or any other
            [B, ...].
        ema_x0: the same of its moving average at the step's end, t', of equal shape.
        weight: a weight a sample, [B]; None: all 1.
        constant: c > 0 in the units of the latents. The default is the published 0.00054 sqrt(D),
            divided by sqrt(D) like the distance, so that neither depends on the size of a clip.

    Raises:
        UserError: unequal shapes, a weight of another shape, a sample that is one number, another
            distance, a constant that is not positive.
    """
    if distance not in get_args(Distance):
        raise UserError(f"distance '{distance}': give {' or '.join(get_args(Distance))}")
    if not constant > 0:
        raise UserError(f"the pseudo-Huber constant is {constant}, but it must be positive")
    if student_x0.ndim < 2:
        raise UserError(
            f"student_x0 has shape {list(student_x0.shape)}, but samples of latents are wanted, "
            "[B, C, F, height, width]"
        )
    require_like(student_x0, "student_x0", ema_x0=ema_x0)
    if weight is not None:
        require_shape("weight", weight, student_x0.shape[:1], "one a sample")
    gap = wide(student_x0) - wide(ema_x0.detach())
    far = gap.square().flatten(1).mean(dim=1)
    if distance == "pseudo_huber":
        # sqrt(m + c^2) - c without the cancellation at small m
        far = far / ((far + constant**2).sqrt() + constant)
    return far.mean() if weight is None else (weight.to(far) * far).mean()


@dataclass(frozen=True)
class Consistency(Objective):
    """Distil a chunk-causal teacher's guided flow into few steps, over perfect history.

    The teacher is asked causally, as the student is: a dense model after teacher forcing.

    Attributes:
        guidance: weight in uncond + w (cond - uncond); at 1 the teacher is not guided.
        intervals: of the grid from 1000 to 0.
        windowed, positions: as in teacher forcing.
    """

    roles: ClassVar[tuple[Role, ...]] = ("teacher", "ema")
    guidance: float = 3.0
    intervals: int = 48
    windowed: bool = True
    positions: Positions | None = None
    distance: Distance = "pseudo_huber"
    constant: float = HUBER

    def loss(self, turn: Role, roles: Roles, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Distance of the student's x0 at t from its average's at the teacher's step to t'."""
        model, x0 = roles.get(turn), batch.latents
        assert x0 is not None
        config, frames = model.config, x0.shape[2]
        grid = consistency_grid(self.intervals, config.flow.shift)
        t, later = draws.pairs(
            lambda own: interval_timesteps(grid, 1, frames, config.window.chunk, own)
        )
        x_t = add_noise(x0, draws.noise(*x0.shape[1:]), t)
        x_next = self._teacher_step(roles, x_t, x0, t, later, batch.context)
        with torch.no_grad():
            target = self._x0(roles, "ema", x_next, x0, later, batch.context)
        made = self._x0(roles, turn, x_t, x0, t, batch.context)
        return {"loss": consistency_loss(made, target, None, self.distance, self.constant)}

    def _x0(
        self, roles: Roles, role: Role, x: Tensor, clean: Tensor, t: Tensor, context: Tensor
    ) -> Tensor:
        model = roles.get(role)
        rule = rule_for(model.config, x.shape[2], self.windowed, self.positions)
        flow = teacher_forcing_flow(model, x, clean, t, model.condition(context), rule)
        return x0_from_flow(x, wide(flow), t)

    @torch.no_grad()
    def _teacher_step(
        self, roles: Roles, x_t: Tensor, clean: Tensor, t: Tensor, later: Tensor, context: Tensor
    ) -> Tensor:
        teacher = roles.get("teacher")
        rule = rule_for(teacher.config, x_t.shape[2], self.windowed, self.positions)
        if self.guidance == 1:
            told = teacher.condition(context)
            flow = teacher_forcing_flow(teacher, x_t, clean, t, told, rule)
            return consistency_step(x_t, flow, None, t, later, 1.0)
        told = condition_both(teacher, context, roles.null)
        twice = [torch.cat([part, part]) for part in (x_t, clean, t)]
        cond, uncond = teacher_forcing_flow(
            teacher, twice[0], twice[1], twice[2], told, rule
        ).chunk(2)
        return consistency_step(x_t, cond, uncond, t, later, self.guidance)


OBJECTIVE = Consistency
