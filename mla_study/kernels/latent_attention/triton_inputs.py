"""What the fused kernel reads: the two cached tensors as rows of a ring, never copied.

Shapes: B batch, K keys, F frames of T tokens (K = F T), P rotary pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mla_study.errors import UserError
from mla_study.kernels.latent_attention.triton_tiles import SCALINGS


@dataclass(frozen=True)
class Cached:
    """One of the two cached tensors as the kernel reads it: rows, scales, and how both step."""

    data: Tensor  # [B, K, channels], any strides but the last
    scales: Tensor  # what the kernel is given where there are none: the data
    scheme: str  # none, token or channel
    scale_steps: tuple[int, int]  # a sample, and a token or frame
    frame_tokens: int

    @classmethod
    def of(cls, name: str, data: Tensor, scales: Tensor | None) -> Cached:
        """View [B, K, channels] or [B, F, T, channels]; UserError where that takes a copy."""
        tokens = data.shape[2] if data.ndim == 4 else max(1, data.shape[1])
        rows = data
        if data.ndim == 4:
            batch, frames, _, channels = data.shape
            if frames > 1 and data.stride(1) != tokens * data.stride(2):
                raise UserError(
                    f"the frames of {name} lie {data.stride(1)} elements apart, but its "
                    f"{tokens} tokens a frame step by {data.stride(2)}: give neighbouring slots of "
                    "one ring, whole frames"
                )
            size = (batch, frames * tokens, channels)
            rows = data.as_strided(size, (data.stride(0), data.stride(2), data.stride(3)))
        if rows.stride(-1) != 1 and rows.shape[-1] > 1:
            raise UserError(
                f"the channels of {name} lie {rows.stride(-1)} elements apart, but the kernel "
                "reads neighbouring ones: pass it with .contiguous()"
            )
        if scales is None:
            if data.dtype == torch.int8:
                raise UserError(f"{name} is int8 but came without scales")
            return cls(rows, rows, "none", (0, 0), tokens)
        if data.ndim != 4 or data.dtype != torch.int8:
            raise UserError(
                f"{name} came with scales, so it must be int8 [B, F, T, channels], not "
                f"{data.dtype} {list(data.shape)}"
            )
        batch, frames, _, channels = data.shape
        if scales.shape == (batch, frames, tokens, 1):
            if frames > 1 and scales.stride(1) != tokens * scales.stride(2):
                raise UserError(f"the scales of {name} are no neighbouring slots of one ring")
            return cls(rows, scales, "token", (scales.stride(0), scales.stride(2)), tokens)
        if scales.shape == (batch, frames, 1, channels):
            if scales.stride(3) != 1 and channels > 1:
                raise UserError(f"the scales of {name} have channels that are no neighbours")
            return cls(rows, scales, "channel", (scales.stride(0), scales.stride(1)), tokens)
        raise UserError(
            f"scales {list(scales.shape)} do not belong to {name} {list(data.shape)}: give one a "
            "token [B, F, T, 1], or one a channel and frame [B, F, 1, channels]"
        )

    def scaling(self, keys: int) -> int:
        """How tiles of ``keys`` keys are dequantised: they may span two frames, or more."""
        short = self.scheme == "channel" and self.frame_tokens < keys
        return SCALINGS["channel, short frames" if short else self.scheme]

    def floating(self, dtype: torch.dtype) -> Tensor:
        """Dequantised [B, K, channels], computed in float32 as the cache itself does."""
        if self.scheme == "none":
            return self.data.to(dtype)
        scales = self.scales.float()
        if self.scheme == "token":
            each = scales.flatten(1, 2)
        else:
            each = scales[:, :, 0].repeat_interleave(self.frame_tokens, dim=1)
        return (self.data * each).to(dtype)


def rotated_keys(k_rope: Tensor, rotation: Tensor) -> Tensor:
    """Turn the interleaved pairs of [B, K, 2P] by [K, P]; in float32 at least, rounded once."""
    work = k_rope.to(torch.promote_types(k_rope.dtype, rotation.real.dtype))
    turned = torch.view_as_complex(work.unflatten(-1, (-1, 2)).contiguous()) * rotation
    return torch.view_as_real(turned).flatten(-2).to(k_rope.dtype)
