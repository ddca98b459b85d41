"""The captions of the miniature world: what can be said, read and drawn at random.

A caption has nine words, seven of which say something::

    fast red square moving right middle center on stripes

The text encoder gets eight of them: "on" says nothing and the miniature reads eight tokens.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from mla_study.errors import UserError

SPEEDS = ("slow", "fast")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("square", "disc", "triangle", "cross")
DIRECTIONS = ("left", "right", "up", "down")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left-side", "center", "right-side")
BACKGROUNDS = ("night", "stripes", "pan")

SLOTS: dict[str, tuple[str, ...]] = {
    "speed": SPEEDS,
    "colour": COLOURS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "row": ROWS,
    "column": COLUMNS,
    "background": BACKGROUNDS,
}
"""Slot of a caption -> its words, in the order of the caption."""

_ALIKE = 0.5  # less than this is chance: then the slot's first word is suggested

TOKENS = 8
"""Words of a caption that the text encoder gets."""

GRAMMAR = " ".join(
    [
        *(f"{{{', '.join(SLOTS[slot])}}}" for slot in ("speed", "colour", "shape")),
        "moving",
        *(f"{{{', '.join(SLOTS[slot])}}}" for slot in ("direction", "row", "column")),
        "on",
        f"{{{', '.join(BACKGROUNDS)}}}",
    ]
)


@dataclass(frozen=True)
class Caption:
    """What a caption says; each field is a word of :data:`SLOTS`."""

    speed: str
    colour: str
    shape: str
    direction: str
    row: str
    column: str
    background: str

    def __post_init__(self) -> None:
        for (slot, words), word in zip(SLOTS.items(), astuple(self), strict=True):
            if word not in words:
                raise UserError(f"'{word}' is no {slot} of the world: give {', '.join(words)}")

    def __str__(self) -> str:
        return caption_of(self)


def caption_of(caption: Caption) -> str:
    """The nine words of a caption."""
    c = caption
    return (
        f"{c.speed} {c.colour} {c.shape} moving {c.direction} {c.row} {c.column} on {c.background}"
    )


@functools.lru_cache(maxsize=8192)
def parse_caption(text: str) -> Caption:
    """The facts of a caption; case, spaces and a full stop at the end do not matter.

    Raises:
        UserError: a text outside the grammar; the sentence says it, and the nearest caption.
    """
    words = text.lower().rstrip(". \n").split()
    if len(words) == 9 and words[3] == "moving" and words[7] == "on":
        told = [*words[:3], *words[4:7], words[8]]
        if all(word in known for word, known in zip(told, SLOTS.values(), strict=True)):
            return Caption(*told)
    short = " ".join(text.split())[:100]
    raise UserError(
        f"'{short}' is no caption of the world, which reads {GRAMMAR}: "
        f"the nearest caption is '{_nearest(words[:40])}'"
    )


def _nearest(words: Sequence[str]) -> str:
    """The caption of those known words that are likest to a given one, slot by slot."""
    chosen: list[str] = []
    for known in SLOTS.values():
        likeness = [max(map(_likeness(word), words), default=0.0) for word in known]
        best = max(likeness)
        chosen.append(known[likeness.index(best)] if best > _ALIKE else known[0])
    return caption_of(Caption(*chosen))


def _likeness(word: str) -> Callable[[str], float]:
    matcher = difflib.SequenceMatcher(None, b=word)

    def ratio(other: str) -> float:
        matcher.set_seq1(other)
        return matcher.ratio()

    return ratio


@functools.cache
def all_captions() -> tuple[Caption, ...]:
    """All 5184 captions, the last word changing fastest."""
    return tuple(Caption(*words) for words in itertools.product(*SLOTS.values()))


def sample_captions(count: int, *seed: int) -> list[Caption]:
    """Captions drawn uniformly and independently; the same for the same seed on every machine.

    Raises:
        UserError: a negative count or seed.
    """
    if count < 0:
        raise UserError(f"{count} captions cannot be drawn: give a count that is not negative")
    rng = stream(0, *seed)
    known = all_captions()
    return [known[int(i)] for i in rng.integers(0, len(known), count)]


def stream(*seed: int) -> np.random.Generator:
    """A random stream of its own for these numbers, the same on every machine.

    Raises:
        UserError: a negative number.
    """
    if any(number < 0 for number in seed):
        raise UserError(f"a seed of {min(seed)} is none: give an integer that is not negative")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def tokens(caption: Caption | str) -> list[str]:
    """The eight words that the text encoder gets.

    Raises:
        UserError: a text outside the grammar.
    """
    known = caption if isinstance(caption, Caption) else parse_caption(caption)
    return [word for word in caption_of(known).split() if word != "on"]
