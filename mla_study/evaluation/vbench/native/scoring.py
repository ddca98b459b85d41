"""What a scorer gives for one video, and where its weights lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mla_study.errors import UserError

ASSETS = "MLA_STUDY_ASSETS"
"""Names a folder whose ``weights`` are looked through after the weights folder itself."""


@dataclass(frozen=True)
class Score:
    """A video's value, from how many of its frames, and what else a reader should know."""

    value: float
    frames: int
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])


@runtime_checkable
class Scorer(Protocol):
    """A loaded model."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the packages that the value depends on, beside torch and numpy."""
        ...

    def score(self, path: Path, prompt: str) -> Score:
        """The score of one video.

        Raises:
            UserError: this video cannot be scored.
        """
        ...


@dataclass(frozen=True)
class Job:
    """What a request asks for: weights folder, device, and the scorer's own options."""

    weights: Path
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def count(self, name: str, default: int, least: int = 1) -> int:
        """An option that is a number of something.

        Raises:
            UserError: it is none, or below ``least``.
        """
        value = self.options.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"option {name} is {value!r}, but it must be an integer from {least}")
        return value

    def file(self, relative: str, size: str, source: str) -> Path:
        """A file of the weights folder, or of that name in the folder of assets.

        Args:
            size, source: what is said of it where it is missing.

        Raises:
            UserError: it is in neither place.
        """
        name = Path(relative).name
        places = [self.weights / relative]
        if os.environ.get(ASSETS):
            places.append(Path(os.environ[ASSETS]) / "weights" / name)
        for place in places:
            if place.is_file():
                return place
        raise UserError(f"{name} ({size}) is missing: get it from {source}, put it at {places[0]}")
