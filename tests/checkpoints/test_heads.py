"""How many heads, told by options, qk-norm or config; and what configs say otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.making import Maker, find
from mla_study.checkpoints.operators.blocks import Heads
from mla_study.checkpoints.operators.config_facts import ConfigFacts
from mla_study.errors import UserError

D = 10


def block(q: int = 24, k: int = 24, o: bool = True, at: str = "layers.0.self_attn") -> Any:
    shapes = {f"{at}.q_proj.weight": (q, D), f"{at}.k_proj.weight": (k, D),
              f"{at}.v_proj.weight": (k, D), f"{at}.o_proj.weight": (D, q)}  # fmt: skip
    arrays = Maker(0).all({n: s for n, s in shapes.items() if all(s)})
    if not o:
        arrays.pop(f"{at}.o_proj.weight")
    return arrays


@pytest.mark.parametrize(
    ("config", "k", "heads"),
    [
        ({"num_attention_heads": 6}, 24, Heads(6, 6, 4)),
        ({"n_head": 6}, 24, Heads(6, 6, 4)),
        ({"num_heads": 6}, 24, Heads(6, 6, 4)),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 8, Heads(6, 2, 4)),
        ({"num_attention_heads": 6}, 8, Heads(6, 2, 4)),
        ({"num_attention_heads": 6}, 4, Heads(6, 1, 4)),
        ({"head_dim": 4}, 8, Heads(6, 2, 4)),
        ({"attention_head_dim": 4, "num_attention_heads": 6}, 24, Heads(6, 6, 4)),
        ({"text_config": {"num_attention_heads": 6}}, 24, Heads(6, 6, 4)),
        ({"model": {"num_heads": 6}}, 24, Heads(6, 6, 4)),
        ({"num_attention_heads": 6.0}, 24, Heads(6, 6, 4)),
        # what does not fit, or says nothing
        ({"num_attention_heads": 7}, 24, None),
        ({"num_attention_heads": 6}, 6, None),
        ({"num_attention_heads": 6, "head_dim": 5}, 24, None),
        ({"num_attention_heads": [3, 6]}, 24, None),
        ({"num_attention_heads": None}, 24, None),
        ({"num_attention_heads": False}, 24, None),
        ({}, 24, None),
    ],
)
def test_config(config: dict[str, Any], k: int, heads: Heads | None, tmp_path: Path) -> None:
    _, found = find(tmp_path, block(k=k), config)
    assert found.attentions[0].heads == heads
    assert found.notes == []


@pytest.mark.parametrize("value", ["six", "6", True, 0, -6, 6.5, 1e300])
def test_odd_numbers_in_a_config_are_told(value: Any, tmp_path: Path) -> None:
    _, found = find(tmp_path, block(), {"num_attention_heads": value, "num_layers": value})
    assert found.attentions[0].heads is None
    assert found.expected_layers is None
    assert f"num_attention_heads = {value!r}" in found.notes[0]
    assert "num_layers" in found.notes[0]


@pytest.mark.parametrize("size", [4, 24])
def test_qk_norm(size: int, tmp_path: Path) -> None:
    """A gain for one head tells the heads; one for all channels leaves it to the config."""
    arrays = block(k=8) if size == 4 else block()
    for role in "qk":
        arrays[f"layers.0.self_attn.{role}_norm.weight"] = np.ones(size, np.float32)
    _, found = find(tmp_path, arrays)
    attention = found.attentions[0]
    assert set(attention.norms) == {"q_norm", "k_norm"}
    assert attention.heads == (Heads(6, 2, 4) if size == 4 else None)
    _, found = find(tmp_path, arrays, {"num_attention_heads": 3})
    assert found.attentions[0].heads == (Heads(6, 2, 4) if size == 4 else Heads(3, 3, 8))


def test_gains_that_do_not_fit(tmp_path: Path) -> None:
    arrays = block()
    arrays["layers.0.self_attn.k_norm.weight"] = np.ones(7, np.float32)
    arrays["layers.0.self_attn.q_norm.weight"] = np.ones((6, 4), np.float32)
    _, found = find(tmp_path, arrays)
    attention = found.attentions[0]
    assert attention.norms == {}
    assert "has 7 gains for 24 channels: ignored" in attention.remarks[0]
    assert found.left_out["layers.0.self_attn.q_norm.weight"] == "shape [6, 4] is no vector"
    arrays["layers.0.self_attn.k_norm.weight"] = np.ones(0, np.float32)
    _, found = find(tmp_path, arrays)
    assert found.attentions[0].norms == {}


def test_gains_of_another_meaning(tmp_path: Path) -> None:
    arrays = block()
    arrays["layers.0.self_attn.k_norm.weight"] = np.ones(4, np.float32)
    _, found = find(tmp_path, arrays, {"model_type": "gemma3_text"})
    assert found.attentions[0].norms == {}
    assert found.attentions[0].heads == Heads(6, 6, 4)
    assert "gains less 1" in found.attentions[0].remarks[0]
    arrays["layers.0.self_attn.k_norm.bias"] = np.zeros(4, np.float32)
    _, found = find(tmp_path, arrays, {})
    assert found.attentions[0].norms
    assert "has a bias" in found.attentions[0].remarks[0]


def test_latent_norm_must_fit_exactly(tmp_path: Path) -> None:
    make = Maker(0)
    arrays = make.all(
        {"a.kv_down.weight": (6, D), "a.kv_up.weight": (20, 6), "a.kv_norm.weight": (3,)}
    )
    _, found = find(tmp_path, arrays)
    assert found.attentions[0].norms == {}
    arrays["a.kv_norm.weight"] = make(6)
    _, found = find(tmp_path, arrays)
    assert found.attentions[0].norms == {"kv_norm": "a.kv_norm.weight"}


@pytest.mark.parametrize(
    ("options", "k", "heads"),
    [
        ({"heads": 6}, 24, Heads(6, 6, 4)),
        ({"heads": 6}, 8, Heads(6, 2, 4)),
        ({"heads": 6, "kv_heads": 2}, 8, Heads(6, 2, 4)),
        ({"kv_heads": 2}, 8, Heads(6, 2, 4)),
        ({"heads": 1}, 24, Heads(1, 1, 24)),
    ],
)
def test_given(options: dict[str, int], k: int, heads: Heads, tmp_path: Path) -> None:
    _, found = find(tmp_path, block(k=k), {"num_attention_heads": 12}, **options)
    assert found.attentions[0].heads == heads


@pytest.mark.parametrize(
    ("options", "k", "says"),
    [
        ({"heads": 5}, 24, "5 heads do not divide the 24 channels of 'layers.0.self_attn.q_proj"),
        ({"heads": 3}, 12, "heads of 8 channels do not divide the 12 rows of"),
        ({"heads": 6, "kv_heads": 3}, 8, "3 key/value heads make heads of 2.66667 rows"),
        ({"heads": 6, "kv_heads": 4}, 8, "but 6 query heads make 4"),
        ({"kv_heads": 5}, 8, "heads"),
        ({"heads": 100}, 24, "100 heads do not divide"),
    ],
)
def test_given_that_do_not_divide(
    options: dict[str, int], k: int, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        find(tmp_path, block(k=k), **options)
    assert says in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert "give another" in str(caught.value)


def test_keys_and_values_alone(tmp_path: Path) -> None:
    """Without q and o the config's query heads say nothing of the rows."""
    arrays = {n: a for n, a in block(k=8, o=False).items() if "q_proj" not in n}
    config = {"num_attention_heads": 6, "num_key_value_heads": 2}
    _, found = find(tmp_path, arrays, config)
    assert found.attentions[0].heads == Heads(6, 2, 4)
    _, found = find(tmp_path, arrays, heads=6, kv_heads=2)
    assert found.attentions[0].heads == Heads(6, 2, 4)
    with pytest.raises(UserError, match=r"6 heads do not divide the 8 rows of .*k_proj"):
        find(tmp_path, arrays, heads=6)


