"""Errors of cache storages: what is reported is what a cache does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model.tiny import BOTH, error, make
from safetensors.torch import save_file

from mla_study.commands.cache_error import CacheError
from mla_study.config import WindowConfig
from mla_study.errors import UserError
from mla_study.model.reports import STORAGES, entry_names, storage_errors, storage_table
from mla_study.model.storage import stored


@pytest.mark.parametrize("kind", BOTH)
def test_errors_of_one_layer_by_hand(kind: str, seed: int) -> None:
    config = replace(BOTH[kind], layers=1)
    model = make(config, seed)
    x, text = torch.randn(2, 3, 4, 6, 6), torch.randn(2, 3, 7)
    # one chunk: attention over everything, whatever the positions
    found = {
        e.storage: e for e in storage_errors(model, x, torch.zeros(2), text, WindowConfig(0, 0, 4))
    }
    assert list(found) == list(STORAGES)
    caught: list[torch.Tensor] = []
    attention = model.blocks[0].self_attn
    handle = attention.register_forward_pre_hook(lambda m, given: caught.append(given[0]))
    with torch.no_grad():
        model(x, torch.zeros(2), model.condition(text))
        handle.remove()
        entry = attention.entry(caught[0])
    for storage in STORAGES:
        for part, values in zip(("first", "second"), entry, strict=True):
            kept = stored(values.unflatten(1, (4, -1)), storage).flatten(1, 2)
            half = stored(values, "bf16")
            assert found[storage].exact[part] == pytest.approx(error(kept, values), rel=1e-6)
            assert found[storage].bf16[part] == pytest.approx(error(kept, half), rel=1e-6)
            assert found[storage].worst[part] == pytest.approx(found[storage].exact[part])
    assert found["fp32"].exact == found["fp64"].exact == dict.fromkeys(found["fp32"].exact, 0.0)
    assert found["bf16"].bf16["output"] == 0
    for name in ("bf16", "int8-token", "int8-channel"):
        assert 1e-4 < found[name].exact["output"] < 0.05
    assert found["fp16"].exact["output"] < found["bf16"].exact["output"]
    assert not attention._forward_pre_hooks
    table = storage_table(config, list(found.values()))
    assert all(name in table for name in (*STORAGES, *entry_names(config)))


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    latents = tmp_path / "clip.safetensors"
    save_file({"latents": torch.randn(1, 16, 7, 6, 6)}, latents)
    assert CacheError(random_weights=True, latents=latents, json=True).run() == 0
    captured = capsys.readouterr()
    assert "cut to 6" in captured.err
    rows = json.loads(captured.out)
    assert [row["storage"] for row in rows] == list(STORAGES)
    assert CacheError(random_weights=True, frames=3, size="4x6", variant="dense").run() == 0
    assert "Gaussian noise, 3 frames" in capsys.readouterr().out
    for wrong in (
        CacheError(random_weights=True, frames=2),
        CacheError(random_weights=True, timestep=1001),
        CacheError(),
    ):
        with pytest.raises(UserError):
            wrong.run()


def test_latents_of_another_model_are_refused(tmp_path: Path) -> None:
    latents = tmp_path / "clip.safetensors"
    save_file({"latents": torch.randn(1, 5, 3, 6, 6)}, latents)
    with pytest.raises(UserError, match="16"):
        CacheError(random_weights=True, latents=latents).run()
