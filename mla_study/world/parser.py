"""Reads a video of the world back: what its caption must have said, without ever seeing it.

Each frame is explained by the likeliest background and sprite (see
:mod:`~mla_study.world.fitting`); a clip's facts come from all of its frames together.

Shapes: B clips, F frames, H = W = size pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mla_study.errors import UserError
from mla_study.world.backdrop import Backdrops, drift, find_backdrops
from mla_study.world.fitting import FINE, apart, best_shapes, colour_gains, explained, track
from mla_study.world.grammar import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES, SLOTS, Caption
from mla_study.world.render import palette
from mla_study.world.scenes import World, direction_of

_OWN = 0.2
"""A sprite is there where it gains this share of its energy (at 60 % of its contrast), ..."""
_NEAR = 0.3
"""... and this share of everything that differs from the background near it."""
_TEXTURE = 0.15
"""A background is told where the clip shows this share of its contrast."""
_STEADY = 1.5
"""Ways within so many steps of the median are the usual ones; half of all must be."""
_REACH = 3.5
"""Steps that a sprite can make between two frames before it counts as a jump."""
_TOO_FAST = 3
"""Steps a frame from which a pace is none of the world's."""
_ENOUGH = 1 << 20  # values that tell the range of a video
_PIECE = 1 << 21
"""Pixels of a video that are parsed at a time."""


@dataclass(frozen=True)
class Facts:
    """What a clip shows; None where it does not show any.

    ``velocity`` is (y, x) in pixels a frame, ``background_speed`` pixels a frame to the left.
    """

    speed: str | None
    colour: str | None
    shape: str | None
    direction: str | None
    row: str | None
    column: str | None
    background: str | None
    velocity: tuple[float, float] | None
    background_speed: float

    @property
    def has_sprite(self) -> bool:
        """Whether there is a sprite in at least half of the frames."""
        return self.colour is not None

    @property
    def caption(self) -> Caption | None:
        """The caption that says all of it, if everything is there."""
        words = [getattr(self, slot) for slot in SLOTS]
        return None if None in words else Caption(*words)


@dataclass(frozen=True)
class Parsed:
    """Clips as they were read.

    Attributes:
        facts: of each clip.
        where: (y, x) of the sprite in each frame, in pixels; the best guess where none is seen.
        seen: whether there is a sprite in each frame.
        colours: index of the colour that explains each frame best by itself.
        mask: pixels that are at least half of the sprite's colour.
    """

    world: World
    facts: tuple[Facts, ...]
    where: Float[Tensor, "B F 2"]
    seen: Bool[Tensor, "B F"]
    colours: Int[Tensor, "B F"]
    mask: Bool[Tensor, "B F H W"]


