"""The comparisons of the model's benchmark compare like with like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_study.config import WindowConfig
from mla_study.errors import UserError
from mla_study.evaluation import bench_model
from mla_study.evaluation.bench_model import (
    TINY,
    against_diffusers,
    cache_bytes,
    starting,
    training_passes,
)


@pytest.mark.parametrize("window", [None, WindowConfig(1, 2, 3)])
@pytest.mark.parametrize("teacher", [False, True])
def test_segments_are_the_masks(teacher: bool, window: WindowConfig | None) -> None:
    config = replace(TINY, layers=2, width=48, heads=2)
    step, dense = training_passes(config, 12, (4, 6), window, teacher)
    mine, theirs = step(), dense()
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert torch.equal(step(), mine)  # the model is as it was


def test_diffusers_is_measured_only_where_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    small = replace(TINY, layers=1, text_dim=8)
    row = against_diffusers(small, (1, 4, 6), 2)
    assert 0.1 < row.value < 10 and row.unit == "ratio"

    real = bench_model.random_model

    def other(config: object) -> torch.nn.Module:
        model = real(config)  # type: ignore[arg-type]
        model.blocks[0].norm1.eps = 0.3
        return model

    monkeypatch.setattr(bench_model, "random_model", other)
    with pytest.raises(UserError, match="no ratio"):
        against_diffusers(small, (1, 4, 6), 2)


def test_cache_bytes_reach_their_goals() -> None:
    rows = cache_bytes()
    assert rows[0].value == 224 / 3072
    assert all(row.met for row in rows)


def test_importing_is_instant() -> None:
    rows = starting(2)
    assert rows[0].value < 1.5  # of a busy machine; the benchmark holds .3 s
