from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from probe_files import latent, wan, write

from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import Attention, find_operators
from mla_study.errors import UserError
from mla_study.probes.activations import save_covariance
from mla_study.probes.covariance import covariance_key, covariances_of


@pytest.fixture
def blocks(tmp_path: Path, seed: int) -> list[Attention]:
    arrays = wan(np.random.default_rng(seed), layers=12, d=6, cross=True)
    checkpoint = open_checkpoint(str(write(tmp_path / "w.safetensors", arrays)))
    return find_operators(checkpoint).attentions


@pytest.mark.parametrize(
    "pattern",
    [
        "blocks.{}.self_attn.k",
        "blocks.{}.self_attn",
        "model.blocks.{}.self_attn.k",
        "blocks.{}.self_attn.v",
        "transformer.blocks.{}.self_attn.q",
        "{}",
        "layers.{}",
        "block_{}",
        "encoder.layer.{}.attention.self.key",
        "h.{}.attn.c_attn",
    ],
)
def test_names_that_mean_a_layer(pattern: str, blocks: list[Attention]) -> None:
    keys = [pattern.format(n) for n in range(12)]
    for attention in blocks:
        if attention.kind == "self":
            assert covariance_key(keys, attention) == keys[attention.layer]


def test_an_exact_name_goes_before_an_ending(blocks: list[Attention]) -> None:
    keys = ["ema.blocks.1.self_attn.k", "blocks.1.self_attn.k", "1"]
    assert covariance_key(keys, blocks[2]) == "blocks.1.self_attn.k"
    assert covariance_key(["a.blocks.1.self_attn.k", "b.blocks.1.self_attn.k"], blocks[2]) is None


def test_cross_attention_has_inputs_of_its_own(blocks: list[Attention]) -> None:
    keys = [f"blocks.{n}.self_attn.k" for n in range(12)]
    cross = next(a for a in blocks if a.kind == "cross" and a.layer == 3)
    assert covariance_key(keys, cross) is None
    assert covariance_key(["3", "layers.3"], cross) is None
    assert covariance_key([*keys, "blocks.3.cross_attn.q"], cross) is None
    assert covariance_key([*keys, "blocks.3.cross_attn.v"], cross) == "blocks.3.cross_attn.v"
    assert covariance_key([*keys, "h.3.attn2.to_k"], cross) == "h.3.attn2.to_k"


def test_latent_blocks_ask_for_the_inputs_of_the_down_projection(tmp_path: Path, seed: int) -> None:
    arrays = latent(np.random.default_rng(seed), layers=1)
    checkpoint = open_checkpoint(str(write(tmp_path / "w.safetensors", arrays)))
    [attention] = find_operators(checkpoint).attentions
    up, down = "layers.0.self_attn.kv_b_proj", "layers.0.self_attn.kv_a_proj"
    assert covariance_key([up, down], attention) == down


def test_a_file_of_covariances(tmp_path: Path, blocks: list[Attention]) -> None:
    path = tmp_path / "c.safetensors"
    held = {f"blocks.{n}.self_attn.k": np.eye(6) for n in range(12)}
    save_covariance(path, held)
    chosen = covariances_of(str(path), blocks)
    assert chosen[7, "self"] == (str(path), "blocks.7.self_attn.k")
    assert set(chosen) == {(n, "self") for n in range(12)}
    held["blocks.5.self_attn.k"] = np.eye(7)
    save_covariance(path, held)
    with pytest.raises(UserError, match=r"blocks\.5.*\[7, 7\].*6 inputs"):
        covariances_of(str(path), blocks)
    del held["blocks.5.self_attn.k"]
    save_covariance(path, held)
    with pytest.raises(UserError, match=r"no covariance for block 'blocks\.5\.self_attn'"):
        covariances_of(str(path), blocks)
    with pytest.raises(UserError, match="does not exist"):
        covariances_of(str(tmp_path / "absent"), blocks)
