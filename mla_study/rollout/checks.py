"""What latents, masks, weights and timesteps must be before a loss or a step is made of them.

Broadcasting would turn a forgotten batch into a plausible number. So shapes are compared, on every
device, and a misfit is told by name. No check here waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError

TRAIN_TIMESTEPS = 1000

Latents = Float[Tensor, "..."]
"""Latents [B, C, F, height, width], or [N, C, height, width], where each of N samples is one frame.
Their shapes are checked for every caller, not by the annotation."""

_SLACK = 1e-3
"""How far rounding may carry a timestep out of 0 .. 1000: 16 times float32's spacing there."""


def require_like(x: Tensor, name: str, /, **others: Tensor | None) -> None:
    """Refuse what is not of the shape of ``x``.

    Args:
        x: what gives the shape, called ``name`` in the message.
        others: what must have it, by the names in the message; None is left out.

    Raises:
        UserError: the first that differs: its name, its shape and the one that is wanted.
    """
    for other, value in others.items():
        if value is not None:
            require_shape(other, value, tuple(x.shape), f"that of {name}")


def require_shape(name: str, value: Tensor, wanted: Sequence[int], why: str) -> None:
    """Refuse a tensor of another shape than ``wanted``, which is ``why`` in a few words.

    Raises:
        UserError: the name, the shape and the one that is wanted.
    """
    if value.shape != torch.Size(wanted):
        raise UserError(
            f"{name} has shape {list(value.shape)}, but {list(wanted)} is wanted, {why}"
        )


def require_mask(name: str, mask: Tensor, x: Tensor) -> None:
    """Refuse a mask that is not bool, or does not say of each axis of ``x`` its length or 1.

    Raises:
        UserError: the name, and its dtype or the two shapes.
    """
    if mask.dtype != torch.bool:
        raise UserError(f"{name} is {_dtype(mask)}, but bool is wanted: {name}.bool()")
    if mask.ndim != x.ndim or any(
        n not in (1, m) for n, m in zip(mask.shape, x.shape, strict=True)
    ):
        raise UserError(
            f"{name} has shape {list(mask.shape)}, but {list(x.shape)} is wanted, that of the "
            "latents, where any axis may be 1"
        )


def as_clips(x: Tensor, name: str) -> Float[Tensor, "B C F height width"]:
    """Latents with their axis of frames: [N, C, height, width] becomes [N, C, 1, height, width].

    Raises:
        UserError: neither four axes nor five.
    """
    if x.ndim not in (4, 5):
        raise UserError(
            f"{name} has shape {list(x.shape)}, but latents are [B, C, F, height, width], or "
            "[N, C, height, width] where each sample is one frame"
        )
    return x[:, :, None] if x.ndim == 4 else x


def timesteps(t: Tensor | float, name: str = "t") -> Tensor:
    """Timesteps as a tensor of floats, shape kept; numbers and integers become float64.

    NaN and what lies outside 0 .. 1000 is refused where ``t`` is on the CPU. Elsewhere, where to
    look would be to wait for the device, it becomes NaN, so that no finite number comes of it.

    Args:
        t: timesteps of any shape, or one number.
        name: what the message calls them.

    Raises:
        UserError: a 16-bit dtype, no real numbers, or on the CPU a value outside.
    """
    told = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    if told.dtype in (torch.bfloat16, torch.float16):
        raise UserError(
            f"timesteps {name} came in {_dtype(told)}, which cannot hold them: give float32"
        )
    if told.dtype == torch.bool or told.is_complex():
        raise UserError(f"timesteps {name} came in {_dtype(told)}: give float32")
    told = told if told.is_floating_point() else told.double()
    inside = (told >= -_SLACK) & (told <= TRAIN_TIMESTEPS + _SLACK)
    if told.device.type != "cpu":
        return torch.where(inside, told, math.nan)
    if not bool(inside.all()):
        wrong = float(told[~inside].flatten()[0])
        raise UserError(
            f"timesteps {name} hold {wrong:g}, but they lie from 0 to {TRAIN_TIMESTEPS}, where 0 "
            "is a clean latent"
        )
    return told


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
