"""Layer numbers, and what is missing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.making import find, save
from mla_study.checkpoints.operators.blocks import Found
from mla_study.checkpoints.operators.layers import natural
from mla_study.errors import UserError

_ONE = np.ones((2, 2), np.float32)


def made(*blocks: str, roles: str = "kv") -> dict[str, np.ndarray]:
    return {f"{block}.{role}.weight": _ONE for block in blocks for role in roles}


def layers(found: Found, kind: str = "self") -> dict[str, int]:
    return {a.block: a.layer for a in found.attentions if a.kind == kind}


def test_own_numbers(tmp_path: Path) -> None:
    _, found = find(tmp_path, made("blocks.10.attn", "blocks.9.attn", "blocks.2.attn"))
    assert layers(found) == {"blocks.2.attn": 2, "blocks.9.attn": 9, "blocks.10.attn": 10}
    assert [a.layer for a in found.attentions] == [2, 9, 10]
    _, found = find(tmp_path, made("attn"))
    assert layers(found) == {"attn": 0}


def test_ordinals_where_no_number_is_unique(tmp_path: Path) -> None:
    blocks = [f"layers.{i}.blocks.{j}.attn" for i in range(2) for j in (0, 2, 10)]
    _, found = find(tmp_path, made(*reversed(blocks)))
    assert layers(found) == {block: i for i, block in enumerate(blocks)}
    # two attentions in each layer
    blocks = [f"layers.{i}.self_attn.{j}" for i in range(3) for j in range(2)]
    _, found = find(tmp_path, made(*blocks), {"num_layers": 3})
    assert layers(found) == {block: i for i, block in enumerate(blocks)}
    assert found.missing_layers == []


def test_one_list_of_layers_with_two_names(tmp_path: Path) -> None:
    """A hybrid: the numbers stay unique."""
    blocks = ["layers.0.delta", "layers.1.delta", "layers.2.attn", "layers.3.delta"]
    _, found = find(tmp_path, made(*blocks), layers=5)
    assert [a.layer for a in found.attentions] == [0, 1, 2, 3]
    assert found.missing_layers == [4]


def test_encoder_comes_before_decoder(tmp_path: Path) -> None:
    encoder = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(3)]
    decoder = [f"decoder.block.{i}.layer.0.SelfAttention" for i in range(4)]
    cross = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(4)]
    config = {"num_layers": 3, "num_decoder_layers": 4, "is_encoder_decoder": True}
    _, found = find(tmp_path, made(*encoder, *decoder, *cross), config)
    assert layers(found) == {b: i for i, b in enumerate([*encoder, *decoder])}
    assert layers(found, "cross") == {b: i for i, b in enumerate(cross)}
    assert found.missing_layers == []
    gone = made(encoder[0], encoder[2], *decoder[:3], *cross[:3])
    _, found = find(tmp_path, gone, config)
    assert found.missing_layers == [decoder[3], cross[3], encoder[1]]
    assert layers(found)[decoder[0]] == 3
    # the encoder alone, as a text encoder is shipped
    _, found = find(tmp_path, made(*encoder), config)
    assert found.missing_layers == []


def test_bart_and_whisper(tmp_path: Path) -> None:
    config = {"encoder_layers": 2, "decoder_layers": 3, "is_encoder_decoder": True}
    blocks = [f"encoder.layers.{i}.self_attn" for i in range(2)]
    blocks += [f"decoder.layers.{i}.self_attn" for i in range(3)]
    cross = [f"decoder.layers.{i}.encoder_attn" for i in range(3)]
    _, found = find(tmp_path, made(*blocks, *cross), config)
    assert found.missing_layers == []
    assert list(layers(found)) == blocks
    assert list(layers(found, "cross").values()) == [0, 1, 2]
    _, found = find(tmp_path, made(*blocks[:-1], *cross), config)
    assert found.missing_layers == [blocks[-1]]


def test_given_number_of_layers(tmp_path: Path) -> None:
    """``--layers`` may mean all blocks, or those of each stack."""
    blocks = [f"{s}.layers.{i}.self_attn" for s in ("encoder", "decoder") for i in range(4)]
    for given in (4, 8):
        _, found = find(tmp_path, made(*blocks), layers=given)
        assert found.missing_layers == []
        assert found.expected_layers == given
    del blocks[2]
    _, found = find(tmp_path, made(*blocks), layers=4)
    assert found.missing_layers == ["encoder.layers.2.self_attn"]
    swin = [f"layers.{i}.blocks.{j}.attn" for i in range(2) for j in range(2)]
    _, found = find(tmp_path, made(*swin), layers=5)
    assert found.missing_layers == ["1 of 5 (the names carry no single number)"]
    _, found = find(tmp_path, made(*swin), layers=4)
    assert found.missing_layers == []


@pytest.mark.parametrize(
    "others",
    [
        [f"vace_blocks.{i}.self_attn" for i in range(2)],
        ["audio_injector.layers.0.attn"],
        ["a_head.attention"],
        [f"visual.blocks.{i}.attn" for i in range(9)],
        [f"context_refiner.{i}.attn" for i in range(2)],
    ],
)
def test_the_main_stack_keeps_its_numbers(others: list[str], tmp_path: Path) -> None:
    main = [f"blocks.{i}.self_attn" for i in range(5)]
    _, found = find(tmp_path, made(*main, *others), {"num_layers": 5})
    have = layers(found) | layers(found, "cross")
    assert [have[b] for b in main] == list(range(5))
    assert found.missing_layers == []
    if all(b in layers(found) for b in others):
        assert [have[b] for b in others] == [5 + i for i in range(len(others))]
    _, found = find(tmp_path, made(*main[:3], main[4], *others), {"num_layers": 5})
    assert [str(m).split(".self")[0] for m in found.missing_layers] in (["blocks.3"], ["3"])
    assert layers(found)[main[4]] == 4


def test_wan_needs_both_attentions(tmp_path: Path) -> None:
    config = {"_class_name": "WanModel", "num_layers": 3}
    blocks = [f"blocks.{i}.{k}_attn" for i in range(3) for k in ("self", "cross")]
    _, found = find(tmp_path, made(*blocks), config)
    assert found.missing_layers == []
    _, found = find(tmp_path, made(*[b for b in blocks if b != "blocks.1.cross_attn"]), config)
    assert found.missing_layers == ["blocks.1.cross_attn"]
    _, found = find(tmp_path, made(*[b for b in blocks if ".1." not in b]), config)
    assert found.missing_layers == [1]
    _, found = find(tmp_path, made(*[b for b in blocks if "self" not in b][:2]), config)
    assert found.missing_layers == [2]
    _, found = find(tmp_path, made(*[b for b in blocks if "cross" not in b]), config)
    assert found.missing_layers == []  # a file of self-attention only


def test_cross_attention_in_the_place_of_self_attention(tmp_path: Path) -> None:
    """Llama 3.2 Vision."""
    blocks = [f"layers.{i}.self_attn" for i in (0, 1, 3)] + ["layers.2.cross_attn"]
    _, found = find(tmp_path, made(*blocks), {"num_hidden_layers": 4})
    assert found.missing_layers == []
    _, found = find(tmp_path, made(*blocks), {"num_hidden_layers": 5})
    assert found.missing_layers == [4]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, [1, 3]),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, [0, 1, 2, 3]),
        ({"layers_block_type": ["mamba", "hybrid", "mamba", "mamba"]}, [1]),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [1, 3]),
        ({"num_kv_shared_layers": 1}, [0, 1, 2]),
        ({"num_hidden_groups": 1}, [0]),
        ({"layer_types": "attention"}, [0, 1, 2, 3]),
        ({"attn_layer_period": 0, "attn_layer_offset": "x"}, [0, 1, 2, 3]),
    ],
)
def test_hybrids(config: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    blocks = [f"layers.{i}.attn" for i in expected]
    _, found = find(tmp_path, made(*blocks), {"num_hidden_layers": 4} | config)
    assert found.missing_layers == []
    if len(blocks) > 1:
        _, found = find(tmp_path, made(*blocks[:-1]), {"num_hidden_layers": 4} | config)
        assert found.missing_layers == [expected[-1]]


def test_too_many_layers(tmp_path: Path) -> None:
    arrays = made("blocks.0.attn")
    start = time.process_time()
    for config, options, says in (
        ({"num_layers": 10**9}, {}, r"config\.json says that there are 1e\+09 layers"),
        ({"num_hidden_layers": 1e12}, {}, "give the number with --layers"),
        ({"num_layers": 2}, {"layers": 10**9}, "--layers says"),
        ({"encoder_layers": 10**12}, {}, "says that there are"),
    ):
        with pytest.raises(UserError, match=says):
            find(tmp_path, arrays, config, **options)
    _, found = find(tmp_path, arrays, {"num_layers": 10**9}, layers=3)
    assert found.missing_layers == [1, 2]
    _, found = find(tmp_path, arrays, {"num_hidden_layers": 2, "num_kv_shared_layers": 10**15})
    assert found.missing_layers == [1]
    assert time.process_time() - start < 5
    for option in ("layers", "heads", "kv_heads"):
        for value in (0, -1):
            with pytest.raises(UserError, match=f"--{option.replace('_', '-')} is {value}"):
                find(tmp_path, arrays, **{option: value})


def test_numbers_that_are_no_layers(tmp_path: Path) -> None:
    for name in ("9" * 5000, "٣", "²", "99999999999999999999", "-1", ""):
        _, found = find(tmp_path, made(f"blocks.{name}.attn", f"blocks.{name}x.attn"))
        assert [a.layer for a in found.attentions] == [0, 1]
    assert save(tmp_path, made("x"))
    names = ["b.10", "b.9", "b.9a", "b", "a.²", "b." + "9" * 5000]
    assert sorted(names, key=natural)[:4] == ["a.²", "b", "b.9", "b.9a"]
