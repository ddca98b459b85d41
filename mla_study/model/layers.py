"""Small layers that Wan's blocks are made of; statistics of norms in float32 at least.

Shapes: B batch, F frames, T tokens a frame, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def timestep_embedding(t: Float[Tensor, "*B"], size: int) -> Float[Tensor, "*B size"]:
    """[cos | sin] of t against 10000^(-i / half), float64: Wan's sinusoidal embedding."""
    half = size // 2
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.double()[..., None] * torch.pow(torch.tensor(10000.0).double(), -exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift for tokens [B, F T, d] and frames [B, F, 1, d]."""
    framed = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, framed, 1 + scale).flatten(1, 2)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, as above."""
    frames = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, frames), y.unflatten(1, frames), gate).flatten(1, 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*B c"]) -> Float[Tensor, "*B c"]:
        """x / rms(x) * weight."""
        size = self.weight.shape
        if x.dtype in (torch.float32, torch.float64) and self.weight.dtype == x.dtype:
            return F.rms_norm(x, size, self.weight, self.eps)
        return F.rms_norm(x.float(), size, None, self.eps).type_as(x) * self.weight


class LayerNorm(nn.LayerNorm):
    """LayerNorm with statistics in float32 at least."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; the result has the input's dtype."""
        work = input if input.dtype == torch.float64 else input.float()
        weight = None if self.weight is None else self.weight.to(work.dtype)
        bias = None if self.bias is None else self.bias.to(work.dtype)
        out = F.layer_norm(work, self.normalized_shape, weight, bias, self.eps)
        return out.type_as(input)


class FreshGELU(nn.Module):
    """Wan's tanh GELU of a tensor that nobody else holds: in place where no gradient flows."""

    def forward(self, x: Tensor) -> Tensor:
        """Half the time of a call that has to ask for new memory."""
        if x.requires_grad:
            return F.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu_(x, approximate="tanh")
