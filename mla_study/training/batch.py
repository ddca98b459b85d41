"""What a training step gets: samples by their number, and random numbers by sample.

A sample's content and its noise depend on (seed, number) alone. So neither the number of ranks nor
that of accumulated micro-batches changes what a run sees.

Shapes: B samples, T text tokens, E text channels, C latent channels, F latent frames, h x w latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.rollout.prompts import philox


@dataclass(frozen=True)
class Batch:
    """Samples of a training step, float32.

    Attributes:
        context: text embeddings.
        latents: clean latents; None where the data are prompts only.
        captions: the text of each sample.
    """

    context: Float[Tensor, "B T E"]
    latents: Float[Tensor, "B C F h w"] | None
    captions: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        latents = None if self.latents is None else self.latents.to(device)
        return Batch(self.context.to(device), latents, self.captions)

    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        held = (self.context, self.latents)
        return all(bool(part.isfinite().all()) for part in held if part is not None)


@runtime_checkable
class Data(Protocol):
    """A source of samples, numbered over the whole run."""

    @property
    def null(self) -> Float[Tensor, "1 T E"]:
        """What a dropped caption becomes."""
        ...

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples with these numbers, the same whatever else is asked for."""
        ...

    def facts(self) -> dict[str, Any]:
        """Plain values that identify the data: they are recorded, and must agree at a resume."""
        ...


class Draws:
    """Random numbers of a batch: a stream a sample, and one that all samples of a step share.

    Args:
        seed: of the run.
        samples: numbers of the samples.
        step: what the shared stream belongs to; equal on all ranks.
    """

    def __init__(
        self, seed: int, samples: Sequence[int], step: int, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self._own = [_generator("sample", seed, number) for number in samples]
        self.shared = _generator("step", seed, step)

    def __len__(self) -> int:
        return len(self._own)

    def each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """``draw(generator)`` of shape [1, ...] for every sample, joined: [B, ...]."""
        return torch.cat([draw(own) for own in self._own]).to(self.device)

    def pairs(
        self, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The same of a draw that gives two tensors."""
        made = [draw(own) for own in self._own]
        first, second = (torch.cat([pair[i] for pair in made]).to(self.device) for i in (0, 1))
        return first, second

    def noise(self, *shape: int) -> Float[Tensor, "B ..."]:
        """Standard Gaussian [B, *shape], float32."""
        return self.each(lambda own: torch.randn((1, *shape), generator=own))


def _generator(*names: object) -> torch.Generator:
    seed = int(philox(*names).integers(0, 2**63 - 1))
    return torch.Generator().manual_seed(seed)
