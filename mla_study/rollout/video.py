"""Latents to frames, and frames to files: what a rollout writes.

Shapes: B batch, C channels, f latent frames, n video frames, h x w latent, H x W pixels.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.rollout.sinks import (
    AnimationSink,
    FrameSink,
    LatentSink,
    Mark,
    Mp4Sink,
    Sink,
    kind_of,
)

PREVIEW_GAIN = 0.2
_PREVIEW_SIDE = 96


@runtime_checkable
class Decoder(Protocol):
    """Latents [B, C, f, h, w] to video frames, chunk after chunk."""

    context_frames: int
    """Latent frames before a chunk that :meth:`warm_up` needs to go on in the midst of a video."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 RGB [B, n, H, W, 3]."""
        ...

    def warm_up(self, latents: Tensor) -> None:
        """Take the frames before, without giving their pixels."""
        ...


class PreviewDecoder:
    """No decoder at all: the first three channels as red, green and blue, one frame a latent frame.

    A channel's value x shows as 255 (0.5 + 0.2 x), so that two and a half standard deviations of
    normalised latents fill the range; each latent position becomes a square of pixels.
    """

    context_frames = 0

    def __init__(self, config: ModelConfig, size: tuple[int, int]) -> None:
        self.scale = max(*config.codec_stride[1:], -(-_PREVIEW_SIDE // min(size)))
        self.note = (
            "no VAE is at hand: the video is a preview that shows the first three latent channels "
            "as red, green and blue"
        )

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 RGB [B, f, h * scale, w * scale, 3]."""
        rgb = latents.detach().float().cpu()[:, :3]
        if rgb.shape[1] < 3:
            rgb = rgb[:, :1].expand(-1, 3, -1, -1, -1)
        levels = ((0.5 + PREVIEW_GAIN * rgb) * 255).round().clamp(0, 255).to(torch.uint8)
        big = levels.repeat_interleave(self.scale, 3).repeat_interleave(self.scale, 4)
        return big.permute(0, 2, 3, 4, 1).contiguous().numpy()

    def warm_up(self, latents: Tensor) -> None:
        """Frames do not depend on each other."""
        del latents


class VaeDecoder:
    """Wan's VAE, decoding as a stream."""

    def __init__(self, vae: Any) -> None:
        from mla_study.model.codecs import StreamingDecoder

        self._decoder = StreamingDecoder(vae)
        self.context_frames: int = self._decoder.context_frames

    def anew(self) -> VaeDecoder:
        """A decoder of the same weights that has seen no frame."""
        return VaeDecoder(self._decoder.vae)

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 RGB [B, n, H, W, 3]: 1 frame for the first latent frame, 4 for each other."""
        from mla_study.model.codecs import to_uint8

        return to_uint8(self._decoder.decode(latents)).cpu().numpy()

    def warm_up(self, latents: Tensor) -> None:
        """Go on after ``latents``."""
        self._decoder.warm_up(latents)


class VideoWriter:
    """Writes the chunks of a rollout: a file a sample, or one file of latents for all of them.

    Args:
        path: see :mod:`~mla_study.rollout.sinks`; with several samples name-0.mp4, name-1.mp4 ...
        decoder: latents to frames (not asked where latents are written).
        fps: frames a second of the decoder's output.
        batch: samples.
        facts: metadata of a file of latents.
        marks: where to go on; None starts anew.
    """

    def __init__(
        self,
        path: Path,
        decoder: Decoder,
        fps: Fraction,
        batch: int,
        facts: dict[str, str] | None = None,
        marks: list[Mark] | None = None,
    ) -> None:
        self.decoder = decoder
        self._latents: LatentSink | None = None
        self._sinks: list[Sink] = []
        kind = kind_of(path)
        if kind == "latents":
            self._latents = LatentSink(path, facts or {}, marks[0] if marks else None)
            return
        for index, place in enumerate(sample_paths(path, batch)):
            mark = marks[index] if marks else None
            if kind == "mp4":
                self._sinks.append(Mp4Sink(place, fps, mark))
            elif kind == "frames":
                self._sinks.append(FrameSink(place, mark))
            else:
                self._sinks.append(AnimationSink(place, fps, mark))

    def write(self, latents: Tensor) -> int:
        """Append a chunk's latents [B, C, f, h, w]; gives the number of frames that it made."""
        if self._latents is not None:
            self._latents.write(latents)
            return latents.shape[2]
        frames = self.decoder.decode(latents)
        for sink, sample in zip(self._sinks, frames, strict=True):
            sink.write(sample)
        return frames.shape[1]

    @property
    def marks(self) -> list[Mark]:
        """How far each file has come."""
        if self._latents is not None:
            return [self._latents.mark]
        return [sink.mark for sink in self._sinks]

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self._latents.path] if self._latents else [sink.path for sink in self._sinks]

    def close(self, finished: bool) -> None:
        """Make all files final."""
        for sink in [self._latents] if self._latents else self._sinks:
            sink.close(finished)


def sample_paths(path: Path, batch: int) -> list[Path]:
    """One path a sample: the path itself for one, name-0, name-1 ... for several."""
    if batch == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(batch)]
