"""Which background a video shows, and how far it has moved, frame by frame.

Shapes: N frames (of all clips together), K candidates, H = W = size pixels in [0, 1].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mla_study.world.grammar import BACKGROUNDS
from mla_study.world.render import PAN, STRIPES, background
from mla_study.world.scenes import World

_CAP = 0.3
"""An error counts no more than this, so that the sprite does not decide about the background."""
_TYPICAL = 0.15
"""A frame whose typical error exceeds this shows none of the backgrounds."""
_ASIDE = 0.2
"""Pixels that differ by more than this are the sprite's: they say nothing about the texture."""
_THINNED = 24  # rows and columns that are enough to tell backgrounds apart


@dataclass(frozen=True)
class Backdrops:
    """What lies behind the sprite.

    Attributes:
        kind: index into the grammar's backgrounds of each clip.
        near: whether each frame of a clip is near that background at most of its pixels.
        texture: share of the background's own contrast that the clip shows; 1 where it is there.
        phase: pixels that it has moved to the left, each frame, up to its period.
        period: after how many pixels each clip's background repeats (0: night, which stands).
        pixels: the background itself.
    """

    kind: Int[Tensor, " B"]
    near: Bool[Tensor, "B F"]
    texture: Float[Tensor, " B"]
    phase: Float[Tensor, "B F"]
    period: Float[Tensor, " B"]
    pixels: Float[Tensor, "B F 3 H W"]


def periods(world: World) -> tuple[float, ...]:
    """Pixels after which each background repeats; 0 for night."""
    held = {"stripes": world.size / STRIPES, "pan": world.size / PAN}
    return tuple(held.get(name, 0.0) for name in BACKGROUNDS)


@functools.lru_cache(maxsize=4)
def _bank(
    world: World,
) -> tuple[Float[Tensor, "K 3 H W"], Int[Tensor, " K"], Float[Tensor, " K"]]:
    """Candidates: their pixels, their kinds and their phases, in steps of at most one pixel."""
    pixels: list[Tensor] = []
    kinds: list[int] = []
    phases: list[Tensor] = []
    for index, (name, period) in enumerate(zip(BACKGROUNDS, periods(world), strict=True)):
        count = max(1, -int(-period // 1))
        phase = torch.arange(count) * (period / count)
        pixels.append(background(name, world, phase))
        kinds += [index] * count
        phases.append(phase)
    return torch.cat(pixels), torch.tensor(kinds), torch.cat(phases)


def find_backdrops(world: World, video: Float[Tensor, "B F 3 H W"]) -> Backdrops:
    """The background of each clip: the kind that fits all frames best, its phase in each frame."""
    clips, frames = video.shape[:2]
    bank, kinds, phases = (part.to(video.device) for part in _bank(world))
    flat = video.flatten(0, 1)
    stride = max(1, world.size // _THINNED)
    thin, thin_bank = flat[..., ::stride, ::stride], bank[..., ::stride, ::stride]
    errors = torch.stack(
        [(thin - one).abs_().clamp_(max=_CAP).mean((1, 2, 3)) for one in thin_bank], dim=1
    )
    best = torch.stack(
        [
            errors.masked_fill(kinds != kind, torch.inf).amin(1).reshape(clips, frames)
            for kind in range(len(BACKGROUNDS))
        ]
    )
    kind = best.sum(-1).argmin(0)
    own = kinds[None] == kind.repeat_interleave(frames)[:, None]
    chosen = errors.masked_fill(~own, torch.inf).argmin(1)
    pixels = bank[chosen]
    error = (flat - pixels).abs().mean(1)
    period = torch.tensor(periods(world), device=video.device)[kind]
    return Backdrops(
        kind,
        (error.flatten(1).median(1).values < _TYPICAL).reshape(clips, frames),
        _texture(flat, pixels, error < _ASIDE, clips),
        phases[chosen].reshape(clips, frames),
        period,
        pixels.reshape(video.shape),
    )


def _texture(
    video: Float[Tensor, "N 3 H W"],
    behind: Float[Tensor, "N 3 H W"],
    trusted: Bool[Tensor, "N H W"],
    clips: int,
) -> Float[Tensor, " B"]:
    """Slope of the video against the background over trusted pixels, without their means."""
    weight = trusted[:, None].float()
    share = weight / weight.sum((2, 3), keepdim=True).clamp_min(1)
    texture = behind - (share * behind).sum((2, 3), keepdim=True)
    along = (weight * texture * video).sum((1, 2, 3)).reshape(clips, -1).sum(1)
    power = (weight * texture.square()).sum((1, 2, 3)).reshape(clips, -1).sum(1)
    return along / power.clamp_min(1e-9)


def drift(backdrops: Backdrops, times: Int[Tensor, " F"]) -> Float[Tensor, " B"]:
    """Pixels a frame that the background moves to the left; the median over frames.

    Args:
        times: the number of each frame.
    """
    if backdrops.phase.shape[1] < 2:
        return torch.zeros_like(backdrops.period)
    period = backdrops.period.clamp_min(1e-6)[:, None]
    moved = backdrops.phase.diff(dim=1)
    wrapped = (moved + period / 2).remainder(period) - period / 2
    return torch.where(backdrops.period > 0, _middle(wrapped / times.diff()), 0.0)


def _middle(values: Float[Tensor, "B F"]) -> Float[Tensor, " B"]:
    """The mean of the middle half: robust as a median, but not bound to whole pixels."""
    ordered = values.sort(dim=1).values
    cut = values.shape[1] // 4
    return ordered[:, cut : values.shape[1] - cut].mean(1)
