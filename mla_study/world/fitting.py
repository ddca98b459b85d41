"""The sprite that explains a frame best: hypotheses of colour, shape and place, compared by pixels.

Over a background b, a sprite of colour c and coverage a at p explains

    gain(p) = sum_x |v - b|^2 - |v - b - a(x - p) (c - b)|^2
            = sum_x 2 a(x - p) (c - b) . (v - b) - a(x - p)^2 |c - b|^2

of a frame v: two correlations on the torus, for all places at once by FFT. Under independent
Gaussian noise the largest gain is the likeliest sprite.

Shapes: B clips, F frames, S shapes, O sub-pixel offsets, H = W = size pixels in [0, 1].
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mla_study.world.grammar import SHAPES
from mla_study.world.render import coverage, palette
from mla_study.world.scenes import World

FINE = 2
"""Places are tried this many times a pixel."""


BLURS = (0.0, 0.2, 0.4)
"""Standard deviations of the blurs that a sprite is tried with, in its radii."""


@functools.lru_cache(maxsize=16)
def _templates(world: World, fine: int, power: int, blur: float = 0.0) -> Tensor:
    """Conjugate spectra of coverage ** power, [S, fine * fine, H, W // 2 + 1]; offsets y first."""
    n = world.size
    offsets = torch.arange(fine) / fine
    grid = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1).reshape(-1, 2)
    drawn = torch.stack([coverage(shape, world, grid) for shape in SHAPES])
    if blur:
        waves = torch.fft.fftfreq(n)[:, None].square() + torch.fft.rfftfreq(n).square()
        soft = torch.exp(-2 * (torch.pi * blur * world.radius) ** 2 * waves)
        drawn = torch.fft.irfft2(torch.fft.rfft2(drawn) * soft, s=(n, n))
    return torch.fft.rfft2(drawn**power).conj()


def _products(
    video: Float[Tensor, "B F 3 H W"], behind: Float[Tensor, "B F 3 H W"], colour: Tensor
) -> tuple[Tensor, Tensor]:
    """Spectra of (c - b) . (v - b) and |c - b|^2 for a colour [3] or one a clip [B, 1, 3]."""
    contrast = colour[..., None, None] - behind
    along = (contrast * (video - behind)).sum(2)
    return torch.fft.rfft2(along), torch.fft.rfft2(contrast.square().sum(2))


def colour_gains(
    world: World, video: Float[Tensor, "B F 3 H W"], behind: Float[Tensor, "B F 3 H W"]
) -> Float[Tensor, "B F 6"]:
    """The largest gain of each colour in each frame, over all shapes and whole pixels."""
    once, twice = (_templates(world, 1, p).to(video.device)[:, 0] for p in (1, 2))
    gains: list[Tensor] = []
    for colour in palette().to(video.device):
        along, power = _products(video, behind, colour)
        spectrum = 2 * once * along[:, :, None] - twice * power[:, :, None]
        gains.append(torch.fft.irfft2(spectrum, s=(world.size, world.size)).amax((2, 3, 4)))
    return torch.stack(gains, dim=-1)


def best_shapes(
    world: World,
    video: Float[Tensor, "B F 3 H W"],
    behind: Float[Tensor, "B F 3 H W"],
    colour: Float[Tensor, "B 3"],
) -> tuple[Int[Tensor, " B"], Float[Tensor, "B F fine_H fine_W"]]:
    """The shape that gains most over a clip, sharp or blurred, and its gain at each place.

    Places are :data:`FINE` a pixel along either axis.
    """
    n, place = world.size, video.device
    along, power = _products(video, behind, colour[:, None])
    banks = [
        [_templates(world, FINE, p, blur)[shape].to(place) for p in (1, 2)]
        for blur in BLURS
        for shape in range(len(SHAPES))
    ]

    def gains(once: Tensor, twice: Tensor) -> Tensor:
        spectrum = 2 * once * along[:, :, None] - twice * power[:, :, None]
        return torch.fft.irfft2(spectrum, s=(n, n))

    totals = [gains(*bank).amax((2, 3, 4)).clamp_min(0).sum(1) for bank in banks]
    best = torch.stack(totals).argmax(0)
    once, twice = (torch.stack(held)[best][:, None] for held in zip(*banks, strict=True))
    maps = gains(once, twice).unflatten(2, (FINE, FINE))
    # offsets lie between the pixels: [.., oy, ox, y, x] -> [.., y oy, x ox]
    fine = maps.permute(0, 1, 4, 2, 5, 3).reshape(*maps.shape[:2], n * FINE, n * FINE)
    return best % len(SHAPES), fine


