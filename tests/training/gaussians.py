"""Data of which everything is known: independent N(mean, spread^2), in float64.

On the way from noise to data x_t is Gaussian too, of mean (1 - sigma) mean and variance
(1 - sigma)^2 spread^2 + sigma^2, and the flow keeps a point's standard score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    mean: float
    spread: float

    def middle(self, sigma: Tensor) -> Tensor:
        return (1 - sigma) * self.mean

    def width(self, sigma: Tensor) -> Tensor:
        return ((1 - sigma) ** 2 * self.spread**2 + sigma**2).sqrt()

    def x0(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t = x]."""
        gain = (1 - sigma) * self.spread**2 / self.width(sigma) ** 2
        return self.mean + gain * (x - self.middle(sigma))

    def flow(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - x0 | x_t = x]."""
        noise = sigma * (x - self.middle(sigma)) / self.width(sigma) ** 2
        return noise - self.x0(x, sigma)

    def moved(self, x: Tensor, sigma: Tensor, later: Tensor) -> Tensor:
        """Where the exact flow takes x from one noise level to another."""
        score = (x - self.middle(sigma)) / self.width(sigma)
        return self.middle(later) + self.width(later) * score


def latents(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
