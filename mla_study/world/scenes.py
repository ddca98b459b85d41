"""Where things are: the size of the world, and scenes of one sprite on a torus.

Shapes: B scenes, F frames. Positions are (y, x) in pixels; pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mla_study.errors import UserError
from mla_study.world.grammar import (
    COLUMNS,
    DIRECTIONS,
    ROWS,
    SLOTS,
    SPEEDS,
    Caption,
    parse_caption,
    sample_captions,
    stream,
)

JITTER = 0.15
"""How far a sprite starts from its cell's centre at most, as a share of the cell."""

_WAYS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
_SMALLEST = 16


@dataclass(frozen=True)
class World:
    """A square torus of ``size`` pixels.

    Args:
        size: rows and columns of a frame; 24 on a CPU, 64 on a GPU.
        frames: of a clip.
        step: pixels a frame of a slow sprite and of the panning background; a fast one makes two.
    """

    size: int = 24
    frames: int = 12
    step: float = 1.0

    def __post_init__(self) -> None:
        if self.size < _SMALLEST:
            raise UserError(
                f"a world of {self.size} pixels is too small to tell its shapes apart: "
                f"give at least {_SMALLEST}"
            )
        if self.frames < 1:
            raise UserError(f"a clip of {self.frames} frames is none: give at least 1")
        if not 0 < self.step < self.size / 8:
            raise UserError(
                f"a step of {self.step:g} pixels a frame does not suit a world of {self.size}: "
                f"give more than 0 and less than {self.size / 8:g}"
            )

    @property
    def radius(self) -> float:
        """Of the sprite, in pixels."""
        return self.size / 6

    @property
    def cell(self) -> float:
        """Side of a cell of the 3 x 3 grid, in pixels."""
        return self.size / 3


@dataclass(frozen=True)
class Scenes:
    """What happens in a batch of clips: their captions, and where each sprite starts."""

    world: World
    captions: tuple[Caption, ...]
    start: Float[Tensor, "B 2"]

    def __len__(self) -> int:
        return len(self.captions)

    def indices(self, slot: str) -> Int[Tensor, " B"]:
        """Index of each caption's word in its slot of :data:`SLOTS`."""
        words = SLOTS[slot]
        held = [words.index(getattr(caption, slot)) for caption in self.captions]
        return torch.tensor(held, dtype=torch.int64)

    def positions(self, frames: int | None = None, first: int = 0) -> Float[Tensor, "B F 2"]:
        """(y, x) of the sprite's centre in [0, size), frame after frame from ``first`` on."""
        count = self.world.frames if frames is None else frames
        time = torch.arange(first, first + count, dtype=torch.float64)
        speed = velocities(self.world, self.captions)
        moved = self.start.double()[:, None] + time[None, :, None] * speed.double()[:, None]
        return moved.remainder(self.world.size).float()


def centres(world: World, captions: Sequence[Caption]) -> Float[Tensor, "B 2"]:
    """(y, x) of the middle of each caption's cell."""
    cells = [(ROWS.index(c.row) + 0.5, COLUMNS.index(c.column) + 0.5) for c in captions]
    return torch.tensor(cells, dtype=torch.float32).reshape(-1, 2) * world.cell


def velocities(world: World, captions: Sequence[Caption]) -> Float[Tensor, "B 2"]:
    """(y, x) pixels a frame that each caption says."""
    ways = torch.tensor([_WAYS[c.direction] for c in captions]).reshape(-1, 2)
    steps = torch.tensor([1.0 + SPEEDS.index(c.speed) for c in captions])
    return ways * steps[:, None] * world.step


def direction_of(y: float, x: float) -> str:
    """The direction nearest to a velocity."""
    return max(DIRECTIONS, key=lambda name: _WAYS[name][0] * y + _WAYS[name][1] * x)


def sample_scenes(
    world: World, count: int, *seed: int, captions: Sequence[Caption | str] | None = None
) -> Scenes:
    """Scenes drawn at random: the same for the same seed (and step of a training run) everywhere.

    Args:
        count: scenes.
        seed: one number or more, such as a run's seed and its step.
        captions: what they show, one each; by default drawn uniformly.

    Raises:
        UserError: a negative seed, another number of captions, or one outside the grammar.
    """
    if captions is None:
        told = sample_captions(count, *seed)
    else:
        told = [c if isinstance(c, Caption) else parse_caption(c) for c in captions]
    if len(told) != count:
        raise UserError(f"{len(told)} captions do not fit {count} scenes: give one each")
    shift = stream(1, *seed).uniform(-JITTER, JITTER, (count, 2)) * world.cell
    start = centres(world, told) + torch.from_numpy(shift).float()
    return Scenes(world, tuple(told), start)