def track(
    maps: Float[Tensor, "B F fine_H fine_W"], reach: float, keep: float = 0.7
) -> Float[Tensor, "B F 2"]:
    """Places (y, x) in units of the map, to a fraction of a cell.

    A place within ``reach`` of the frame before is preferred to a better one far away as long as
    it gains ``keep`` of that, so that a ghost does not take over for a frame.
    """
    frames, rows, columns = maps.shape[1:]
    best, whole = maps.flatten(2).max(2)
    line_y = torch.arange(rows, device=maps.device)
    line_x = torch.arange(columns, device=maps.device)
    chosen = [whole[:, 0]]
    for frame in range(1, frames):
        y, x = chosen[-1] // columns, chosen[-1] % columns
        near_y = apart(line_y - y[:, None], rows).abs() <= reach
        near_x = apart(line_x - x[:, None], columns).abs() <= reach
        near = near_y[:, :, None] & near_x[:, None, :]
        gain, place = maps[:, frame].masked_fill(~near, -torch.inf).flatten(1).max(1)
        stay = (gain > 0) & (gain >= keep * best[:, frame])
        chosen.append(torch.where(stay, place, whole[:, frame]))
    index = torch.stack(chosen, dim=1)
    y, x = index // columns, index % columns
    flat = maps.flatten(2)

    def at(dy: int, dx: int) -> Tensor:
        place = (y + dy).remainder(rows) * columns + (x + dx).remainder(columns)
        return flat.gather(2, place[..., None])[..., 0]

    middle = at(0, 0)
    shift_y = _vertex(at(-1, 0), middle, at(1, 0))
    shift_x = _vertex(at(0, -1), middle, at(0, 1))
    return torch.stack([y + shift_y, x + shift_x], dim=-1)


def _vertex(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """Where the parabola through three values has its top, within half a step."""
    bend = (2 * middle - before - after).clamp_min(1e-6)
    return ((after - before) / (2 * bend)).clamp(-0.5, 0.5)


def apart(difference: Tensor, size: float) -> Tensor:
    """The shortest way between places on a torus of that size, each axis of its own."""
    return (difference + size / 2).remainder(size) - size / 2


def explained(
    world: World,
    video: Float[Tensor, "B F 3 H W"],
    behind: Float[Tensor, "B F 3 H W"],
    colour: Float[Tensor, "B 3"],
    shape: Int[Tensor, " B"],
    where: Float[Tensor, "B F 2"],
) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B F"], Float[Tensor, "B F H W"]]:
    """How well the sprite fits: shares of its own energy, and of all that is near it.

    Returns:
        gain / sum a^2 |c - b|^2: 1 for a perfect sprite, 2 k - 1 for one of k times its contrast;
        gain / sum |v - b|^2 over a disc around it: 1 where nothing else is there;
        (v - b) . (c - b) / |c - b|^2, the part of the sprite's colour in each pixel.
    """
    alpha = torch.stack(
        [coverage(SHAPES[int(s)], world, at) for s, at in zip(shape, where, strict=True)]
    )
    contrast = colour[:, None, :, None, None] - behind
    seen = video - behind
    along, power = (contrast * seen).sum(2), contrast.square().sum(2)
    energy = (alpha.square() * power).sum((2, 3))
    gain = (2 * alpha * along).sum((2, 3)) - energy
    around = _disc(world, where)
    total = (around * seen.square().sum(2)).sum((2, 3)).clamp_min(1e-9)
    return gain / energy, gain / total, along / power


def _disc(world: World, where: Float[Tensor, "B F 2"]) -> Float[Tensor, "B F H W"]:
    """1 within 1.4 radii of each place."""
    n = world.size
    line = torch.arange(n, device=where.device) + 0.5
    dy = apart(line - where[..., :1], n)[..., :, None]
    dx = apart(line - where[..., 1:], n)[..., None, :]
    return (dy.square() + dx.square() < (1.4 * world.radius) ** 2).float()
