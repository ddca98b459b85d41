"""What a rollout of the world needs beside a model: its text encoder, its codec, pixels to see.

Shapes: B batch, C channels, f frames, h x w latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mla_study.model.codecs import to_uint8
from mla_study.world.codec import Codec
from mla_study.world.grammar import sample_captions

VISIBLE = 240
"""Pixels of the shorter side, at least, where nothing else is asked for."""


class WorldDecoder:
    """The world's linear codec, each pixel shown as a square of ``scale`` pixels."""

    context_frames = 0
    note = ""

    def __init__(self, codec: Codec, scale: int | None = None) -> None:
        self.codec = codec
        self.scale = scale or -(-VISIBLE // codec.world.size)

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 RGB [B, f, H, W, 3]."""
        pixels = to_uint8(self.codec.decode(latents.detach().float().cpu()).clamp(-1, 1))
        big = pixels.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        return big.contiguous().numpy()

    def warm_up(self, latents: Tensor) -> None:
        """Frames do not depend on each other."""
        del latents


def default_prompts(seed: int, prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts, or where there is none a caption that the seed draws."""
    return tuple(prompts) or (str(sample_captions(1, seed)[0]),)
