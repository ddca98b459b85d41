"""Short rollouts of small models whose attention is far from uniform."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mla_study.config import LatentConfig, ModelConfig, WindowConfig, mini
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.stream import Rollout, RolloutConfig, random_model

DENSE = replace(
    mini(), layers=3, width=32, heads=2, ffn_width=48, text_dim=10, latent_size=(4, 6),
    window=WindowConfig(1, 4, 2),
)  # fmt: skip
LATENT = replace(DENSE, latent=LatentConfig(6, 8, 10, 6, (1, 1, 1)))
CHUNKS = 10


def model_of(config: ModelConfig) -> WanTransformer:
    model = random_model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".self_attn." in name and weight.ndim == 2:
                weight.mul_(3)
    return model


def run(model: WanTransformer, predict: Any = None, **options: Any) -> list[Tensor]:
    rollout = Rollout(
        model,
        "a red disc",
        RolloutConfig(**options),
        prompt_at={6: "two blue squares"},
        predict=predict,
    )
    return [rollout.advance().latents for _ in range(CHUNKS)]


def same(left: list[Tensor], right: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]
