"""What tests need to make recordings of their own: a small model, and how a replay is run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from parity.recording import Recording
from parity.replays import replay_of
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.model.transformer import WanTransformer

Save = Callable[[str, dict[str, Tensor], dict[str, object]], Recording]
CONFIG = {
    "model_type": "t2v", "patch_size": [1, 2, 2], "text_len": 5, "in_dim": 3, "dim": 48,
    "ffn_dim": 40, "freq_dim": 16, "text_dim": 7, "out_dim": 3, "num_heads": 2, "num_layers": 2,
    "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip


def small_model() -> WanTransformer:
    torch.manual_seed(3)
    small = ModelConfig(
        name="small", layers=2, width=48, heads=2, ffn_width=40, freq_dim=16, text_dim=7,
        text_len=5, in_channels=3, out_channels=3,
    )  # fmt: skip
    return WanTransformer(small).eval()


def replay(rec: Recording) -> None:
    run = replay_of(rec.name)
    assert run is not None
    with torch.no_grad():
        run(rec)
