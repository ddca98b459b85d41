"""Tiny Wan checkpoints of random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mla_study.checkpoints.wan.layouts import original_json
from mla_study.checkpoints.wan.load import expected_shapes
from mla_study.config import LatentConfig, ModelConfig, WindowConfig

TINY = ModelConfig(
    name="wan", layers=2, width=20, heads=2, ffn_width=28, freq_dim=8, text_dim=12
)  # fmt: skip
TINY_LATENT = ModelConfig(
    name="tiny-latent",
    layers=2,
    width=20,
    heads=2,
    ffn_width=28,
    freq_dim=8,
    text_dim=12,
    text_len=5,
    latent=LatentConfig(d_c=7, d_q=9, d_nope=4, d_rope=6, rope_pairs=(1, 1, 1)),
    window=WindowConfig(2, 3, 1),
)


def random_state(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in expected_shapes(config).items()
    }


def write_original(folder: Path, config: ModelConfig, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(original_json(config, window=False))
    return folder


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )
