"""Weights to begin from: a model that has seen nothing."""

from __future__ import annotations

import torch
from torch import nn

from mla_study.config import ModelConfig
from mla_study.model.transformer import WanTransformer

POSITIONS = 0.5
"""Standard deviation of learned positions: near that of the tokens that they are added to. At .02
the miniature's sprites stood in the right column in half of the videos after 2400 steps, at .5 in
nineteen of twenty after 650."""


def fresh_model(config: ModelConfig, seed: int = 0) -> WanTransformer:
    """A model of random weights to be trained, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer(config)
        if config.learned_positions:
            nn.init.normal_(model.position_embedding.space, std=POSITIONS)
            nn.init.normal_(model.position_embedding.first, std=POSITIONS)
    return model
