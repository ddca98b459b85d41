"""Rectified flow: noise schedules, conversions between flow, x0 and noise, and ODE solvers.

x_t = (1 - sigma) x0 + sigma noise, flow = noise - x0, and a timestep is t = 1000 sigma (method,
section "Training"). A timestep tensor is a scalar, one a sample [B], or one a frame [B, F] of
latents [B, C, F, height, width]; its dtype is float32 or float64, for bfloat16 cannot tell 937.5
from 936. A number, or integers, do as well. Timesteps lie in 0 .. 1000: others and NaN are refused
where they are on the CPU, and give NaN where they are on a GPU. Shapes: B batch, F latent frames,
N entries of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.rollout.checks import TRAIN_TIMESTEPS, require_like, timesteps

Lookup = Literal["exact", "table"]
"""How a timestep becomes a sigma. ``exact``: t / 1000, so that t = 0 is a clean latent. ``table``:
the sigma of the nearest of the 1000 table entries, as Self-Forcing does it; there t = 0 is the last
entry, 0.005 at shift 5."""

Convention = Literal["from_cond", "from_uncond"]
"""Where guidance starts: cond + w (cond - uncond), or uncond + w (cond - uncond)."""

Solver = Literal["euler", "unipc", "dpmpp"]

Velocity = Callable[[Tensor, Tensor], Tensor]


def shifted_sigma(u: Tensor | float, shift: float) -> Tensor:
    """shift u / (1 + (shift - 1) u): the noise level of a uniform time u in [0, 1]; float64."""
    if not shift > 0:
        raise UserError(f"the timestep shift is {shift}, but it must be positive")
    uniform = torch.as_tensor(u, dtype=torch.float64)
    return shift * uniform / (1 + (shift - 1) * uniform)


def shifted_timesteps(t: Tensor | float, shift: float) -> Tensor:
    """Uniform timesteps 0 .. 1000 moved to the noise levels of ``shift``; float64, shape kept.

    Raises:
        UserError: timesteps as in :func:`sigma_at`, or a shift that is not positive.
    """
    return TRAIN_TIMESTEPS * shifted_sigma(timesteps(t).double() / TRAIN_TIMESTEPS, shift)


def sigma_table(
    shift: float, steps: int = TRAIN_TIMESTEPS, extra_one_step: bool = True
) -> Float[Tensor, " N"]:
    """Falling sigmas of ``steps`` points, the first 1; float64.

    ``extra_one_step`` ends one step above 0, so that a solver's last step goes to 0; without it
    the table itself ends at 0.

    Raises:
        UserError: fewer than one step, or a shift that is not positive.
    """
    if steps < 1:
        raise UserError(f"a schedule of {steps} steps is none: give at least 1")
    points = steps + 1 if extra_one_step else steps
    return shifted_sigma(torch.linspace(1, 0, points, dtype=torch.float64)[:steps], shift)


def timestep_table(
    shift: float, steps: int = TRAIN_TIMESTEPS, extra_one_step: bool = True
) -> Float[Tensor, " N"]:
    """1000 times :func:`sigma_table`; float64."""
    return TRAIN_TIMESTEPS * sigma_table(shift, steps, extra_one_step)


def warped_steps(steps: Sequence[float], shift: float) -> Float[Tensor, " N"]:
    """The few-step schedule moved to ``shift``; float64.

    (1000, 750, 500, 250) at shift 5 is 1000, 937.5, 833.33, 625 (method, "Chunk-causal rollout").
    """
    given = torch.tensor([float(step) for step in steps], dtype=torch.float64)
    if given.numel() == 0 or bool((given < 0).any() | (given > TRAIN_TIMESTEPS).any()):
        raise UserError(f"few-step schedule {list(steps)} must hold timesteps from 0 to 1000")
    return shifted_timesteps(given, shift)


def sigma_at(
    t: Tensor | float, lookup: Lookup = "exact", shift: float = 5.0, name: str = "t"
) -> Tensor:
    """Noise level of timesteps of any shape; float64.

    Args:
        t: timesteps 0 .. 1000, which messages call ``name``.
        shift: of the table; the ``exact`` look-up has none.

    Raises:
        UserError: an unknown look-up; timesteps in a 16-bit dtype, NaN or outside 0 .. 1000.
    """
    if lookup not in get_args(Lookup):
        raise UserError(f"look-up '{lookup}': give {' or '.join(get_args(Lookup))}")
    times = timesteps(t, name).double()
    if lookup == "exact":
        return times / TRAIN_TIMESTEPS
    table = sigma_table(shift).to(times.device)
    return _entries(table, times, TRAIN_TIMESTEPS * table)


def add_noise(
    x0: Tensor, noise: Tensor, t: Tensor | float, shift: float = 5.0, lookup: Lookup = "exact"
) -> Tensor:
    """(1 - sigma) x0 + sigma noise in the dtype of ``x0``; computed in float32 at least.

    Args:
        x0, noise: clean latents and Gaussian noise, of equal shape [B, ...].
        t: timesteps, a scalar, [B] or [B, F], see the module's text; ``shift`` matters to the
            ``table`` look-up only.

    Raises:
        UserError: unequal shapes, timesteps that do not fit them, and as in :func:`sigma_at`.
    """
    require_like(x0, "x0", noise=noise)
    sigma = over_latents(sigma_at(t, lookup, shift), x0)
    return ((1 - sigma) * x0.to(sigma.dtype) + sigma * noise.to(sigma.dtype)).to(x0.dtype)


def x0_from_flow(
    x_t: Tensor, flow: Tensor, t: Tensor | float, shift: float = 5.0, lookup: Lookup = "exact"
) -> Tensor:
    """x_t - sigma flow: the clean latent that a flow prediction means, in the dtype of ``x_t``.

    Args:
        x_t, flow: the model's input and its prediction, of equal shape [B, ...].
        t, shift, lookup: as in :func:`add_noise`.

    Raises:
        UserError: as in :func:`add_noise`.
    """
    require_like(x_t, "x_t", flow=flow)
    sigma = over_latents(sigma_at(t, lookup, shift), x_t)
    return (x_t.to(sigma.dtype) - sigma * flow.to(sigma.dtype)).to(x_t.dtype)


def flow_from_x0(
    x_t: Tensor, x0: Tensor, t: Tensor | float, shift: float = 5.0, lookup: Lookup = "exact"
) -> Tensor:
    """(x_t - x0) / sigma, in the dtype of ``x_t``.

    Args:
        x_t, x0: noisy latents and the clean ones they mean, of equal shape [B, ...].
        t, shift, lookup: as in :func:`add_noise`.

    Raises:
        UserError: a timestep whose sigma is 0, where any flow gives the same x0; and as in
            :func:`add_noise`.
    """
    require_like(x_t, "x_t", x0=x0)
    levels = sigma_at(t, lookup, shift)
    if bool((levels == 0).any()):
        raise UserError("the flow at timestep 0 does not follow from x0: ask at t > 0")
    sigma = over_latents(levels, x_t)
    return ((x_t.to(sigma.dtype) - x0.to(sigma.dtype)) / sigma).to(x_t.dtype)


def flow_target(x0: Tensor, noise: Tensor) -> Tensor:
    """noise - x0: what a model of the flow is trained to predict.

    Raises:
        UserError: unequal shapes.
    """
    require_like(x0, "x0", noise=noise)
    return noise - x0


def bell_weights(shift: float, steps: int = TRAIN_TIMESTEPS) -> Float[Tensor, " N"]:
    """Loss weights of the table's timesteps: exp(-2 ((t - N/2) / N)^2) less its minimum, mean 1.

    float64; Self-Forcing's weights of the teacher-forcing stage.
    """
    t = timestep_table(shift, steps)
    bell = torch.exp(-2 * ((t - steps / 2) / steps) ** 2)
    bell = bell - bell.min()
    return bell * (steps / bell.sum())


def bell_weight_at(t: Tensor | float, shift: float = 5.0) -> Tensor:
    """:func:`bell_weights` at the table's entry nearest to each timestep; float64, shape kept.

    Raises:
        UserError: timesteps as in :func:`sigma_at`.
    """
    times = timesteps(t).double()
    table = timestep_table(shift).to(times.device)
    return _entries(bell_weights(shift).to(times.device), times, table)


def guide(cond: Tensor, uncond: Tensor, weight: float, convention: Convention) -> Tensor:
    """Classifier-free guidance of two flow predictions.

    ``from_cond``: cond + w (cond - uncond), no guidance at w = 0 (distribution matching's "CFG 3").
    ``from_uncond``: uncond + w (cond - uncond), none at w = 1 (samplers, consistency code). So
    w in the first is w + 1 in the second.

    Raises:
        UserError: another convention, predictions of unequal shapes.
    """
    require_like(cond, "cond", uncond=uncond)
    if convention not in get_args(Convention):
        raise UserError(f"guidance convention '{convention}': give from_cond or from_uncond")
    start = cond if convention == "from_cond" else uncond
    return start + weight * (cond - uncond)


def guided(
    cond: Velocity, uncond: Velocity, weight: float, convention: Convention = "from_uncond"
) -> Velocity:
    """A velocity for :func:`solve` that asks both predictions and guides."""
    return lambda x, t: guide(cond(x, t), uncond(x, t), weight, convention)


def solve(name: str, x: Tensor, velocity: Velocity, steps: int, shift: float = 5.0) -> list[Tensor]:
    """Integrate the flow from noise (t = 1000) to a clean latent (t = 0) by a diffusers scheduler.

    All three use the grid of :func:`sigma_table`, Wan's own, and ask the velocity at its timesteps
    unrounded.

    Args:
        name: ``euler``, ``unipc`` (UniPC, order 2, bh2) or ``dpmpp`` (DPM-Solver++ 2M).
        x: Gaussian noise [B, ...].
        velocity: (x, timesteps [B] float32) -> flow, of x's shape.
        steps: calls of the velocity.

    Returns:
        ``steps + 1`` samples: x itself, then the one after each step; the last is clean.

    Raises:
        UserError: an unknown name, no step, diffusers not installed.
    """
    sigmas = sigma_table(shift, steps)
    scheduler = _scheduler(name, sigmas, shift)
    samples = [x]
    for index in range(steps):
        t = float(scheduler.sigmas[index]) * TRAIN_TIMESTEPS
        times = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
        flow = velocity(samples[-1], times)
        moved = scheduler.step(flow, scheduler.timesteps[index], samples[-1], return_dict=False)
        samples.append(moved[0].to(x.dtype))
    return samples


def _scheduler(name: str, sigmas: Tensor, shift: float) -> Any:
    """A diffusers scheduler of flow predictions, set to falling ``sigmas`` and a last 0."""
    if name not in get_args(Solver):
        raise UserError(f"There is no solver '{name}'; there are {', '.join(get_args(Solver))}.")
    try:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
            FlowMatchEulerDiscreteScheduler,
        )
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
    except ImportError:
        raise UserError(
            "The solvers of many steps are those of diffusers, which is not installed: "
            "pip install diffusers"
        ) from None
    steps = sigmas.numel()
    grid = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
    made: Any
    if name == "euler":
        made = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=shift)
    else:
        kind: Any = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
        made = kind(
            num_train_timesteps=TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        # these solvers work with log(1 - sigma), which pure noise has not
        grid[0] -= 1e-6
    made.set_timesteps(steps)
    # diffusers starts each of its schedulers from another grid, and rounds multistep times
    made.sigmas = grid
    made.timesteps = TRAIN_TIMESTEPS * grid[:-1]
    made.set_begin_index(0)
    return made


def _entries(values: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """The values beside the entries of ``table`` nearest to ``t``; NaN has none and stays."""
    nearest = (t[..., None] - table).abs().argmin(-1)
    return torch.where(t.isnan(), t, values[nearest])


def over_latents(sigma: Tensor, x: Tensor, name: str = "t") -> Tensor:
    """Noise levels shaped to broadcast over latents ``x``; float32 at least.

    Args:
        sigma: a scalar, one a sample [B], or one a frame [B, F] of [B, C, F, height, width]; each
            sample of [N, C, height, width] is one frame, so that [N, 1] fits it.
        name: what the message calls the timesteps.

    Raises:
        UserError: a shape that does not fit ``x``.
    """
    sigma = sigma.to(x.device, torch.promote_types(x.dtype, torch.float32))
    if sigma.ndim == 0:
        return sigma
    if sigma.ndim in (1, 2) and x.ndim > 0 and sigma.shape[0] in (1, x.shape[0]):
        if sigma.ndim == 1:
            return sigma.reshape(-1, *(1 for _ in x.shape[1:]))
        if x.ndim == 5 and sigma.shape[1] in (1, x.shape[2]):
            return sigma[:, None, :, None, None]
        if x.ndim == 4 and sigma.shape[1] == 1:
            return sigma[:, :, None, None]
    raise UserError(
        f"timesteps {name} of shape {list(sigma.shape)} do not fit latents of shape "
        f"{list(x.shape)}: give one, one a sample [B], or one a frame [B, F] of latents "
        "[B, C, F, height, width]"
    )
