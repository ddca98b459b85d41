"""One dense self-attention layer as arrays, and what is known of its inputs.

Shapes: d width, H heads, m rows, k chosen rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int

_Array = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class Projection:
    """A linear map with its bias."""

    weight: Float[np.ndarray, "m d"]
    bias: Float[np.ndarray, " m"]

    def rows(
        self, chosen: Int[np.ndarray, " k"], factor: Float[np.ndarray, " m"] | None = None
    ) -> Projection:
        """Some rows in float64, each times its entry of ``factor``."""
        scale = 1.0 if factor is None else factor[chosen]
        weight = self.weight[chosen].astype(np.float64)
        weight *= scale if factor is None else factor[chosen][:, None]
        return Projection(weight, self.bias[chosen].astype(np.float64) * scale)


@dataclass(frozen=True)
class DenseAttention:
    """Wan's self-attention of one block."""

    heads: int
    eps: float
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    norm_q: Float[np.ndarray, " d"]
    norm_k: Float[np.ndarray, " d"]

    @classmethod
    def of(cls, tensors: Mapping[str, _Array], heads: int, eps: float) -> DenseAttention:
        """From tensors by their Wan names without prefix: ``q.weight``, ``norm_q.weight`` ..."""
        q, k, v, o = (Projection(tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in "qkvo")
        return cls(heads, eps, q, k, v, o, tensors["norm_q.weight"], tensors["norm_k.weight"])

    @property
    def width(self) -> int:
        return self.q.weight.shape[1]

    def channels(self, of_head: Int[np.ndarray, " k"]) -> Int[np.ndarray, " hk"]:
        """These channels of every head as rows of the projections, head by head."""
        head_dim = self.width // self.heads
        return (np.arange(self.heads)[:, None] * head_dim + of_head[None, :]).ravel()


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's inputs.

    ``second`` is E[x x^T] (None: unit variance), ``mean`` E[x] (None: 0). With ``tokens`` expected
    norms are averages over them; without, square roots of expected squares.
    """

    second: Float64[np.ndarray, "d d"] | None = None
    mean: Float64[np.ndarray, " d"] | None = None
    tokens: Float[np.ndarray, "T d"] | None = None

    @classmethod
    def of(cls, tokens: Float[np.ndarray, "T d"]) -> Moments:
        """Of the tokens themselves."""
        d = tokens.shape[1]
        second = np.zeros((d, d))
        for start in range(0, len(tokens), 2048):
            part = tokens[start : start + 2048].astype(np.float64)
            second += part.T @ part
        second /= len(tokens)
        return cls((second + second.T) / 2, tokens.mean(axis=0, dtype=np.float64), tokens)

    def power(
        self, weight: Float64[np.ndarray, "m d"], bias: Float[np.ndarray, " m"] | None = None
    ) -> Float64[np.ndarray, " m"]:
        """E[(W x + b)^2] of each row."""
        seen = weight if self.second is None else weight @ self.second
        out = np.einsum("md,md->m", seen, weight)
        if bias is None:
            return out
        cross = 0.0 if self.mean is None else 2 * bias * (weight @ self.mean)
        return out + cross + np.square(bias, dtype=np.float64)

    def rms(self, map_: Projection, eps: float) -> tuple[float, float]:
        """(E[rms], E[rms^2]) of the vector W x + b."""
        if self.tokens is None:
            square = float(self.power(map_.weight.astype(np.float64), map_.bias).mean()) + eps
            return square**0.5, square
        weight = map_.weight.astype(self.tokens.dtype, copy=False)
        squares: list[np.ndarray] = []
        for start in range(0, len(self.tokens), 1024):
            y = self.tokens[start : start + 1024] @ weight.T + map_.bias
            squares.append(np.square(y, dtype=np.float64).mean(axis=1) + eps)
        square = np.concatenate(squares)
        return float(np.sqrt(square).mean()), float(square.mean())
