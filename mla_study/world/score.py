"""Compares what a video shows with what its caption says.

The video is parsed first, without the caption. Shapes: B clips, F frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.world.fitting import apart
from mla_study.world.grammar import COLOURS, SLOTS, Caption, parse_caption
from mla_study.world.parser import Facts, Parsed, parse
from mla_study.world.render import masks
from mla_study.world.scenes import JITTER, Scenes, World, centres, velocities


@dataclass(frozen=True)
class Scores:
    """How well clips show their captions.

    Attributes:
        parsed: what was read.
        captions: what was asked for.
        correct: slot of the caption -> whether the clip shows it.
        iou: overlap of the sprite's pixels with those of the true sprite, mean over frames; 0
            where there is no sprite.
        velocity_error: pixels a frame, mean over neighbouring frames that show the sprite; NaN
            where there are none.
        phase_error: pixels between the sprite and the true one, in each frame; NaN in a frame that
            does not show it.
        colour_kept: share of frames whose sprite is there and has the caption's colour.

    The true sprite moves as the caption says, from the place in its cell (centre +- 15 %) that is
    nearest to where the sprite was in the first frame.
    """

    parsed: Parsed
    captions: tuple[Caption, ...]
    correct: Mapping[str, Bool[Tensor, " B"]]
    iou: Float[Tensor, " B"]
    velocity_error: Float[Tensor, " B"]
    phase_error: Float[Tensor, "B F"]
    colour_kept: Float[Tensor, " B"]

    @property
    def all_correct(self) -> Bool[Tensor, " B"]:
        """Whether a clip shows everything that its caption says."""
        return torch.stack(list(self.correct.values())).all(0)

    @property
    def has_sprite(self) -> Bool[Tensor, " B"]:
        """Whether a clip shows a sprite at all."""
        return torch.tensor([fact.has_sprite for fact in self.parsed.facts], dtype=torch.bool)

    def summary(self) -> dict[str, float]:
        """Means over the clips: shares, IoU, pixels a frame, pixels (NaN left out)."""
        held: dict[str, Tensor] = {
            **self.correct,
            "all_correct": self.all_correct,
            "has_sprite": self.has_sprite,
            "iou": self.iou,
            "velocity_error": self.velocity_error,
            "phase_error": self.phase_error,
            "phase_error_last": self.phase_error[:, -1],
            "colour_kept": self.colour_kept,
        }
        return {name: float(values.float().nanmean()) for name, values in held.items()}

    def clip(self, index: int) -> dict[str, Any]:
        """One clip as plain values: None for what is not there."""
        facts = self.parsed.facts[index]
        phase = self.phase_error[index]
        return {
            "caption": str(self.captions[index]),
            "shown": {slot: getattr(facts, slot) for slot in SLOTS},
            "correct": {slot: bool(held[index]) for slot, held in self.correct.items()},
            "all_correct": bool(self.all_correct[index]),
            "has_sprite": facts.has_sprite,
            "iou": float(self.iou[index]),
            "velocity": facts.velocity,
            "velocity_error": _number(self.velocity_error[index]),
            "phase_error": _number(phase.nanmean()),
            "phase_error_last": _number(phase[-1]),
            "colour_kept": float(self.colour_kept[index]),
            "background_speed": facts.background_speed,
        }


def score(
    video: Tensor | np.ndarray,
    captions: str | Caption | Sequence[str | Caption],
    world: World | None = None,
    truth: Scenes | None = None,
    signed: bool | None = None,
) -> Scores:
    """Score clips against their captions.

    Args:
        video, signed: see :func:`~mla_study.world.parser.as_pixels`.
        captions: one for all clips, or one each.
        world: by default one of the video's size.
        truth: the scenes that the clips were rendered from, where the true start is known.

    Raises:
        UserError: captions outside the grammar or of another number, or frames of another size.
    """
    told = [captions] if isinstance(captions, str | Caption) else list(captions)
    wanted = [c if isinstance(c, Caption) else parse_caption(c) for c in told]
    parsed = parse(video, world, signed)
    if len(wanted) == 1:
        wanted *= len(parsed.facts)
    if len(wanted) != len(parsed.facts):
        raise UserError(
            f"{len(wanted)} captions do not fit {len(parsed.facts)} clips: give one each, or one"
        )
    return compare(parsed, wanted, truth)


def wrong_slots(facts: Facts, caption: Caption) -> tuple[str, ...]:
    """What a clip does not show as its caption says, in the caption's order."""
    return tuple(slot for slot in SLOTS if getattr(facts, slot) != getattr(caption, slot))


def compare(parsed: Parsed, captions: Sequence[Caption], truth: Scenes | None = None) -> Scores:
    """Scores of clips that were parsed before, one caption each."""
    where, seen = parsed.where.cpu(), parsed.seen.cpu()
    size, frames = parsed.world.size, where.shape[1]
    scenes = truth or Scenes(parsed.world, tuple(captions), _starts(parsed, captions))
    true = scenes.positions(frames)
    wrong = [wrong_slots(f, c) for f, c in zip(parsed.facts, captions, strict=True)]
    correct = {
        slot: torch.tensor([slot not in slots for slots in wrong], dtype=torch.bool)
        for slot in SLOTS
    }
    phase = apart(where - true, size).norm(dim=-1).masked_fill(~seen, math.nan)
    speed = velocities(parsed.world, captions)[:, None]
    steps = apart(where.diff(dim=1) - speed, size).norm(dim=-1)
    steps = steps.masked_fill(~(seen[:, 1:] & seen[:, :-1]), math.nan)
    wanted = torch.tensor([COLOURS.index(c.colour) for c in captions])[:, None]
    return Scores(
        parsed,
        tuple(captions),
        correct,
        _overlap(parsed.mask.cpu(), masks(scenes, true) > 0.5),
        steps.nanmean(1),
        phase,
        ((parsed.colours.cpu() == wanted) & seen).float().mean(1),
    )


def _starts(parsed: Parsed, captions: Sequence[Caption]) -> Float[Tensor, "B 2"]:
    """The allowed start nearest to the sprite in the first frame; the cell's centre for none."""
    middle = centres(parsed.world, captions)
    off = apart(parsed.where[:, 0].cpu() - middle, parsed.world.size)
    reach = JITTER * parsed.world.cell
    return middle + off.clamp(-reach, reach) * parsed.seen[:, :1].cpu()


def _overlap(found: Bool[Tensor, "B F H W"], true: Bool[Tensor, "B F H W"]) -> Float[Tensor, " B"]:
    both, any_ = (found & true).sum((2, 3)), (found | true).sum((2, 3))
    return (both / any_.clamp_min(1)).mean(1)


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)
