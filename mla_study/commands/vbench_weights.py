"""``mla-study vbench doctor`` and ``fetch-weights``: what VBench's scorers need, and getting it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

_EXIT_NOT_READY = 2
_EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Doctor:
    """Say which of VBench's dimensions can run here, and what the others lack.

    Exit code 0 if all that was asked for can, else 2.

    Example: mla-study vbench doctor videos/ --weights ~/.cache/vbench --dimensions overall_6
    """

    videos: tyro.conf.Positional[Path | None] = None
    """A folder of videos, or one: how long would it take?"""
    dimensions: tuple[str, ...] = ()
    """Which: names, all, quality, semantic, overall_6, substitutes (default: all 16)."""
    mode: Literal["short", "long", "custom"] = "short"
    """VBench's protocol, its long mode, or any clips."""
    weights: Path | None = None
    """Weights folder (default: VBENCH_CACHE_DIR, else ~/.cache/vbench)."""
    detectron2: Path | None = None
    """A checkout of detectron2 (default: in the environment, or WEIGHTS/detectron2)."""
    environment: Path | None = None
    """VBench's environment (default: MLA_STUDY_VBENCH_ENV, else .venv-vbench)."""
    trust_weights: bool = False
    """Count files as usable whose sha256 nobody published."""
    json: bool = False
    """Print one JSON document on stdout."""

    def run(self) -> int:
        """Look, print, and return the exit code."""
        import json

        from mla_study.evaluation.vbench.needs.doctor import examine
        from mla_study.evaluation.vbench.needs.doctor_text import document, text

        report = examine(
            dimensions=_words(self.dimensions),
            mode=self.mode,
            weights=self.weights,
            detectron2=self.detectron2,
            environment=self.environment,
            videos=self.videos,
            trust=self.trust_weights,
        )
        print(json.dumps(document(report), indent=1) if self.json else text(report))
        return 0 if report.ready else _EXIT_NOT_READY


@dataclass(frozen=True)
class FetchWeights:
    """Download what the scorers need and the folder lacks.

    Every file is checked by size and sha256 before it gets its name. Stopped or cut off, the same
    command goes on where it was. Exit code 2 if something is still missing.

    Example: mla-study vbench fetch-weights --to ~/.cache/vbench --dimensions overall_6
    """

    to: Path
    """Weights folder."""
    dimensions: tuple[str, ...] = ()
    """For which: names, all, quality, semantic, overall_6, substitutes (default: all 16)."""
    mode: Literal["short", "long", "custom"] = "short"
    """long: also what compares the clips of long videos."""
    mirror: str | None = None
    """Base address of a mirror: https://HOST/PATH is asked for as MIRROR/HOST/PATH."""
    dry_run: bool = False
    """Only say what would be downloaded."""

    def run(self) -> int:
        """Fetch, and return the exit code."""
        from mla_study.evaluation.vbench.needs.fetch import fetch_weights

        try:
            done = fetch_weights(
                self.to,
                dimensions=_words(self.dimensions),
                mode=self.mode,
                mirror=self.mirror,
                dry_run=self.dry_run,
            )
        except KeyboardInterrupt:
            print("note: interrupted; the same command goes on.", file=sys.stderr)
            return _EXIT_INTERRUPTED
        return 0 if done else _EXIT_NOT_READY


def _words(given: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for text in given for word in text.replace(",", " ").split())