def test_towers_have_their_own_heads(tmp_path: Path) -> None:
    arrays = block(at="text_model.encoder.layers.0.self_attn")
    arrays |= block(at="vision_model.encoder.layers.0.self_attn")
    config = {
        "text_config": {"num_attention_heads": 6, "num_hidden_layers": 1},
        "vision_config": {"num_attention_heads": 3, "num_hidden_layers": 2},
    }
    _, found = find(tmp_path, arrays, config)
    assert [a.heads for a in found.attentions] == [Heads(6, 6, 4), Heads(3, 3, 8)]


def test_old_name_of_the_heads_in_diffusers(tmp_path: Path) -> None:
    arrays = block(at="down_blocks.0.attn1")
    _, found = find(tmp_path, arrays, {"_class_name": "UNet2DConditionModel",
                                       "attention_head_dim": 6})  # fmt: skip
    assert found.attentions[0].heads == Heads(6, 6, 4)
    _, found = find(tmp_path, arrays, {"_class_name": "UNet2DModel", "attention_head_dim": 6})
    assert found.attentions[0].heads == Heads(4, 4, 6)


def test_config_inside_the_file(tmp_path: Path) -> None:
    from checkpoints.making import save
    from mla_study.checkpoints.opening import open_checkpoint

    for text, heads in (
        ('{"num_heads": 6, "num_layers": 3}', 6),
        ('["num_heads"]', None),
        ("{", None),
        ("[" * 100_000, None),
    ):
        path = save(tmp_path, block(), metadata={"config": text})
        assert ConfigFacts.of(open_checkpoint(path)).heads == heads
