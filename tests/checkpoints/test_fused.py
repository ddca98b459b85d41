"""Fused projections taken apart: the rows must be those that the model itself would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.making import Maker, find, matrix
from mla_study.checkpoints.operators.blocks import Heads, Part
from mla_study.errors import UserError

D = 12  # three heads of four


def pieces(make: Maker, heads: int, kv_heads: int, dim: int = 4) -> dict[str, np.ndarray]:
    return {
        "q": make(heads * dim, D),
        "k": make(kv_heads * dim, D),
        "v": make(kv_heads * dim, D),
        "o": make(D, heads * dim),
    }


def by_head(parts: dict[str, np.ndarray], kv_heads: int) -> np.ndarray:
    """[groups, (queries of the group, key, value), dim] flattened, as Megatron and Falcon do."""
    dim = len(parts["k"]) // kv_heads
    q = parts["q"].reshape(kv_heads, -1, dim, D)
    k, v = (parts[r].reshape(kv_heads, 1, dim, D) for r in "kv")
    return np.concatenate([q, k, v], axis=1).reshape(-1, D)


def check(checkpoint: Any, found: Any, parts: dict[str, np.ndarray], roles: str = "qkv") -> None:
    for role in roles:
        np.testing.assert_array_equal(matrix(checkpoint, found.attentions[0], role), parts[role])


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("known", ["o", "config", "heads"])
def test_plain(kv_heads: int, known: str, tmp_path: Path, seed: int) -> None:
    parts = pieces(Maker(seed), 6, kv_heads, dim=2)
    arrays = {"layers.0.self_attn.qkv_proj.weight": np.concatenate([parts[r] for r in "qkv"])}
    config, options = None, {}
    if known == "o":
        arrays["layers.0.self_attn.o_proj.weight"] = parts["o"]
    elif known == "config":
        config = {"num_attention_heads": 6, "num_key_value_heads": kv_heads}
    else:
        options = {"heads": 6, "kv_heads": kv_heads}
    checkpoint, found = find(tmp_path, arrays, config, **options)
    check(checkpoint, found, parts, "qkvo" if known == "o" else "qkv")
    if known != "o":
        assert found.attentions[0].heads == Heads(6, kv_heads, 2)


def test_nothing_tells_the_groups(tmp_path: Path, seed: int) -> None:
    parts = pieces(Maker(seed), 6, 2, dim=2)
    arrays = {"layers.0.self_attn.qkv_proj.weight": np.concatenate([parts[r] for r in "qkv"])}
    with pytest.raises(UserError, match="give --heads N"):
        find(tmp_path, arrays)
    with pytest.raises(
        UserError, match=r"6 query heads and 4 key/value heads do not divide the 20"
    ):
        find(tmp_path, arrays, heads=6, kv_heads=4)


@pytest.mark.parametrize(
    ("config", "kv_heads"),
    [
        ({"model_type": "gpt_neox", "num_attention_heads": 6}, 6),
        ({"model_type": "bloom", "n_head": 6}, 6),
        ({"model_type": "falcon", "num_attention_heads": 6, "multi_query": True}, 1),
        ({"model_type": "falcon", "num_attention_heads": 6, "num_kv_heads": 6,
          "multi_query": True, "new_decoder_architecture": False}, 1),
        ({"model_type": "falcon", "num_attention_heads": 6, "num_kv_heads": 2,
          "multi_query": True, "new_decoder_architecture": True}, 2),
        ({"model_type": "falcon", "n_head": 6, "multi_query": False}, 6),
    ],
)  # fmt: skip
def test_by_head(config: dict[str, Any], kv_heads: int, tmp_path: Path, seed: int) -> None:
    parts = pieces(Maker(seed), 6, kv_heads, dim=2)
    arrays = {
        "h.0.self_attention.query_key_value.weight": by_head(parts, kv_heads),
        "h.0.self_attention.dense.weight": parts["o"],
    }
    checkpoint, found = find(tmp_path, arrays, config)
    check(checkpoint, found, parts, "qkvo")
    assert found.attentions[0].heads == Heads(6, kv_heads, 2)
    assert "rows interleaved by head" in found.attentions[0].remarks


def test_by_head_from_the_options(tmp_path: Path, seed: int) -> None:
    parts = pieces(Maker(seed), 6, 3, dim=2)
    arrays = {"layers.0.attention.query_key_value.weight": by_head(parts, 3)}
    with pytest.raises(UserError, match="head by head: give --heads N"):
        find(tmp_path, arrays)
    checkpoint, found = find(tmp_path, arrays, heads=6, kv_heads=3)
    check(checkpoint, found, parts)
    with pytest.raises(
        UserError, match="7 query heads and 7 key/value heads do not divide the 24 rows"
    ):
        find(tmp_path, arrays, heads=7)
    renamed = {"layers.0.attn.qkv.weight": arrays.popitem()[1]}
    checkpoint, found = find(tmp_path, renamed, heads=6, kv_heads=3, maps=["qkv -> qkv_by_head"])
    check(checkpoint, found, parts)


def test_chatglm(tmp_path: Path, seed: int) -> None:
    """The first version goes head by head; later ones take all queries, keys, values in turn."""
    parts = pieces(Maker(seed), 6, 6, dim=2)
    name = "transformer.layers.0.attention.query_key_value.weight"
    config: dict[str, Any] = {"model_type": "chatglm", "num_attention_heads": 6}
    checkpoint, found = find(tmp_path, {name: by_head(parts, 6)}, config)
    check(checkpoint, found, parts)
    parts = pieces(Maker(seed), 6, 2, dim=2)
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    config["multi_query_group_num"] = 2
    arrays = {name: np.concatenate([parts[r] for r in "qkv"])}
    checkpoint, found = find(tmp_path, arrays, config)
    check(checkpoint, found, parts)
    assert found.attentions[0].heads == Heads(6, 2, 2)


def test_internlm(tmp_path: Path, seed: int) -> None:
    parts = pieces(Maker(seed), 6, 2, dim=2)
    config = {"model_type": "internlm2", "num_attention_heads": 6, "num_key_value_heads": 2}
    arrays = {"layers.0.attention.wqkv.weight": by_head(parts, 2)}
    checkpoint, found = find(tmp_path, arrays, config)
    check(checkpoint, found, parts)


def test_conv1d_of_gpt2(tmp_path: Path, seed: int) -> None:
    parts = pieces(Maker(seed), 3, 3)
    arrays = {
        "transformer.h.0.attn.c_attn.weight": np.concatenate([parts[r] for r in "qkv"]).T.copy(),
        "transformer.h.0.attn.c_proj.weight": parts["o"].T.copy(),
        "transformer.h.0.crossattention.c_attn.weight": np.concatenate(
            [parts["k"], parts["v"]]
        ).T.copy(),
        "transformer.h.0.crossattention.q_attn.weight": parts["q"].T.copy(),
    }
    checkpoint, found = find(tmp_path, arrays, {"n_head": 3})
    check(checkpoint, found, parts, "qkvo")
    assert found.attentions[0].heads == Heads(3, 3, 4)
    cross = found.attentions[1]
    assert cross.kind == "cross"
    for role in "qkv":
        np.testing.assert_array_equal(matrix(checkpoint, cross, role), parts[role])


def test_codegen(tmp_path: Path, seed: int) -> None:
    make = Maker(seed)
    parts = {role: make(16, 16) for role in "qkv"}
    split = {role: m.reshape(4, 4, 16) for role, m in parts.items()}
    fused = np.concatenate([split[r] for r in "qvk"], axis=1).reshape(48, 16)
    config = {"model_type": "codegen", "n_head": 4}
    checkpoint, found = find(tmp_path, {"h.0.attn.qkv_proj.weight": fused}, config)
    check(checkpoint, found, parts)


def test_by_channel(tmp_path: Path, seed: int) -> None:
    parts = pieces(Maker(seed), 3, 3)
    fused = np.stack([parts[r] for r in "qkv"], axis=1).reshape(3 * D, D, 1, 1)
    arrays = {"enc.16x16_block2.qkv.weight": fused}
    checkpoint, found = find(tmp_path, arrays, maps=["qkv -> qkv_by_channel"])
    check(checkpoint, found, parts)
    assert found.attentions[0].layer == 2
    _, found = find(tmp_path, arrays)
    assert "in thirds" in found.attentions[0].remarks[0]


@pytest.mark.parametrize("name", ["kv", "to_kv", "kv_proj"])
def test_fused_kv(name: str, tmp_path: Path, seed: int) -> None:
    parts = pieces(Maker(seed), 3, 3)
    arrays = {f"b.0.attn.{name}.weight": np.concatenate([parts["k"], parts["v"]])}
    checkpoint, found = find(tmp_path, arrays)
    check(checkpoint, found, parts, "kv")
    assert found.attentions[0].layout == "fused kv"
    arrays["b.0.attn.kv_norm.weight"] = np.ones(2 * D, np.float32)
    with pytest.raises(UserError, match="one projection serves as key and as value"):
        find(tmp_path, arrays)


def test_state_space_mixers_are_no_attention(tmp_path: Path, seed: int) -> None:
    make = Maker(seed)
    arrays = {
        "backbone.layers.0.mixer.in_proj.weight": make(48, D),
        "backbone.layers.0.mixer.x_proj.weight": make(9, 24),
        "backbone.layers.0.mixer.dt_proj.weight": make(24, 5),
        "backbone.layers.0.mixer.out_proj.weight": make(D, 24),
    }
    with pytest.raises(UserError, match="no attention projections found"):
        find(tmp_path, arrays)


def test_gate_behind_the_queries(tmp_path: Path, seed: int) -> None:
    make = Maker(seed)
    q, gate = make(3, 4, D), make(3, 4, D)
    arrays = {
        "layers.0.self_attn.q_proj.weight": np.concatenate([q, gate], axis=1).reshape(24, D),
        "layers.0.self_attn.k_proj.weight": make(4, D),
        "layers.0.self_attn.v_proj.weight": make(4, D),
        "layers.0.self_attn.o_proj.weight": make(D, 12),
        "layers.0.self_attn.q_norm.weight": make(4),
    }
    checkpoint, found = find(tmp_path, arrays, {"num_attention_heads": 3})
    check(checkpoint, found, {"q": q.reshape(12, D)}, "q")
    assert found.attentions[0].heads == Heads(3, 1, 4)


def test_parts(seed: int) -> None:
    """Row ranges of row ranges, against indexing."""
    rng = np.random.default_rng(seed)
    rows = ((3, 7), (11, 12), (20, 26))
    part = Part("x", rows, 5)
    flat = np.concatenate([np.arange(a, b) for a, b in rows])
    assert part.m == len(flat)
    for _ in range(50):
        a, b = sorted(rng.integers(0, part.m + 1, 2).tolist())
        taken = part.sub(a, b)
        assert taken.m == b - a
        got = [np.arange(*row) for row in taken.rows]
        np.testing.assert_array_equal(np.concatenate(got) if got else [], flat[a:b])
    twice = part.take(((5, 9), (0, 2)))
    got = np.concatenate([np.arange(*row) for row in twice.rows])
    np.testing.assert_array_equal(got, np.concatenate([flat[5:9], flat[0:2]]))


def test_against_transformers(tmp_path: Path, seed: int) -> None:
    """Zeroed V rows silence the attention; zeroed K rows do what zeroed Q rows do."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8,
        vocab_size=11, attention_bias=False, attn_implementation="eager",
    )  # fmt: skip
    model = GPTNeoXModel(config).eval()
    arrays = {n: p.detach().numpy() for n, p in model.named_parameters()}
    _, found = find(tmp_path, arrays, config.to_dict())
    parts = found.attentions[0].parts
    weight = model.layers[0].attention.query_key_value.weight
    seen: list[Any] = []
    model.layers[0].attention.dense.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    original = weight.detach().clone()
    torch.nn.init.normal_(original)
    for role in ("", "q", "k", "v"):
        weight.data.copy_(original)
        for start, stop in parts[role].rows if role else ():
            weight.data[start:stop] = 0
        with torch.no_grad():
            model(torch.arange(7)[None])
    plain, q, k, v = seen
    assert v.abs().max() == 0
    assert torch.equal(q, k)
    assert not torch.allclose(plain, k)
