"""How the world looks: three backgrounds, six colours and four anti-aliased shapes on a torus.

Shapes: B scenes, F frames, P phases, S positions, H = W = size pixels. Pixels are in [-1, 1] where
a video is meant for a model, and in [0, 1] inside this module.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.world.grammar import BACKGROUNDS, SHAPES
from mla_study.world.scenes import Scenes, World

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.12, 0.10),
    "green": (0.10, 0.80, 0.18),
    "blue": (0.15, 0.30, 1.00),
    "yellow": (0.98, 0.88, 0.12),
    "magenta": (0.95, 0.20, 0.85),
    "cyan": (0.15, 0.88, 0.95),
}
_STARS = ((0.11, 0.21), (0.27, 0.73), (0.44, 0.40), (0.60, 0.90), (0.78, 0.15), (0.90, 0.60))
STRIPES = 3  # periods across a frame
PAN = 2


def palette() -> Float[Tensor, "6 3"]:
    """RGB of the colours, in the order of the grammar."""
    return torch.tensor(list(PALETTE.values()))


def background(name: str, world: World, phase: Float[Tensor, " P"]) -> Float[Tensor, "P 3 H W"]:
    """A background that has moved ``phase`` pixels to the left, RGB in [0, 1].

    Night does not depend on the phase; stripes stand still in a scene (phase 0) and pan moves by
    the world's step a frame, but a generated video may do otherwise.
    """
    n = world.size
    line = (torch.arange(n) + 0.5) / n
    y = line[None, :, None]
    x = (line[None, None, :] + phase[:, None, None] / n).remainder(1.0)
    if name == "night":
        glow = 0.08 * (1 - torch.cos(2 * math.pi * y)) / 2 + 0 * x
        here = line[:, None] * n, line[None, :] * n
        for row, column in _STARS:
            # a star sits in the middle of a pixel, else it would fade at small sizes
            dy = here[0] - (int(row * n) + 0.5)
            dx = here[1] - (int(column * n) + 0.5)
            glow = glow + 0.22 * torch.exp(-(dy**2 + dx**2) / (2 * 0.5**2))
        tint = torch.tensor([[0.04, 0.05, 0.13], [1.0, 1.0, 1.1]])
    elif name == "stripes":
        wave = torch.tanh(2.0 * torch.sin(2 * math.pi * STRIPES * (x + y)))
        glow = 0.09 * wave
        tint = torch.tensor([[0.34, 0.34, 0.36], [1.0, 1.0, 1.0]])
    else:
        hills = torch.sin(2 * math.pi * PAN * x) * (0.6 + 0.4 * torch.cos(2 * math.pi * y))
        glow = 0.12 * hills + 0.03 * torch.cos(2 * math.pi * y)
        tint = torch.tensor([[0.36, 0.26, 0.17], [1.0, 0.8, 0.5]])
    return tint[0][None, :, None, None] + tint[1][None, :, None, None] * glow[:, None]


def coverage(shape: str, world: World, centre: Float[Tensor, "*S 2"]) -> Float[Tensor, "*S H W"]:
    """How much of each pixel the sprite covers, from its signed distance with an edge of 1 pixel.

    Args:
        centre: (y, x) in pixels, anywhere on the torus.
    """
    n, r = world.size, world.radius
    line = torch.arange(n, device=centre.device) + 0.5
    dy = (line - centre[..., :1] + n / 2).remainder(n).sub(n / 2)[..., :, None]
    dx = (line - centre[..., 1:] + n / 2).remainder(n).sub(n / 2)[..., None, :]
    if shape == "disc":
        distance = torch.sqrt(dy.square() + dx.square()) - r
    elif shape == "square":
        distance = torch.maximum(dy.abs(), dx.abs()) - 0.9 * r
    elif shape == "cross":
        down, across = dy.abs(), dx.abs()
        upright = torch.maximum(down - 1.1 * r, across - 0.38 * r)
        level = torch.maximum(down - 0.38 * r, across - 1.1 * r)
        distance = torch.minimum(upright, level)
    else:
        slope = (2.0 * dx.abs() - 1.15 * (dy + 1.15 * r)) / math.hypot(2.0, 1.15)
        distance = torch.maximum(dy - 0.85 * r, slope)
    return (0.5 - distance).clamp_(0, 1)


@functools.lru_cache(maxsize=4)
def scenery(
    world: World, frames: int, first: int, device: torch.device
) -> Float[Tensor, "3 3 F H W"]:
    """Every background for every frame, RGB in [0, 1]."""
    time = torch.arange(first, first + frames, dtype=torch.float64) * world.step
    pan = time.remainder(world.size / PAN).float()
    still = torch.zeros_like(pan)
    moving = {"pan": pan}
    made = [background(name, world, moving.get(name, still)) for name in BACKGROUNDS]
    return torch.stack(made).transpose(1, 2).contiguous().to(device)


def render(
    scenes: Scenes,
    frames: int | None = None,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "B 3 F H W"]:
    """Clips of scenes, RGB in [-1, 1].

    Args:
        frames: how many; by default a clip of the world.
        first: the frame to begin with.
    """
    world, place = scenes.world, torch.device(device)
    count = world.frames if frames is None else frames
    where = scenes.positions(count, first).to(place)
    shapes = scenes.indices("shape")
    alpha = where.new_empty((len(scenes), count, world.size, world.size))
    for index, shape in enumerate(SHAPES):
        rows = (shapes == index).nonzero()[:, 0].to(place)
        if len(rows):
            alpha[rows] = coverage(shape, world, where[rows])
    colour = palette()[scenes.indices("colour")].to(place)[:, :, None, None, None]
    video = scenery(world, count, first, place)[scenes.indices("background").to(place)]
    # lerp from background to colour, in place: a training step waits for this
    video += alpha[:, None] * (colour - video)
    return video.mul_(2).sub_(1)


def masks(scenes: Scenes, where: Float[Tensor, "B F 2"]) -> Float[Tensor, "B F H W"]:
    """Coverage of each scene's shape at given positions."""
    shapes = [caption.shape for caption in scenes.captions]
    held = [coverage(shape, scenes.world, at) for shape, at in zip(shapes, where, strict=True)]
    size = scenes.world.size
    return torch.stack(held) if held else where.new_zeros((0, where.shape[1], size, size))