def as_pixels(video: Tensor | np.ndarray, signed: bool | None = None) -> Float[Tensor, "B F 3 H W"]:
    """A video as float32 in [0, 1].

    Args:
        video: [B, F, H, W, 3] or [B, 3, F, H, W], or either without B; bytes in 0 .. 255 or floats.
        signed: whether floats are in [-1, 1] rather than in [0, 1]. None looks: every background
            of the world is darker than the middle, so that the median of a signed video is below 0.

    Raises:
        UserError: another shape, or values that are not finite.
    """
    held = torch.as_tensor(video).detach()
    if held.ndim == 4:
        held = held[None]
    if held.ndim != 5 or 3 not in (held.shape[1], held.shape[4]) or 0 in held.shape:
        raise UserError(
            f"a video of shape {list(held.shape)} cannot be read: give [batch, frames, height, "
            "width, 3] or [batch, 3, frames, height, width]"
        )
    last = held.shape[4] == 3
    moved = held.permute(0, 1, 4, 2, 3) if last else held.permute(0, 2, 1, 3, 4)
    pixels = moved.float()
    if not held.is_floating_point():
        return pixels / 255
    if not bool(torch.isfinite(pixels).all()):
        raise UserError("the video holds NaN or infinity: give finite pixels")
    few = pixels.flatten()[:: pixels.numel() // _ENOUGH | 1]
    if bool(few.median() < 0) if signed is None else signed:
        pixels = (pixels + 1) / 2
    return pixels.clamp(0, 1)


def longest_gap(world: World) -> int:
    """Frames from one to the next that is given, at most, for any pace of the world to be told.

    Over more, what is too fast comes round the torus and looks like another pace.

    >>> longest_gap(World())
    4
    """
    return max(1, int(world.size / 2 / (_TOO_FAST * world.step)))


def parse(
    video: Tensor | np.ndarray,
    world: World | None = None,
    signed: bool | None = None,
    numbers: Sequence[int] | None = None,
) -> Parsed:
    """Read clips; see :func:`as_pixels` for what a video is, and ``signed``.

    Args:
        world: the world that the clips claim to show; by default one of the video's size.
        numbers: which frames of the clips these are, where some are left out: the first is 0, and
            no gap exceeds :func:`longest_gap`. Speeds stay those a frame of the clip.

    Raises:
        UserError: frames of another size than the world's, or numbers that do not fit.
    """
    pixels = as_pixels(video, signed)
    height, width = pixels.shape[3:]
    if world is None and height == width:
        world = World(height)
    if world is None or (height, width) != (world.size, world.size):
        wanted = "square" if world is None else f"{world.size} x {world.size}"
        raise UserError(f"frames of {height} x {width} pixels do not fit a world that is {wanted}")
    times = _times(world, pixels.shape[1], numbers).to(pixels.device)
    each = max(1, _PIECE // (pixels.shape[1] * height * width))
    parts = [_parse(world, piece, times) for piece in pixels.split(each)]
    return Parsed(
        world,
        tuple(fact for part in parts for fact in part.facts),
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("where", "seen", "colours", "mask")
        ),
    )


def _times(world: World, frames: int, numbers: Sequence[int] | None) -> Int[Tensor, " F"]:
    """The moment of each frame."""
    if numbers is None:
        return torch.arange(frames)
    held = [int(number) for number in numbers]
    most = longest_gap(world)
    gaps = [after - before for before, after in itertools.pairwise(held)]
    if len(held) != frames or held[0] or not all(0 < gap <= most for gap in gaps):
        raise UserError(
            f"{held} do not number {frames} frames of a clip: give each its number, from 0 and at "
            f"most {most} apart"
        )
    return torch.tensor(held)


def _parse(world: World, video: Float[Tensor, "B F 3 H W"], times: Int[Tensor, " F"]) -> Parsed:
    backdrops = find_backdrops(world, video)
    behind = backdrops.pixels
    gains = colour_gains(world, video, behind)
    colour = gains.clamp_min(0).sum(1).argmax(1)
    rgb = palette().to(video.device)[colour]
    shape, maps = best_shapes(world, video, behind, rgb)
    gap = int(times.diff().max()) if len(times) > 1 else 1
    where = (track(maps, FINE * _REACH * world.step * gap) / FINE).remainder(world.size)
    share, near, part = explained(world, video, behind, rgb, shape, where)
    # without a background to stand out from, anything explains a bright patch
    seen = (share > _OWN) & (near > _NEAR) & backdrops.near
    facts = _facts(world, backdrops, colour, shape, where, seen, times)
    shown = torch.tensor([fact.has_sprite for fact in facts], device=video.device)
    mask = (part > 0.5) & shown[:, None, None, None]
    return Parsed(world, facts, where, seen, gains.argmax(2), mask)


def _facts(
    world: World,
    backdrops: Backdrops,
    colour: Int[Tensor, " B"],
    shape: Int[Tensor, " B"],
    where: Float[Tensor, "B F 2"],
    seen: Bool[Tensor, "B F"],
    times: Int[Tensor, " F"],
) -> tuple[Facts, ...]:
    speeds = drift(backdrops, times).tolist()
    moments = times.cpu()
    usual = backdrops.near.float().mean(1) > 0.5
    shown = (usual & (backdrops.texture > _TEXTURE)).tolist()
    found: list[Facts] = []
    for clip in range(len(colour)):
        name = BACKGROUNDS[int(backdrops.kind[clip])]
        pace = abs(speeds[clip]) > world.step / 2 if backdrops.phase.shape[1] > 1 else name == "pan"
        told = name if shown[clip] and pace == (name == "pan") else None
        visible = seen[clip].nonzero()[:, 0].cpu()
        if 2 * len(visible) < where.shape[1]:
            found.append(Facts(None, None, None, None, None, None, told, None, speeds[clip]))
            continue
        path = where[clip].cpu()
        velocity = velocity_of(path, visible, world, moments)
        row, column = cell_of(path, visible, velocity, world, moments)
        speed, direction = _motion(velocity, world)
        found.append(
            Facts(
                speed,
                COLOURS[int(colour[clip])],
                SHAPES[int(shape[clip])],
                direction,
                row,
                column,
                told,
                None if velocity is None else (float(velocity[0]), float(velocity[1])),
                speeds[clip],
            )
        )
    return tuple(found)


def velocity_of(
    path: Float[Tensor, "F 2"], visible: Int[Tensor, " V"], world: World, times: Int[Tensor, " F"]
) -> Float[Tensor, " 2"] | None:
    """(y, x) a frame: the mean of the steps near their median; None where most steps are not."""
    both = visible[:-1][visible.diff() == 1]
    if not len(both):
        return None
    steps = apart(path[both + 1] - path[both], world.size) / times.diff()[both][:, None]
    middle = steps.median(0).values
    usual = (steps - middle).norm(dim=1) <= _STEADY * world.step
    return steps[usual].mean(0) if 2 * int(usual.sum()) >= len(steps) else None


def cell_of(
    path: Float[Tensor, "F 2"],
    visible: Int[Tensor, " V"],
    velocity: Float[Tensor, " 2"] | None,
    world: World,
    times: Int[Tensor, " F"],
) -> tuple[str, str]:
    """Row and column where the sprite starts, told from the first four frames that show it."""
    first = visible[:4]
    speed = torch.zeros(2) if velocity is None else velocity
    starts = path[first] - times[first][:, None] * speed
    anchor = starts[0]
    start = anchor + apart(starts - anchor, world.size).median(0).values
    y, x = (start.remainder(world.size) / world.cell).long().clamp(0, 2).tolist()
    return ROWS[y], COLUMNS[x]


def _motion(velocity: Float[Tensor, " 2"] | None, world: World) -> tuple[str | None, str | None]:
    """The words for a velocity; None where it stands still, runs off or goes askew."""
    if velocity is None:
        return None, None
    y, x = (velocity / world.step).tolist()
    pace, askew = max(abs(y), abs(x)), min(abs(y), abs(x))
    direction = direction_of(y, x) if pace > 0.5 and askew < 0.5 * pace else None
    if not 0.5 < pace < _TOO_FAST:
        return None, direction
    return ("slow" if pace < 1.5 else "fast"), direction
