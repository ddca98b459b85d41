"""What each layout calls a parameter, and the ``config.json`` that it has beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from mla_study.checkpoints.wan.config import SCHEMA, UPSTREAM_TEXT_LEN
from mla_study.checkpoints.wan.names import to_diffusers
from mla_study.config import ModelConfig, to_dict
from mla_study.errors import UserError

Layout = Literal["original", "diffusers", "self-forcing", "latent"]
ROPE_BASE = 10000.0


def renamed(name: str, layout: Layout) -> str:
    """A parameter's name in a layout, from its original name; UserError where it has none."""
    if layout == "self-forcing":
        return f"model.{name}"
    if layout != "diffusers":
        return name
    theirs = to_diffusers(name)
    if theirs is None:
        raise UserError(f"diffusers has no name for {name}: save it with layout 'latent'")
    return theirs


def original_json(config: ModelConfig, *, causal: bool = False, window: bool = True) -> str:
    """``config.json`` of the original layout; ``causal`` as Self-Forcing's class reads it.

    Like upstream's it leaves out text_dim and patch_size.

    Raises:
        UserError: upstream's code would compute something else from these weights.
    """
    _upstream(config)
    data: dict[str, Any] = {
        "_class_name": "CausalWanModel" if causal else "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.width,
        "eps": config.eps,
        "ffn_dim": config.ffn_width,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": config.model_type,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }
    if window:
        size = config.window.key_frames
        data["local_attn_size"] = size
        data["sink_size"] = config.window.sink
        data["num_frame_per_block"] = config.window.chunk
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def diffusers_json(config: ModelConfig, image_dim: int = 1280) -> str:
    """``config.json`` of diffusers' ``WanTransformer3DModel``. Raises as :func:`original_json`."""
    _upstream(config)
    image = config.model_type == "i2v"
    data: dict[str, Any] = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.33.0",
        "added_kv_proj_dim": config.width if image else None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_width,
        "freq_dim": config.freq_dim,
        "image_dim": image_dim if image else None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
    if config.text_len != UPSTREAM_TEXT_LEN:
        data["text_len"] = config.text_len  # ignored by diffusers, with a warning
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def own_json(config: ModelConfig, metadata: Mapping[str, Any], *, window: bool = True) -> str:
    """Our own ``config.json``: :class:`ModelConfig` with ``metadata`` beside its keys."""
    data = {**to_dict(config), "metadata": {**metadata, "schema": SCHEMA}}
    if not window:
        del data["window"]
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def _upstream(config: ModelConfig) -> None:
    if config.latent is not None:
        raise UserError(
            f"'{config.name}' has latent self-attention, which only our own layout can hold: "
            "save it with layout 'latent'"
        )
    if config.rope_base != ROPE_BASE or config.learned_positions:
        own = "learned positions" if config.learned_positions else f"base {config.rope_base:g}"
        raise UserError(
            f"'{config.name}' has {own}, but the other layouts mean rotary embeddings of base "
            f"{ROPE_BASE:g} alone: save it with layout 'latent'"
        )
