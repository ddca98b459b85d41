"""Files of latents: what they hold, and whether noising and denoising them is consistent.

Shapes: B batch, C channels, F latent frames, height x width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_study.errors import UserError, counted
from mla_study.rollout.prompts import philox
from mla_study.rollout.sampler import Lookup, add_noise, flow_target, warped_steps, x0_from_flow

WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
"""Mean of each channel of the Wan2.1 VAE's posterior, before normalisation."""
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Standard deviation of each channel, likewise."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class LatentFile:
    """Latents [B, C, F, height, width] in their stored dtype, and what was noticed of the file."""

    path: str
    name: str
    latents: Tensor
    stored_shape: tuple[int, ...]
    order: str


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel (float64), and what scale they speak for."""

    mean: np.ndarray
    std: np.ndarray
    scale: str


def read_latents(path: str | Path) -> LatentFile:
    """Read a .pt or .pth file (weights_only) or .safetensors; a batch axis may be absent.

    Raises:
        UserError: no such file or format, no 4-D or 5-D floating-point tensor in it, several of
            them, or values that are not finite.
    """
    place = Path(path)
    tensors = _tensors(place)
    found = {n: t for n, t in tensors.items() if t.ndim in (4, 5) and t.is_floating_point()}
    if len(found) > 1 and "latents" in found:
        found = {"latents": found["latents"]}
    if len(found) != 1:
        what = f"{len(found)} tensors that could be latents" if found else "no 4-D or 5-D tensor"
        raise UserError(f"{place} holds {what}: give a file with one tensor of latents")
    name, stored = next(iter(found.items()))
    if stored.numel() == 0 or not bool(torch.isfinite(stored).all()):
        raise UserError(f"{place}: tensor {name} is empty or holds NaN or infinity")
    latents = stored[None] if stored.ndim == 4 else stored
    frames_first = _frames_first(latents)
    if frames_first:
        latents = latents.transpose(1, 2)
    order = "frames, channels" if frames_first else "channels, frames"
    return LatentFile(str(place), name, latents, tuple(stored.shape), order)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"there is no file {path}: give a .pt, .pth or .safetensors file of latents"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the parsers have many exceptions of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read as latents ({reason}): make it anew") from None
    if isinstance(held, Tensor):
        return {"latents": held}
    if isinstance(held, dict):
        return {str(name): x for name, x in held.items() if isinstance(x, Tensor)}
    raise UserError(f"{path} holds a {type(held).__name__}, not a tensor of latents")


def _frames_first(latents: Tensor) -> bool:
    """Whether axis 1 is time and axis 2 the channels.

    Where only one of them has Wan's 16 it is the channels; else neighbours along time are more
    alike than neighbouring channels.
    """
    first, second = latents.shape[1] == 16, latents.shape[2] == 16
    if first != second:
        return second
    return _likeness(latents, 1) > _likeness(latents, 2)


def _likeness(latents: Tensor, axis: int) -> float:
    """Mean correlation of neighbours along an axis."""
    if latents.shape[axis] < 2:
        return 0.0
    rows = latents.detach().double().transpose(0, axis).flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return float((rows[1:] * rows[:-1]).sum(1).mean())


def channel_statistics(latents: Tensor) -> ChannelStatistics:
    """Statistics of latents [B, C, F, height, width] over all but the channels.

    With 16 channels they are compared with the Wan VAE's: ``normalised`` latents (what the
    transformer sees) have a spread near 1 in each channel, ``raw`` ones the VAE's own.
    """
    flat = latents.detach().double().transpose(0, 1).flatten(1)
    mean, std = flat.mean(1).numpy(), flat.std(1, correction=0).numpy()
    if len(std) != len(WAN_STD):
        return ChannelStatistics(mean, std, f"unknown: {len(std)} channels, but the Wan VAE has 16")
    floor = np.maximum(std, 1e-12)
    to_one = float(np.mean(np.log(floor) ** 2 + mean**2))
    raw = np.log(floor / WAN_STD) ** 2 + ((mean - WAN_MEAN) / WAN_STD) ** 2
    scale = "normalised" if to_one < float(np.mean(raw)) else "raw"
    return ChannelStatistics(mean, std, scale)


@dataclass(frozen=True)
class DenoiseStep:
    """One noise level: errors relative to the latents' RMS, and the signal-to-noise ratio in dB."""

    timestep: float
    sigma: float
    snr_db: float
    error: float
    stored_error: float


