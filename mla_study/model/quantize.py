"""Symmetric int8 for cache entries: a scale a token, or a scale a channel and frame.

Shapes: B batch, T tokens of one frame, then channel axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["token", "channel"]


@dataclass(frozen=True)
class Quantized:
    """int8 data and the float16 scales that give it back: values = data * scales."""

    data: Tensor
    scales: Tensor


def quantize(values: Tensor, scheme: Scheme) -> Quantized:
    """Round a frame's entries [B, T, *channels] to int8, largest magnitude to 127.

    ``token``: scales [B, T, 1...]; ``channel``: scales [B, 1, *channels]. A group of zeros gets
    scale 0 and comes back as zeros.
    """
    work = values.float()
    axes = tuple(range(2, work.ndim)) if scheme == "token" else (1,)
    # scales are kept in float16, so round them first: the data must match what is stored
    scales = (work.abs().amax(axes, keepdim=True) / 127).to(torch.float16)
    safe = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
    data = torch.round(work / safe).clamp_(-127, 127).to(torch.int8)
    return Quantized(data, scales)


def dequantize(packed: Quantized, dtype: torch.dtype) -> Tensor:
    """values = data * scales in ``dtype``; computed in float32."""
    return (packed.data.float() * packed.scales.float()).to(dtype)
