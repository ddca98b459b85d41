"""``mla-study latents``: look into files of latents."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class LatentsInfo:
    """Print shape, dtype and statistics, and whether they are scaled for the transformer.

    Example: mla-study latents info latents.safetensors
    """

    path: tyro.conf.Positional[Path]
    """A .pt, .pth or .safetensors file with one tensor of latents."""

    def run(self) -> int:
        """Print."""
        from mla_study.rollout.latents import info_text, read_latents

        print(info_text(read_latents(self.path)))
        return 0


@dataclass(frozen=True)
class LatentsDenoiseCheck:
    """Noise latents to each few-step level, and take them back by the true flow.

    Exits with 1 where the latents do not come back. Example: mla-study latents denoise-check FILE
    """

    path: tyro.conf.Positional[Path]
    """A .pt, .pth or .safetensors file with one tensor of latents."""
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    """Timesteps before the shift."""
    shift: float = 5.0
    """Timestep shift (Wan: 5)."""
    lookup: Literal["exact", "table"] = "exact"
    """How a timestep becomes a sigma: t / 1000, or the nearest of Self-Forcing's table."""
    seed: int = 0
    """Seed of the noise."""

    def run(self) -> int:
        """Check, and return 1 where the latents do not come back."""
        from mla_study.rollout.latents import TOLERANCE, denoise_check, denoise_text, read_latents

        file = read_latents(self.path)
        steps = denoise_check(file.latents, self.steps, self.shift, self.lookup, self.seed)
        print(denoise_text(steps, str(file.latents.dtype).removeprefix("torch.")))
        worst = max(step.error for step in steps)
        good = worst <= TOLERANCE
        print(
            f"the latents come back to {worst:.1e} of their RMS: {'good' if good else 'BAD'} "
            f"(at most {TOLERANCE:.0e})",
            file=sys.stdout if good else sys.stderr,
        )
        return 0 if good else 1


@dataclass(frozen=True)
class Latents:
    """Look into files of latents: statistics, and a check of the flow arithmetic on them.

    Example: mla-study latents info latents.safetensors
    """

    command: (
        Annotated[LatentsInfo, tyro.conf.subcommand("info")]
        | Annotated[LatentsDenoiseCheck, tyro.conf.subcommand("denoise-check")]
    )

    def run(self) -> int:
        """Run the chosen command."""
        return self.command.run()
