"""Runs of seconds: a tiny model of a tiny world, trained in this process or in ranks of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from mla_study.config import FlowConfig, LatentConfig, ModelConfig, WindowConfig, mini
from mla_study.training.batch import Batch
from mla_study.training.loop import Run, Trainer
from mla_study.training.ranks import ranks
from mla_study.training.recipe import Optimiser, Stage
from mla_study.training.start import fresh_model

DENSE = replace(
    mini(), layers=2, width=24, heads=2, ffn_width=20, freq_dim=12, text_dim=7, text_len=5,
    in_channels=3, out_channels=3, latent_size=(4, 4), window=WindowConfig(1, 2, 2),
    flow=FlowConfig(3.0, denoise_steps=(1000, 600, 300)),
)  # fmt: skip
LATENT = replace(DENSE, latent=LatentConfig(d_c=5, d_q=7, d_nope=6, d_rope=6, rope_pairs=(1, 1, 1)))
OBJECTIVES = ("flow", "teacher_forcing", "consistency", "distribution_matching")
FRAMES = 6


class Clips:
    """Gaussian clips; a sample follows from its number."""

    null = torch.zeros(1, 5, 7)

    def batch(self, samples: Sequence[int]) -> Batch:
        def drawn(n: int, *shape: int) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(n))

        context = torch.stack([drawn(n, 5, 7) for n in samples])
        latents = torch.stack([drawn(n + 7, 3, FRAMES, 4, 4) for n in samples])
        return Batch(context, latents, tuple(map(str, samples)))

    def facts(self) -> dict[str, Any]:
        return {"kind": "gaussian"}


def stage(objective: str, **changes: Any) -> Stage:
    rates = Optimiser(2e-5, 2e-4 if objective == "flow" else 0.0, (0.5, 0.9), 0.01, 2, 0.5)
    options: dict[str, Any] = {
        "flow": {"independent": 0.5, "drop": 0.3},
        "teacher_forcing": {"drop": 0.3},
        "consistency": {"intervals": 5, "guidance": 2.0},
        "distribution_matching": {"critic_updates": 2, "guidance": 1.0},
    }
    made = Stage(
        objective, 3, 4, rates, FRAMES, options.get(objective, {}), ema=0.8, save_every=1, seed=5
    )
    return replace(made, **changes)


def run_of(objective: str, out: Path, config: ModelConfig = LATENT, **changes: Any) -> Run:
    chosen = DENSE if objective == "flow" else config
    start = fresh_model(chosen, 1)
    return Run(stage(objective, **changes), out, start, Clips(), fresh_model(DENSE, 2))


def trained(run: Run) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """The log and the weights of a run, alone or as one of torchrun's ranks."""
    with ranks("cpu", run.stage.precision) as here:
        path = Trainer(run, here, progress=False).train()
        here.wait()
    return pd.read_parquet(run.out / "log.parquet"), load_file(path)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


if __name__ == "__main__":
    trained(run_of(sys.argv[1], Path(sys.argv[2]), **json.loads(sys.argv[3])))
