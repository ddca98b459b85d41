"""Small checkpoints for the probe's tests, and the command run in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints.safetensors_bytes import build

Arrays = dict[str, np.ndarray]


def write(path: Path, arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str] | None = None):
    """A safetensors file; bf16 where ``dtypes`` says so and the array is uint16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(build(arrays, dtypes))
    return path


def bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, as they are stored."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def as_bf16(arrays: Arrays) -> tuple[Arrays, dict[str, str]]:
    return {k: bf16(v) for k, v in arrays.items()}, dict.fromkeys(arrays, "BF16")


def wan(rng: np.random.Generator, layers: int = 2, d: int = 24, cross: bool = False) -> Arrays:
    """Original Wan's names: q, k, v, o and the gains of the qk-norm over all channels."""
    arrays: Arrays = {}
    for layer in range(layers):
        for kind in ("self_attn", "cross_attn")[: 1 + cross]:
            block = f"blocks.{layer}.{kind}"
            for role in "qkvo":
                scale = rng.uniform(0.5, 2)
                values = scale * rng.standard_normal((d, d))
                arrays[f"{block}.{role}.weight"] = values.astype(np.float32)
            for role in "qk":
                arrays[f"{block}.norm_{role}.weight"] = rng.uniform(0.5, 2, d).astype(np.float32)
    return arrays


def gqa(
    rng: np.random.Generator,
    layers: int = 2,
    d: int = 24,
    heads: int = 6,
    kv: int = 2,
    dim: int = 4,
) -> Arrays:
    """Llama's names: grouped queries, no norms; [K; V] is wide."""
    sizes = {"q": (heads * dim, d), "k": (kv * dim, d), "v": (kv * dim, d), "o": (d, heads * dim)}
    return {
        f"model.layers.{layer}.self_attn.{role}_proj.weight": rng.standard_normal(
            shape, dtype=np.float32
        )
        for layer in range(layers)
        for role, shape in sizes.items()
    }


def latent(
    rng: np.random.Generator, layers: int = 2, d: int = 24, r: int = 5, gain: bool = True
) -> Arrays:
    """Multi-head latent attention: down and up factors with a norm between them."""
    arrays: Arrays = {}
    for layer in range(layers):
        block = f"model.layers.{layer}.self_attn"
        arrays[f"{block}.kv_a_proj.weight"] = rng.standard_normal((r, d), dtype=np.float32)
        arrays[f"{block}.kv_b_proj.weight"] = rng.standard_normal((2 * d, r), dtype=np.float32)
        if gain:
            arrays[f"{block}.kv_a_layernorm.weight"] = rng.uniform(0.5, 2, r).astype(np.float32)
    return arrays


def config(path: Path, **entries: Any) -> Path:
    path.write_text(json.dumps(entries))
    return path


def joint(arrays: Mapping[str, np.ndarray], layer: int, roles: str = "kv") -> np.ndarray:
    """The float64 row stack of a Wan-named block."""
    blocks = [arrays[f"blocks.{layer}.self_attn.{role}.weight"] for role in roles]
    return np.concatenate(blocks).astype(np.float64)
