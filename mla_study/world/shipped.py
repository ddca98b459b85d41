"""The trained miniature that the package carries, and which models belong to the world.

``teacher`` is bidirectional; ``dense`` and ``latent`` are few-step chunk-causal students, float16;
``codec`` is the linear codec of their latents.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.model.transformer import WanTransformer
from mla_study.world.codec import PATCH, Codec, fit_codec, load_codec
from mla_study.world.grammar import TOKENS
from mla_study.world.scenes import World

FOLDER = Path(__file__).parents[1] / "data" / "miniature"
MODELS = ("teacher", "dense", "latent")
MAKE = "mla-study study mini --train-teacher --ship"


def shipped(name: str) -> Path:
    """The file of ``teacher``, ``dense``, ``latent`` or ``codec``.

    Raises:
        UserError: there is none of that name, or it is not there.
    """
    if name not in (*MODELS, "codec"):
        raise UserError(f"the package carries {', '.join(MODELS)} and codec, but no '{name}'")
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        raise UserError(f"the package lacks {path.name} of the miniature: make it by {MAKE}")
    return path


def load_shipped(name: str) -> WanTransformer:
    """A shipped model in float32 and eval mode."""
    from mla_study.checkpoints.wan.load import load_model

    return load_model(shipped(name), dtype=torch.float32)


def world_codec(side: int) -> Codec:
    """The codec of latents of ``side`` x ``side``: the shipped one, or one of a larger world.

    Raises:
        UserError: the shipped one is not there.
    """
    codec = load_codec(shipped("codec"))
    size = PATCH * side
    # the same motion, in pixels of the larger picture
    return codec if codec.world.size == size else fit_codec(World(size, step=size / 24))


def is_world(config: ModelConfig) -> bool:
    """Whether a model speaks of the world: its words, and latents of its codec."""
    square = config.latent_size[0] == config.latent_size[1]
    codec = config.codec_stride == (1, PATCH, PATCH)
    return config.learned_positions and square and codec and config.text_len == TOKENS
