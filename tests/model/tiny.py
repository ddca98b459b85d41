"""Small models of odd sizes, and a rollout that makes one pass a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mla_study.config import LatentConfig, ModelConfig, WindowConfig
from mla_study.kernels.masks import Positions
from mla_study.model.cache import RollingCache
from mla_study.model.storage import Storage
from mla_study.model.transformer import Conditioning, WanTransformer

CPU = torch.device("cpu")
DENSE = ModelConfig(
    name="tiny", layers=2, width=36, heads=2, ffn_width=20, freq_dim=12, text_dim=7, text_len=5,
    in_channels=3, out_channels=3,
)  # fmt: skip
# heads of 18 channels have (3, 3, 3) pairs, of which an uneven choice is kept
LATENT = replace(
    DENSE, latent=LatentConfig(d_c=11, d_q=13, d_nope=8, d_rope=10, rope_pairs=(2, 1, 2))
)
BOTH = {"dense": DENSE, "latent": LATENT}


def make(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> WanTransformer:
    torch.manual_seed(seed)
    model = WanTransformer(config).to(dtype).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value.add_(0.2 * torch.randn_like(value))
            elif value.ndim == 2 and ".self_attn." in name:
                value.mul_(2)  # attention that is far from uniform
    return model


def rolled(
    model: WanTransformer,
    x: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    window: WindowConfig,
    positions: Positions = "absolute",
    storage: Storage = "fp32",
    first: int = 0,
    cache: RollingCache | None = None,
) -> Tensor:
    """One pass a chunk through a cache; x [B, C, F, height, width], t [B, F]."""
    height, width = x.shape[3] // 2, x.shape[4] // 2
    if cache is None:
        cache = RollingCache(model.config, window, x.shape[0], height * width, storage)
    outs: list[Tensor] = []
    for start in range(0, x.shape[2], window.chunk):
        inside = slice(start, min(start + window.chunk, x.shape[2]))
        ids = range(first + inside.start, first + inside.stop)
        outs.append(step(model, x[:, :, inside], t[:, inside], conditioning, cache, ids, positions))
    return torch.cat(outs, dim=2)


def step(
    model: WanTransformer, x: Tensor, t: Tensor, conditioning: Conditioning, cache: RollingCache,
    ids: Sequence[int], positions: Positions = "absolute",
) -> Tensor:  # fmt: skip
    """One pass over frames ``ids``."""
    held = cache.begin(ids)
    pieces = model.step_pieces(ids, held, positions, x.shape[3] // 2, x.shape[4] // 2, CPU)
    return model(x, t, conditioning, pieces=pieces, memory=cache.layers())


def error(mine: Tensor, theirs: Tensor) -> float:
    """Norm-relative."""
    return ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item()
