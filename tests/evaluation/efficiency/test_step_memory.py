"""Live tensors are counted as they come and go, and a step's peak agrees with what it makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model.tiny import BOTH, DENSE, LATENT

from mla_study.config import WindowConfig, wan_1_3b
from mla_study.errors import UserError
from mla_study.evaluation.efficiency import step_memory
from mla_study.evaluation.efficiency.memory import cache_bytes, text_bytes, weight_bytes
from mla_study.evaluation.efficiency.model_cost import WINDOWS
from mla_study.evaluation.efficiency.step_memory import (
    LiveBytes,
    Step,
    counted,
    counted_slope,
    in_child,
    measured,
)

SMALL = {"window": WindowConfig(1, 2, 2), "storage": "fp32", "dtype": "fp32", "size": (6, 10)}
BESIDE = WINDOWS["1 + 6 + chunk"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_count_once_while_they_live(device: str) -> None:
    given = torch.zeros(100, device=device)
    with LiveBytes() as live:
        a = given * 2
        assert live.now == 400
        b = a.view(10, 10)[2:5]
        a += 1
        given += 1
        assert live.now == live.peak == 400
        c = torch.cat([a, a])
        assert live.now == 1200
        del a
        assert live.now == 1200  # its view holds it
        del b
        assert live.now == 800
        c = c[:50] + 1
        assert (live.now, live.peak) == (200, 1200)
        del c
    assert live.now == 0


@pytest.mark.parametrize("name", BOTH)
def test_what_is_held_is_what_the_closed_form_says(name: str) -> None:
    config = BOTH[name]
    found = counted(Step(config, batch=3, **SMALL))  # type: ignore[arg-type]
    assert found.weights == weight_bytes(config, "fp32")
    assert found.cache == 3 * cache_bytes(config, 5, "fp32", (6, 10))
    assert found.text == 3 * text_bytes(config, "fp32")
    assert found.peak > 0


def test_a_step_of_wan() -> None:
    """The transient of all heads is there, and head groups or absorption take it away."""
    latent = wan_1_3b(True)
    whole, groups = (counted_slope(Step(latent, BESIDE, head_group=g)) for g in (None, 1))
    absorbed = counted_slope(Step(latent, BESIDE, "absorbed"))
    held = cache_bytes(latent, 10) + text_bytes(latent)
    hidden = 4680 * 8960 * 2
    # keys and values of 15600 tokens with queries and output, or the feed-forward's hidden tokens
    assert whole - held > 15600 * 3072 * 2
    assert hidden < groups - held < 2 * hidden
    assert absorbed == groups
    assert counted_slope(Step(latent, BESIDE, storage="int8-token", head_group=1)) < groups
    dense = counted_slope(Step(wan_1_3b(), BESIDE))
    assert dense > 6 * whole


def test_measured_here() -> None:
    step = Step(DENSE, batch=2, **SMALL)  # type: ignore[arg-type]
    found = measured(step, torch.device("cpu"))
    told = counted(step)
    assert (found.weights, found.cache, found.text) == (told.weights, told.cache, told.text)


def test_measured_in_a_process_of_its_own() -> None:
    """Wide enough for the peak to stand above pages and scratch: near what is counted."""
    config = replace(LATENT, ffn_width=4000)
    step = Step(config, batch=4, **SMALL | {"size": (24, 40)})  # type: ignore[arg-type]
    found, told = in_child(step), counted(step)
    assert found.cache == told.cache
    assert 0.7 * told.peak < found.peak < 1.6 * told.peak


def test_a_child_that_dies_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not run as absorbed"):
        in_child(Step(DENSE, form="absorbed", **SMALL))  # type: ignore[arg-type]

    class Done:
        returncode, stdout, stderr = (
            1,
            "",
            "RuntimeError: DefaultCPUAllocator: can't allocate memory",
        )

    monkeypatch.setattr(step_memory.subprocess, "run", lambda *_, **__: Done)
    with pytest.raises(MemoryError):
        in_child(Step(DENSE, **SMALL))  # type: ignore[arg-type]


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UserError, match="dtype"):
        counted(Step(DENSE, WindowConfig(), dtype="int3"))
