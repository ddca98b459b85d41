"""``mla-study cache-error``: what each cache storage costs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mla_study.errors import UserError, tell


@dataclass(frozen=True)
class CacheError:
    """Measure the error of every cache storage: on the entries apart, and on attention's output.

    Entries are those of a clean pass (t = 0) over the given latents, or over Gaussian noise.

    Example: mla-study cache-error --preset mini --random-weights
    """

    checkpoint: str | None = None
    """Weights: original Wan, diffusers, Self-Forcing, or a folder of ours."""
    random_weights: bool = False
    """A preset with random weights."""
    preset: str | None = None
    """Model with --random-weights (default mini), or what a checkpoint without config is."""
    variant: Literal["dense", "latent"] | None = None
    """Self-attention with --random-weights (default latent); of a checkpoint, a check."""
    weights: str | None = None
    """Which dictionary of a PyTorch file, such as generator_ema."""
    latents: Path | None = None
    """Latents to read (.pt, .pth or .safetensors); default: Gaussian noise."""
    frames: int | None = None
    """Latent frames, cut to whole chunks (default: as many as a step reads keys of)."""
    size: str | None = None
    """HEIGHTxWIDTH of random latents (default: the model's); smaller is faster."""
    window: str | None = None
    """sink,history,chunk in latent frames (default: the model's)."""
    timestep: float = 0.0
    """Timestep of the pass, 0 to 1000."""
    seed: int = 0
    """Seed of random latents."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Measure and print."""
        import torch

        from mla_study.config import parse_window
        from mla_study.model.reports import storage_errors, storage_table
        from mla_study.rollout.latents import read_latents
        from mla_study.rollout.setup import ModelChoice, build_model, parse_size

        if not 0 <= self.timestep <= 1000:
            raise UserError(f"--timestep is {self.timestep}, but it must lie between 0 and 1000")
        choice = ModelChoice(
            self.checkpoint, self.random_weights, self.preset, self.variant, self.weights,
            dtype="fp32",
        )  # fmt: skip
        model = build_model(choice, tell)
        config = model.config
        window = config.window if self.window is None else parse_window(self.window)
        frames = window.key_frames if self.frames is None else self.frames
        if self.latents is None:
            height, width = parse_size(self.size) if self.size else config.latent_size
            whole = _whole(frames, window.chunk)
            make = torch.Generator().manual_seed(self.seed)
            x = torch.randn(1, config.in_channels, whole, height, width, generator=make)
        else:
            x = read_latents(self.latents).latents.float()
            x = x[:, :, : _whole(min(frames, x.shape[2]), window.chunk)]
        text = torch.zeros(x.shape[0], 1, config.text_dim)
        t = torch.full((x.shape[0],), self.timestep)
        errors = storage_errors(model, x, t, text, window)
        if self.json:
            print(json.dumps([dataclasses.asdict(error) for error in errors], indent=1))
            return 0
        kind = "dense" if config.latent is None else "latent"
        source = self.latents.name if self.latents is not None else "Gaussian noise"
        held = "random weights" if self.random_weights else str(self.checkpoint)
        print(
            f"{config.name}, {kind}, {config.layers} layers, {held}; {source}, "
            f"{x.shape[2]} frames, t = {self.timestep:g}"
        )
        print(storage_table(config, errors))
        return 0


def _whole(frames: int, chunk: int) -> int:
    if frames < chunk:
        raise UserError(f"{frames} latent frames are less than a chunk of {chunk}: give more")
    if frames % chunk:
        tell(f"{frames} latent frames are cut to {frames - frames % chunk}: chunks have {chunk}")
    return frames - frames % chunk
