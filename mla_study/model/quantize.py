"""Symmetric int8 for cache entries: a scale a token, or a scale a channel and frame.

Shapes: B batch, F frames, T tokens of a frame, then channel axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["token", "channel"]
SCALE_DTYPE = torch.bfloat16  # float32's range: neither tiny nor huge entries lose their scale


@dataclass(frozen=True)
class Quantized:
    """int8 data and the scales that give it back: values = data * scales."""

    data: Tensor
    scales: Tensor


def scale_shape(shape: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the scales of entries [B, F, T, *channels]."""
    batch, frames, tokens, *channels = shape
    if scheme == "token":
        return (batch, frames, tokens, *(1 for _ in channels))
    return (batch, frames, 1, *channels)


def quantize(values: Tensor, scheme: Scheme) -> Quantized:
    """Round entries [B, F, T, *channels] to int8, the largest magnitude of a group to 127.

    ``token``: scales [B, F, T, 1...]; ``channel``: scales [B, F, 1, *channels]. A group of zeros
    gets scale 0 and comes back as zeros; one with NaN or infinity comes back as NaN.
    """
    work = values.float()
    shape = scale_shape(tuple(work.shape), scheme)
    if work.numel() == 0:
        return Quantized(work.to(torch.int8), work.new_zeros(shape, dtype=SCALE_DTYPE))
    axes = tuple(range(3, work.ndim)) if scheme == "token" else (2,)
    exact = work.abs().amax(axes, keepdim=True) / 127
    # the data must match the scale that is stored, and that must not be the smaller one
    scales = exact.to(SCALE_DTYPE)
    above = torch.nextafter(scales, torch.full_like(scales, torch.inf))
    scales = torch.where(scales.float() < exact, above, scales)
    safe = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
    data = torch.round(work / safe).nan_to_num_(0, 127, -127).to(torch.int8)
    return Quantized(data, scales)


def dequantize(packed: Quantized, dtype: torch.dtype) -> Tensor:
    """values = data * scales in ``dtype``; computed in float32."""
    return (packed.data * packed.scales.float()).to(dtype)
