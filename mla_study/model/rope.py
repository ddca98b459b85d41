"""Wan's 3D rotary embedding, whole or restricted to the fastest pairs of each axis.

Shapes: B batch, L tokens, H heads, P rotary pairs, F frames, f temporal positions. A rotary pair is
two neighbouring channels (2i, 2i + 1); the pairs of a head lie in the order time, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mla_study.errors import UserError


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Wan's split of head_dim / 2 pairs into (time, height, width): 128 gives (22, 21, 21).

    Raises:
        UserError: head_dim is odd or leaves an axis without a pair.
    """
    pairs = head_dim // 2
    third = pairs // 3
    if head_dim % 2 or third < 1:
        raise UserError(f"heads of {head_dim} channels cannot carry a 3D rotary embedding")
    return pairs - 2 * third, third, third


def inverse_frequencies(pairs: int, base: float) -> Float[Tensor, " pairs"]:
    """base^(-i / pairs) for i = 0 .. pairs - 1, float64: one axis, the fastest pair first."""
    exponent = torch.arange(pairs, dtype=torch.float64) / max(pairs, 1)
    return torch.pow(torch.tensor(base, dtype=torch.float64), -exponent)


@dataclass(frozen=True)
class RotaryEmbedding:
    """Angles of a head's rotary pairs on a grid of frames x height x width.

    ``kept`` takes the first (fastest) pairs of each axis of the split of ``head_dim``: the
    decoupled key of latent attention keeps (6, 5, 5) of (22, 21, 21). None keeps all of them.
    """

    head_dim: int
    base: float = 10000.0
    kept: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        full = axis_pairs(self.head_dim)
        if self.kept is not None and any(k > f for k, f in zip(self.kept, full, strict=True)):
            raise UserError(
                f"rope_pairs {self.kept} exceed the pairs {full} that a head of {self.head_dim} has"
            )

    @property
    def pairs(self) -> tuple[int, int, int]:
        """Pairs of (time, height, width) that are rotated."""
        return self.kept if self.kept is not None else axis_pairs(self.head_dim)

    @cached_property
    def _frequencies(self) -> tuple[Tensor, Tensor, Tensor]:
        full = axis_pairs(self.head_dim)
        axes = [
            inverse_frequencies(n, self.base)[:k] for n, k in zip(full, self.pairs, strict=True)
        ]
        return axes[0], axes[1], axes[2]

    def angles(
        self, frames: Sequence[int] | Tensor, height: int, width: int
    ) -> Float[Tensor, "L P"]:
        """Angles in radians of all tokens, float64; token order frame, row, column.

        Args:
            frames: temporal position of each frame [F], any real numbers.
            height, width: token grid of a frame.
        """
        t = torch.as_tensor(frames, dtype=torch.float64)
        time, row, column = self._frequencies
        time, row, column = time.to(t.device), row.to(t.device), column.to(t.device)
        ys = torch.arange(height, dtype=torch.float64, device=t.device)
        xs = torch.arange(width, dtype=torch.float64, device=t.device)
        shape = (t.numel(), height, width)
        parts = [
            (t[:, None] * time)[:, None, None, :].expand(*shape, -1),
            (ys[:, None] * row)[None, :, None, :].expand(*shape, -1),
            (xs[:, None] * column)[None, None, :, :].expand(*shape, -1),
        ]
        return torch.cat(parts, dim=-1).flatten(0, 2)

    def table(
        self,
        frames: Sequence[int] | Tensor,
        height: int,
        width: int,
        dtype: torch.dtype = torch.float32,
    ) -> Rotation:
        """:meth:`angles` as a rotation in ``dtype``, computed in float64 and then cast."""
        angles = self.angles(frames, height, width)
        return Rotation(torch.complex(angles.cos().to(dtype), angles.sin().to(dtype)))


@dataclass(frozen=True)
class Rotation:
    """cos + i sin [L, P] of the tokens of one sequence."""

    cis: Complex[Tensor, "L P"]

    def apply(self, x: Float[Tensor, "B L2 H C"]) -> Float[Tensor, "B L2 H C"]:
        """Rotate the 2P channels of every head, pairs interleaved; in float32 at least.

        Tokens beyond the table (padding) are returned as they are.
        """
        tokens, pairs = self.cis.shape
        if x.shape[1] > tokens:
            return torch.cat([self.apply(x[:, :tokens]), x[:, tokens:]], dim=1)
        cis = self.cis.to(torch.complex128) if x.dtype == torch.float64 else self.cis
        work = x.to(cis.real.dtype)
        if torch.compiler.is_compiling():  # compilers fuse real arithmetic only
            cos, sin = torch.view_as_real(cis)[None, :, None].unbind(-1)
            a, b = work.unflatten(-1, (pairs, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
        if any(s % 2 for s in (*work.stride()[:-1], work.storage_offset())):
            work = work.clone(memory_format=torch.contiguous_format)
        turned = torch.view_as_complex(work.unflatten(-1, (pairs, 2))) * cis[None, :, None, :]
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
