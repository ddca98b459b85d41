"""What a dense model is run on while it is converted: noised latents with prompts, or plain noise.

Shapes: S samples, C channels, F latent frames, h x w latent cells, T text tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError

HELD_OUT = 2
"""Samples, the last ones, on which errors are measured; the others calibrate."""

TOKENS = 1024
FRAMES = 3
_NAMES = ("latents", "x0", "clean", "samples")
_PROMPTS = ("context", "prompt_embeds", "embeddings")


@dataclass(frozen=True)
class Inputs:
    """Inputs of the dense model; the last :data:`HELD_OUT` samples are kept for measuring.

    Attributes:
        x: noisy latents.
        t: timesteps, 0 .. 1000.
        context: text embeddings.
        sha256: of what they were made from.
        note: a sentence that says what they are.
        real: whether the latents are given ones.
    """

    x: Float[Tensor, "S C F h w"]
    t: Float[Tensor, " S"]
    context: Float[Tensor, "S T text"]
    sha256: str
    note: str
    real: bool

    def grid(self, patch: tuple[int, int, int]) -> tuple[int, int, int]:
        """Token grid (frames, height, width) of a sample."""
        f, h, w = (n // p for n, p in zip(self.x.shape[2:], patch, strict=True))
        return f, h, w


def noise_inputs(config: ModelConfig, samples: int, seed: int) -> Inputs:
    """Gaussian latents without text, at timesteps spread over the shifted schedule."""
    sizes = _crop_sizes(config, (FRAMES * config.patch[0], *config.latent_size))
    draw = torch.Generator().manual_seed(seed)
    total = samples + HELD_OUT
    x = torch.randn(total, config.in_channels, *sizes, generator=draw)
    t = 1000 * _sigmas(config, samples, draw)
    context = torch.zeros(total, 1, config.text_dim)
    note = (
        f"inputs are Gaussian noise without text ({samples} samples at timesteps spread over the "
        "schedule), for want of given latents: norms and covariances of real inputs differ"
    )
    key = f"noise {seed} {list(x.shape)}".encode()
    return Inputs(x, t, context, hashlib.sha256(key).hexdigest(), note, False)


def file_inputs(config: ModelConfig, path: Path, samples: int, seed: int) -> Inputs:
    """Latents of a file, noised at timesteps spread over the shifted schedule.

    The file (safetensors, or a tensor or dictionary saved by torch) holds ``latents``
    [clips, C, F, h, w] and, if it can, ``context`` [clips, T, text_dim]. Samples take the clips in
    turn, each a crop of at most :data:`FRAMES` frames and about :data:`TOKENS` tokens.

    Raises:
        UserError: unreadable, other channels or text width than the model's, too small, not finite.
    """
    held = _read(path)
    clips = _find(held, _NAMES, path)
    if clips.ndim == 4:
        clips = clips[None]
    if clips.ndim != 5 or clips.shape[1] != config.in_channels:
        raise UserError(
            f"{path}: latents have shape {list(clips.shape)}, but the model takes "
            f"[clips, {config.in_channels}, frames, height, width]"
        )
    if not torch.isfinite(clips).all():
        raise UserError(f"{path}: the latents hold NaN or Inf: give undamaged ones")
    sizes = _crop_sizes(config, clips.shape[2:])
    draw = torch.Generator().manual_seed(seed)
    total = samples + HELD_OUT
    x0: list[Tensor] = []
    for i in range(total):
        clip = clips[i % len(clips)].float()
        for axis, size in enumerate(sizes, start=1):
            room = clip.shape[axis] - size
            start = int(torch.randint(room + 1, (1,), generator=draw))
            clip = clip.narrow(axis, start, size)
        x0.append(clip)
    sigma = _sigmas(config, samples, draw)
    clean = torch.stack(x0)
    noise = torch.randn(clean.shape, generator=draw)
    at = sigma[:, None, None, None, None]
    context, told = _context(held, config, total, len(clips), path)
    note = f"inputs are {len(clips)} clips of {path.name}, noised ({samples} samples), {told}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Inputs((1 - at) * clean + at * noise, 1000 * sigma, context, digest, note, True)


def _sigmas(config: ModelConfig, samples: int, draw: torch.Generator) -> Tensor:
    """One of each stratum of (0, 1), shifted; strata of the held-out samples are their own."""
    shift = config.flow.shift
    parts = [(torch.arange(n) + torch.rand(n, generator=draw)) / n for n in (samples, HELD_OUT)]
    u = torch.cat(parts)
    return shift * u / (1 + (shift - 1) * u)


def _crop_sizes(config: ModelConfig, sizes: Sequence[int]) -> list[int]:
    grid = [n // p for n, p in zip(sizes, config.patch, strict=True)]
    if min(grid) < 1:
        raise UserError(f"latents of {list(sizes)} are smaller than a patch of {config.patch}")
    frames = min(grid[0], FRAMES)
    shrink = min(1.0, (TOKENS / (frames * grid[1] * grid[2])) ** 0.5)
    tokens = [frames, *(max(1, int(n * shrink)) for n in grid[1:])]
    return [n * p for n, p in zip(tokens, config.patch, strict=True)]


def _context(
    held: Mapping[str, Tensor], config: ModelConfig, total: int, clips: int, path: Path
) -> tuple[Tensor, str]:
    if not any(name in held for name in _PROMPTS):
        return torch.zeros(total, 1, config.text_dim), "without text (the file has none)"
    context = _find(held, _PROMPTS, path)
    if context.ndim == 2:
        context = context[None]
    if context.ndim != 3 or context.shape[2] != config.text_dim or len(context) not in (1, clips):
        raise UserError(
            f"{path}: text embeddings have shape {list(context.shape)}, but "
            f"[{clips}, tokens, {config.text_dim}] is needed"
        )
    if context.shape[1] > config.text_len:
        raise UserError(
            f"{path}: the text has {context.shape[1]} tokens, but the model takes at most "
            f"{config.text_len}"
        )
    if not torch.isfinite(context).all():
        raise UserError(f"{path}: the text embeddings hold NaN or Inf: give undamaged ones")
    chosen = [i % clips % len(context) for i in range(total)]
    return context[chosen].float(), "with their text"


def _find(held: Mapping[str, Tensor], names: tuple[str, ...], path: Path) -> Tensor:
    for name in names:
        if name in held:
            return held[name]
    if len(held) == 1 and names is _NAMES:
        return next(iter(held.values()))
    raise UserError(
        f"{path} holds {', '.join(list(held)[:6]) or 'nothing'}, but no tensor '{names[0]}': "
        "name it so"
    )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() in (".pt", ".pth", ".bin"):
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file of latents") from None
    except Exception as error:
        # torch.load raises whatever its unpickler meets.
        raise UserError(f"{path} is no file of plain tensors ({type(error).__name__})") from None
    if isinstance(found, Tensor):
        found = {"latents": found}
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, but a tensor 'latents' is needed")
    return {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