def denoise_check(
    latents: Tensor,
    steps: Sequence[float] = (1000, 750, 500, 250),
    shift: float = 5.0,
    lookup: Lookup = "exact",
    seed: int = 0,
) -> list[DenoiseStep]:
    """Noise the latents to each warped step and take x0 back by the true flow, noise - x0.

    ``error`` is that in float32, ``stored_error`` that with all of it in the latents' own dtype.
    """
    clean = latents.detach().float()
    drawn = philox("denoise-check", seed).standard_normal(tuple(clean.shape), dtype=np.float32)
    noise = torch.from_numpy(drawn)
    scale = float(clean.square().mean().sqrt())
    made: list[DenoiseStep] = []
    for t in warped_steps(steps, shift):
        errors: list[float] = []
        for dtype in (torch.float32, latents.dtype):
            x0, eps = clean.to(dtype), noise.to(dtype)
            x_t = add_noise(x0, eps, t, shift, lookup)
            back = x0_from_flow(x_t, flow_target(x0, eps), t, shift, lookup)
            errors.append(float((back - x0).float().square().mean().sqrt()) / max(scale, 1e-12))
        sigma = float(t) / 1000
        signal = (1 - sigma) * float(clean.std(correction=0))
        snr = 20 * math.log10(signal / sigma) if signal > 0 else -math.inf
        made.append(DenoiseStep(float(t), sigma, snr, errors[0], errors[1]))
    return made


def info_text(file: LatentFile) -> str:
    """What ``mla-study latents info`` prints."""
    latents = file.latents
    b, c, f, h, w = latents.shape
    found = channel_statistics(latents)
    flat = latents.double()
    wan = len(found.std) == len(WAN_STD)
    lines = [
        f"{file.path}: {file.name}, {_dtype(latents)} {list(file.stored_shape)} ({file.order})",
        f"{counted(b, 'sample')}, {counted(c, 'channel')}, "
        f"{counted(f, 'latent frame')} of {h} x {w}",
        f"mean {float(flat.mean()):.4f}, std {float(flat.std(correction=0)):.4f}, "
        f"least {float(flat.min()):.4f}, greatest {float(flat.max()):.4f}",
        "channel     mean      std" + ("   VAE mean   VAE std" if wan else ""),
    ]
    for index, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
        known = f"  {WAN_MEAN[index]:9.4f} {WAN_STD[index]:9.4f}" if wan else ""
        lines.append(f"{index:7d} {mean:8.4f} {std:8.4f}{known}")
    per_frame = flat.transpose(0, 2).flatten(1).std(1, correction=0)
    frames = ", ".join(f"{x:.3f}" for x in per_frame[:3].tolist())
    lines.append(f"std of the first frames: {frames}")
    meaning = {
        "normalised": "scale: normalised, (z - VAE mean) / VAE std, which the transformer sees",
        "raw": "scale: raw, as the VAE's encoder gives them: normalise before the transformer",
    }
    lines.append(meaning.get(found.scale, f"scale: {found.scale}"))
    return "\n".join(lines)


def denoise_text(steps: Sequence[DenoiseStep], dtype: str) -> str:
    """What ``mla-study latents denoise-check`` prints."""
    lines = [f"       t    sigma   SNR dB  error float32  error {dtype}"]
    for s in steps:
        lines.append(
            f"{s.timestep:8.2f} {s.sigma:8.4f} {s.snr_db:8.2f} {s.error:14.2e}"
            f" {s.stored_error:11.2e}"
        )
    return "\n".join(lines)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
