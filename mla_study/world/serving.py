"""What a video of the world needs beside a model: its codec, pixels to see, clips of a teacher.

Shapes: B batch, C channels, f frames, h x w latent, P prompts, T words, E text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.model.codecs import to_uint8
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.prompts import conditioning_for
from mla_study.rollout.sampler import guided, solve
from mla_study.world.codec import PATCH, Codec, load_codec
from mla_study.world.grammar import sample_captions
from mla_study.world.shipped import world_codec

VISIBLE = 240
"""Pixels of the shorter side, at least, where nothing else is asked for."""
CODEC_FILE = "codec.safetensors"
TEACHER_STEPS = 32
TEACHER_GUIDANCE = 2.0
"""Weight of uncond + w (cond - uncond)."""


def visible_scale(size: tuple[int, int]) -> int:
    """Pixels that a pixel is shown as, so that a latent (height, width) is large enough to see."""
    return -(-VISIBLE // (PATCH * min(size)))


class WorldDecoder:
    """The world's linear codec, each pixel shown as a square of ``scale`` pixels."""

    context_frames = 0

    def __init__(self, codec: Codec, scale: int) -> None:
        self.codec = codec
        self.scale = scale

    def decode(self, latents: Float[Tensor, "B C f h w"]) -> UInt8[np.ndarray, "B f H W 3"]:
        """RGB with H = 4 h scale and W = 4 w scale."""
        pixels = to_uint8(self.codec.decode(latents.detach().float().cpu()).clamp(-1, 1))
        big = pixels.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        return big.contiguous().numpy()

    def warm_up(self, latents: Float[Tensor, "B C f h w"]) -> None:
        """Frames do not depend on each other."""
        del latents


def codec_for(config: ModelConfig, checkpoint: str | None) -> Codec:
    """The codec of a model's latents: ``codec.safetensors`` beside its weights, or the package's.

    Raises:
        UserError: neither is there, or the one beside the weights is of other latents.
    """
    if checkpoint is not None:
        path = Path(checkpoint)
        path = (path if path.is_dir() else path.parent) / CODEC_FILE
        if path.exists():
            codec = load_codec(path)
            if (len(codec.basis), codec.patch) != (config.in_channels, config.codec_stride[2]):
                raise UserError(
                    f"{path} gives {len(codec.basis)} channels for patches of {codec.patch} "
                    f"pixels, but the model beside it has {config.in_channels} for "
                    f"{config.codec_stride[2]}: put the codec there that it was trained with"
                )
            return codec
    return world_codec(config.latent_size[0])


def default_prompts(seed: int, prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts, or where there is none a caption that the seed draws."""
    return tuple(prompts) or (str(sample_captions(1, seed)[0]),)


@torch.no_grad()
def sample_clips(
    model: WanTransformer,
    context: Float[Tensor, "P T E"],
    noise: Float[Tensor, "B C f h w"],
    steps: int = TEACHER_STEPS,
    guidance: float = TEACHER_GUIDANCE,
) -> Float[Tensor, "B C f h w"]:
    """Latents of clips by a bidirectional model, all frames at once: Euler steps of guided flow.

    Args:
        context: embeddings of one caption (P = 1), or of one a sample (P = B).
        guidance: w of uncond + w (cond - uncond); the untold prompt is zeros.

    Raises:
        UserError: as many prompts as neither one nor the batch, or diffusers not installed.
    """
    weight = model.patch_embedding.weight
    told = conditioning_for(model, context, len(noise))
    untold = conditioning_for(model, torch.zeros_like(context[:1]), len(noise))
    velocity = guided(lambda x, t: model(x, t, told), lambda x, t: model(x, t, untold), guidance)
    start = noise.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return solve("euler", start, velocity, steps, model.config.flow.shift)[-1]
