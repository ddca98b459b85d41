"""The closed form of memory: Fig. 7's slopes, and the bytes that our own cache allocates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from model.tiny import BOTH, CPU, LATENT
from model.tiny import make as make_model

from mla_study.config import WindowConfig, wan_1_3b, wan_14b
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.memory import (
    GB,
    activation_bytes,
    cache_bytes,
    max_batch,
    parameters,
    slope,
    text_bytes,
    transient_bytes,
    weight_bytes,
    with_latent_dim,
)
from mla_study.evaluation.efficiency.model_cost import WINDOWS
from mla_study.model.cache import RollingCache

FULL, BESIDE, WITHIN = WINDOWS.values()


@pytest.mark.parametrize("storage", ["bf16", "fp32", "int8-channel", "int8-token"])
@pytest.mark.parametrize("name", BOTH)
def test_cache_is_what_the_cache_allocates(name: str, storage: str) -> None:
    config, window, size = BOTH[name], WindowConfig(1, 2, 2), (6, 10)
    held = RollingCache(config, window, 3, 15, storage, CPU).nbytes
    assert held == 3 * cache_bytes(config, window.key_frames, storage, size)


def test_cache_of_wan() -> None:
    assert cache_bytes(wan_1_3b(), 21) / GB == pytest.approx(6.04, abs=0.005)
    assert cache_bytes(wan_1_3b(), 7) / GB == pytest.approx(2.01, abs=0.005)
    assert cache_bytes(wan_1_3b(True), 7) / GB == pytest.approx(0.147, abs=0.0005)
    assert cache_bytes(wan_1_3b(), 21) / cache_bytes(wan_1_3b(True), 21) == 3072 / 224


def test_parameters_are_those_of_the_model() -> None:
    for config in BOTH.values():
        config = replace(config, layers=3)
        assert parameters(config) == sum(p.numel() for p in make_model(config, 0).parameters())
    assert parameters(wan_1_3b()) == 1_418_996_800
    assert weight_bytes(wan_14b(), "bf16") == 2 * parameters(wan_14b())
    with pytest.raises(UserError, match="dtype"):
        weight_bytes(wan_1_3b(), "int3")


def test_fig7_slopes(repo_root: Path) -> None:
    """Within 5 % with what reconstruction makes, beyond it with all channels (most rows)."""
    paper = pd.read_csv(repo_root / "results" / "paper" / "fig7_batch_scaling_b200.csv")
    misses = 0
    for row in paper.itertuples():
        dense = row.layout == "dense"
        config = wan_1_3b() if dense else with_latent_dim(wan_1_3b(True), int(row.d_c))
        quoted = row.memory_slope_gb_per_request
        assert slope(config, FULL).total / GB == pytest.approx(quoted, rel=0.05)
        misses += slope(config, FULL, channels="all").total / GB > 1.05 * quoted
    assert misses == 4
    # the one fitted number
    assert activation_bytes(wan_1_3b(), 3) / GB == pytest.approx(6.26 - 6.04, abs=0.002)
    assert text_bytes(wan_1_3b()) / GB == pytest.approx(0.094, abs=0.001)


def test_transient_by_channels_and_head_groups() -> None:
    config = wan_1_3b(True)
    made, whole = (transient_bytes(config, BESIDE, channels=c) for c in ("made", "all"))
    assert made == 15600 * 2688 * 2 and whole == 15600 * 3072 * 2
    assert transient_bytes(config, BESIDE, head_group=1) == made / 12
    assert transient_bytes(config, BESIDE, head_group=99) == made
    assert transient_bytes(config, BESIDE, "absorbed") == 4680 * 12 * 224 * 2
    assert transient_bytes(wan_1_3b(), BESIDE) == 0
    with pytest.raises(UserError, match="group"):
        transient_bytes(config, BESIDE, head_group=0)


def test_goals_at_the_rollout_window() -> None:
    latent = wan_1_3b(True)
    assert slope(latent, WITHIN).total <= 0.45 * GB
    assert slope(latent, BESIDE, head_group=1).total <= 0.45 * GB
    assert slope(latent, WITHIN, storage="int8-token", head_group=1).total <= 0.30 * GB


def test_largest_batch() -> None:
    def fits(layout: bool, window: WindowConfig, gigabytes: float = 80) -> int:
        config = wan_1_3b(layout)
        return max_batch(config, slope(config, window), gigabytes * GB)

    assert fits(False, FULL) == 12
    assert fits(False, WITHIN) == 34
    assert fits(True, WITHIN) >= 4 * fits(False, WITHIN)
    assert fits(True, BESIDE) >= 4 * fits(False, BESIDE)
    assert fits(False, FULL, 3) == 0


def test_another_latent_dimension() -> None:
    assert with_latent_dim(LATENT, 7).latent.d_c == 7  # type: ignore[union-attr]
    with pytest.raises(UserError, match="dense"):
        with_latent_dim(wan_1_3b(), 64)
    with pytest.raises(UserError, match="exceeds"):
        with_latent_dim(wan_1_3b(True), 4096)
