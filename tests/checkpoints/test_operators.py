"""Attention blocks of the field's checkpoints, found by names and shapes alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from checkpoints.making import Maker, find, matrix, summary
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.blocks import Heads
from mla_study.checkpoints.operators.find import find_operators
from mla_study.checkpoints.reader import OpenSpec
from mla_study.errors import UserError

D = 15

# family -> (shapes for block {i}, what is found in each block)
FAMILIES: dict[str, tuple[dict[str, tuple[int, ...]], list[tuple[str, str]]]] = {
    "original Wan": (
        {f"blocks.{{i}}.{a}_attn.{p}.weight": (D, D) for a in ("self", "cross") for p in "qkvo"}
        | {f"blocks.{{i}}.{a}_attn.norm_{p}.weight": (D,) for a in ("self", "cross") for p in "qk"}
        | {"blocks.{i}.ffn.0.weight": (31, D), "blocks.{i}.ffn.2.weight": (D, 31)},
        [("self", "q k v o"), ("cross", "q k v o")],
    ),
    "diffusers Wan": (
        {f"blocks.{{i}}.attn{a}.to_{p}.weight": (D, D) for a in (1, 2)
         for p in ("q", "k", "v", "out.0")},
        [("self", "q k v o"), ("cross", "q k v o")],
    ),
    "Llama, Mistral": (
        {"layers.{i}.self_attn.q_proj.weight": (18, D),
         "layers.{i}.self_attn.k_proj.weight": (6, D),
         "layers.{i}.self_attn.v_proj.weight": (6, D),
         "layers.{i}.self_attn.o_proj.weight": (D, 18),
         "layers.{i}.mlp.up_proj.weight": (31, D), "layers.{i}.mlp.down_proj.weight": (D, 31)},
        [("self", "q k v o")],
    ),
    "Phi-3": (
        {"layers.{i}.self_attn.qkv_proj.weight": (30, D),
         "layers.{i}.self_attn.o_proj.weight": (D, 18)},
        [("self", "q k v o")],
    ),
    "nanoGPT": (
        {"transformer.h.{i}.attn.c_attn.weight": (3 * D, D),
         "transformer.h.{i}.attn.c_proj.weight": (D, D),
         "transformer.h.{i}.mlp.c_proj.weight": (D, 31)},
        [("self", "q k v o")],
    ),
    "BERT": (
        {f"encoder.layer.{{i}}.attention.self.{p}.weight": (D, D)
         for p in ("query", "key", "value")}
        | {"encoder.layer.{i}.attention.output.dense.weight": (D, D),
           "encoder.layer.{i}.intermediate.dense.weight": (31, D),
           "encoder.layer.{i}.output.dense.weight": (D, 31)},
        [("self", "q k v o")],
    ),
    "ViT, DINOv2": (
        {f"encoder.layer.{{i}}.attention.attention.{p}.weight": (D, D)
         for p in ("query", "key", "value")}
        | {"encoder.layer.{i}.attention.output.dense.weight": (D, D)},
        [("self", "q k v o")],
    ),
    "timm": (
        {"blocks.{i}.attn.qkv.weight": (3 * D, D), "blocks.{i}.attn.proj.weight": (D, D),
         "blocks.{i}.attn.q_norm.weight": (5,), "blocks.{i}.attn.k_norm.weight": (5,)},
        [("self", "q k v o")],
    ),
    "TransformerDecoder": (
        {f"layers.{{i}}.{a}.{p}": s for a in ("self_attn", "multihead_attn")
         for p, s in (("in_proj_weight", (3 * D, D)), ("out_proj.weight", (D, D)))},
        [("self", "q k v o"), ("cross", "q k v o")],
    ),
    "MultiheadAttention with kdim": (
        {"layers.{i}.attn.q_proj_weight": (D, D), "layers.{i}.attn.k_proj_weight": (D, 7),
         "layers.{i}.attn.v_proj_weight": (D, 7), "layers.{i}.attn.out_proj.weight": (D, D),
         "layers.{i}.attn.bias_k": (1, 1, D), "layers.{i}.attn.bias_v": (1, 1, D)},
        [("cross", "q k v o")],
    ),
    "CLIP": (
        {f"text_model.encoder.layers.{{i}}.self_attn.{p}_proj.weight": (D, D)
         for p in ("q", "k", "v", "out")},
        [("self", "q k v o")],
    ),
    "T5 encoder": (
        {f"encoder.block.{{i}}.layer.0.SelfAttention.{p}.weight": (20, D) for p in "qkv"}
        | {"encoder.block.{i}.layer.0.SelfAttention.o.weight": (D, 20),
           "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4)},
        [("self", "q k v o")],
    ),
    "DistilBERT": (
        {f"transformer.layer.{{i}}.attention.{p}_lin.weight": (D, D)
         for p in ("q", "k", "v", "out")},
        [("self", "q k v o")],
    ),
    "1x1 convolutions": (
        {f"decoder.up.{{i}}.attn.0.{p}.weight": (D, D, 1, 1)
         for p in ("q", "k", "v", "proj_out")},
        [("self", "q k v o")],
    ),
    "fused 1x1 convolution": (
        {"input_blocks.{i}.1.qkv.weight": (3 * D, D, 1),
         "input_blocks.{i}.1.proj_out.weight": (D, D, 1)},
        [("self", "q k v o")],
    ),
    "fused kv": (
        {"stages.{i}.attn.q.weight": (D, D), "stages.{i}.attn.kv.weight": (2 * D, D),
         "stages.{i}.attn.proj.weight": (D, D)},
        [("self", "q k v o")],
    ),
    "MobileBERT": (
        {"encoder.layer.{i}.attention.self.query.weight": (D, D),
         "encoder.layer.{i}.attention.self.key.weight": (D, D),
         "encoder.layer.{i}.attention.self.value.weight": (D, 40)},
        [("self", "q k v")],
    ),
    "DeepSeek": (
        {"layers.{i}.self_attn.q_a_proj.weight": (9, D),
         "layers.{i}.self_attn.q_a_layernorm.weight": (9,),
         "layers.{i}.self_attn.q_b_proj.weight": (21, 9),
         "layers.{i}.self_attn.kv_a_proj_with_mqa.weight": (7 + 3, D),
         "layers.{i}.self_attn.kv_a_layernorm.weight": (7,),
         "layers.{i}.self_attn.kv_b_proj.weight": (26, 7),
         "layers.{i}.self_attn.o_proj.weight": (D, 13),
         "layers.{i}.self_attn.indexer.wk.weight": (5, D),
         "layers.{i}.self_attn.indexer.wq_b.weight": (5, 9)},
        [("self", "q_down q_up kv_down kv_up o k_rope")],
    ),
    "our own": (
        {"blocks.{i}.self_attn.W_kv_down.weight": (7, D),
         "blocks.{i}.self_attn.kv_norm.weight": (7,),
         "blocks.{i}.self_attn.W_k_up.weight": (12, 7),
         "blocks.{i}.self_attn.W_v_up.weight": (D, 7),
         "blocks.{i}.self_attn.W_kr.weight": (3, D), "blocks.{i}.self_attn.W_q_down.weight": (9, D),
         "blocks.{i}.self_attn.W_q_up.weight": (12, 9), "blocks.{i}.self_attn.W_qr.weight": (3, 9),
         "blocks.{i}.self_attn.W_o.weight": (D, D)},
        [("self", "kv_down k_up v_up k_rope q_down q_up q_rope o")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path, seed: int) -> None:
    shapes, blocks = FAMILIES[family]
    names = {n.format(i=i): s for i in (0, 2, 10) for n, s in shapes.items()}
    checkpoint, found = find(tmp_path, Maker(seed).all(names))
    got = [(layer, kind, set(roles.split())) for layer, kind, roles in summary(found)]
    want = [(i, kind, set(roles.split())) for i in (0, 2, 10) for kind, roles in blocks]
    assert got == want
    assert found.missing_layers == []
    assert found.notes == []
    used = {p.tensor for a in found.attentions for p in a.parts.values()}
    assert not used & set(found.left_out)
    for attention in found.attentions:
        for role in attention.parts:
            matrix(checkpoint, attention, role)
    # says which blocks should be there
    _, found = find(tmp_path, Maker(seed).all(names), layers=11)
    assert found.missing_layers == [1, 3, 4, 5, 6, 7, 8, 9]


def test_image_stream_leaves_the_text_alone(tmp_path: Path, seed: int) -> None:
    """Wan image-to-video, in both namings."""
    make = Maker(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        shapes |= {f"blocks.{i}.attn{a}.to_{p}.weight": (D, D) for a in (1, 2) for p in "qkv"}
        shapes |= {f"blocks.{i}.attn2.add_{p}_proj.weight": (D, D) for p in "kv"}
        shapes |= {f"blocks.{i}.attn2.norm_added_k.weight": (D,),
                   f"blocks.{i}.attn2.norm_k.weight": (D,)}  # fmt: skip
    _, found = find(tmp_path / "a", make.all(shapes))
    assert summary(found) == [(i, k, "q k v") for i in range(3) for k in ("self", "cross")]
    assert "second stream" in found.left_out["blocks.1.attn2.add_k_proj.weight"]
    assert found.attentions[1].norms == {"k_norm": "blocks.0.attn2.norm_k.weight"}
    shapes = {}
    for i in range(3):
        for a in ("self", "cross"):
            shapes |= {f"blocks.{i}.{a}_attn.{p}.weight": (D, D) for p in "qkvo"}
        shapes |= {f"blocks.{i}.cross_attn.{p}_img.weight": (D, D) for p in "kv"}
        shapes |= {f"blocks.{i}.cross_attn.norm_k_img.weight": (D,),
                   f"blocks.{i}.cross_attn.norm_k.weight": (D,)}  # fmt: skip
    checkpoint, found = find(tmp_path / "b", make.all(shapes))
    assert summary(found) == [(i, k, "q k v o") for i in range(3) for k in ("self", "cross")]
    assert "second stream" in found.left_out["blocks.0.cross_attn.k_img.weight"]
    text = find_operators(checkpoint).attentions[1]
    assert text.parts["k"].tensor == "blocks.0.cross_attn.k.weight"
    assert text.norms == {"k_norm": "blocks.0.cross_attn.norm_k.weight"}
    # and it can be asked for
    _, found = find(
        tmp_path / "b",
        make.all(shapes),
        maps=["k_img -> cross.k", "v_img -> cross.v", "attn\\.[qkvo]\\. -> none"],
    )
    assert summary(found) == [(i, "cross", "k v") for i in range(3)]


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_double_stream(naming: str, tmp_path: Path, seed: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        if naming == "diffusers":
            b = f"transformer_blocks.{i}.attn"
            shapes |= {f"{b}.to_{p}.weight": (D, D) for p in ("q", "k", "v", "out.0", "add_out")}
            shapes |= {f"{b}.add_{p}_proj.weight": (D, D) for p in "qkv"}
        else:
            for side in ("img", "txt"):
                shapes[f"double_blocks.{i}.{side}_attn.qkv.weight"] = (3 * D, D)
                shapes[f"double_blocks.{i}.{side}_attn.proj.weight"] = (D, D)
                shapes[f"double_blocks.{i}.{side}_attn.norm.key_norm.scale"] = (5,)
    for i in range(4):
        if naming == "diffusers":
            b = f"single_transformer_blocks.{i}.attn"
            shapes |= {f"{b}.to_{p}.weight": (D, D) for p in "qkv"}
        else:
            shapes[f"single_blocks.{i}.linear1.weight"] = (3 * D + 31, D)
            shapes[f"single_blocks.{i}.linear2.weight"] = (D, D + 31)
    config = {"num_layers": 3, "num_single_layers": 5}
    checkpoint, found = find(tmp_path, Maker(seed).all(shapes), config)
    assert [a.layer for a in found.attentions] == list(range(7))
    assert [a.block.startswith("single") for a in found.attentions] == [False] * 3 + [True] * 4
    assert all({"q", "k", "v"} <= set(a.parts) for a in found.attentions)
    last = "single_transformer_blocks.4.attn" if naming == "diffusers" else "single_blocks.4"
    assert found.missing_layers == [last]
    if naming == "original":
        assert found.attentions[0].heads == Heads(3, 3, 5)
        v = matrix(checkpoint, found.attentions[-1], "v")
        np.testing.assert_array_equal(
            v, checkpoint.read("single_blocks.3.linear1.weight")[2 * D : 3 * D]
        )


def test_wrappers_and_other_networks_in_one_file(tmp_path: Path, seed: int) -> None:
    """A stable-diffusion file: U-Net, VAE and text encoder."""
    shapes: dict[str, tuple[int, ...]] = {}
    for at in ("input_blocks.1.1", "input_blocks.2.1", "middle_block.1", "output_blocks.3.1"):
        b = f"model.diffusion_model.{at}.transformer_blocks.0"
        shapes |= {f"{b}.attn1.to_{p}.weight": (D, D) for p in ("q", "k", "v", "out.0")}
        shapes |= {f"{b}.attn2.to_{p}.weight": (D, 9 if p in "kv" else D) for p in "qkv"}
    for p in ("q", "k", "v", "proj_out"):
        shapes[f"first_stage_model.encoder.mid.attn_1.{p}.weight"] = (D, D, 1, 1)
    for i in range(2):
        for p in "qkv":
            b = f"cond_stage_model.transformer.text_model.encoder.layers.{i}"
            shapes[f"{b}.self_attn.{p}_proj.weight"] = (9, 9)
    _, found = find(tmp_path, Maker(seed).all(shapes))
    own = [a for a in found.attentions if a.kind == "self"]
    assert len({a.layer for a in own}) == len(own) == 7
    assert [a.block.split(".")[0] for a in sorted(own, key=lambda a: a.layer)] == (
        ["input_blocks", "input_blocks", "middle_block", "output_blocks"]
        + ["cond_stage_model"] * 2
        + ["first_stage_model"]
    )
    assert sum(a.kind == "cross" for a in found.attentions) == 4


def test_incomplete_blocks(tmp_path: Path, seed: int) -> None:
    arrays = Maker(seed).all(
        {f"blocks.{i}.attn.{p}.weight": (D, D) for i in range(4) for p in "qkvo"}
    )
    for gone in ("blocks.1.attn.q", "blocks.2.attn.k", "blocks.3.attn.o"):
        del arrays[f"{gone}.weight"]
    _, found = find(tmp_path, arrays, layers=5)
    assert summary(found) == [(0, "self", "q k v o"), (1, "self", "k v o"), (3, "self", "q k v")]
    assert found.missing_layers == [2, 4]
    assert (
        found.left_out["blocks.2.attn.v.weight"] == "its block has o, q, v only: k and v are needed"
    )
    notes = " ".join(found.notes)
    for part in ("'blocks.1.attn') without q", "'blocks.3.attn') without o",
                 "'blocks.2.attn') with o, q, v only"):  # fmt: skip
        assert part in notes


def test_map(tmp_path: Path, seed: int) -> None:
    arrays = Maker(seed).all(
        {f"{s}_nets.{i}.weight": (D, D) for i in range(3) for s in ("one", "two", "three")}
        | {f"mix.{i}.attn.{s}.weight": (D, D) for i in range(3) for s in ("q", "k", "val")}
    )
    with pytest.raises(UserError, match="no attention projections found") as caught:
        find(tmp_path, {n: a for n, a in arrays.items() if "nets" in n})
    assert "--map 'REGEX -> role'" in str(caught.value)
    assert "one_nets.*.weight (3)" in str(caught.value)
    maps = ["two_nets -> k", "three_nets -> v", "one_nets -> q", "mix -> none"]
    _, found = find(tmp_path, arrays, maps=maps)
    assert summary(found) == [(i, "self", "q k v") for i in range(3)]
    assert found.left_out["mix.0.attn.q.weight"] == "left out by --map"
    layer = "(?P<layer>\\d)\\.attn"
    maps = [f"{layer}\\.k -> cross.k", f"{layer}\\.val -> cross.v"]
    _, found = find(tmp_path, arrays, maps=maps)
    assert summary(found) == [(i, "cross", "k v") for i in range(3)]
    # one odd name beside ordinary ones joins their block
    _, found = find(tmp_path, arrays, maps=["attn\\.val -> v"])
    assert summary(found) == [(i, "self", "q k v") for i in range(3)]
    with pytest.raises(UserError, match=r"--map 'nothing -> k' matches none of its 18 tensors"):
        find(tmp_path, arrays, maps=["attn\\.val -> v", "nothing -> k"])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"a.k.weight": (0, 5), "a.v.weight": (0, 5)}, r"'a.k.weight' has shape \[0, 5\]"),
        ({"a.k.weight": (), "a.v.weight": (5,)}, "no attention projections.*holds 2 tensors"),
        ({"a.k.weight": (3, 4, 5), "a.v.weight": (3, 4, 5)}, r"shape \[3, 4, 5\] is no matrix"),
        ({"a.k.weight": (5, 5)}, "its block has k only"),
        ({"a.query_key_value.weight": (15, 5)}, "head by head: give --heads N"),
        ({"a.qkv.weight": (14, 9)}, "do not split into q, k and v"),
        ({"a.kv.weight": (7, 5)}, "do not halve"),
        ({"a.kv_down.weight": (4, 5), "a.k_up.weight": (6, 4), "a.v_up.weight": (6, 3)},
         "not factors of one latent"),
        ({"a.kv_down.weight": (3, 5), "a.kv_up.weight": (6, 4)}, "not factors of one latent"),
        ({"blk.0.attn_kv_a_mqa.weight": (7, 5), "blk.0.attn_k_b.weight": (2, 3, 4),
          "blk.0.attn_v_b.weight": (2, 3, 4)}, "is no matrix"),
        ({"ffn.key.weight": (20, 5), "ffn.value.weight": (5, 20)}, "feed-forward"),
        ({"x": (3,)}, "holds 1 tensor and no matrix"),
    ],
)  # fmt: skip
def test_refused(arrays: dict[str, tuple[int, ...]], says: str, tmp_path: Path, seed: int) -> None:
    with pytest.raises(UserError) as caught:
        find(tmp_path, Maker(seed).all(arrays))
    sentence = str(caught.value)
    assert re.search(says, sentence)
    assert str(tmp_path) in sentence
    assert "\n" not in sentence


def test_codes_are_no_weights(tmp_path: Path) -> None:
    codes = np.arange(25, dtype=np.uint8).reshape(5, 5)
    with pytest.raises(UserError, match="U8 codes of a quantised checkpoint"):
        find(tmp_path, {"a.k_proj.weight": codes, "a.v_proj.weight": codes})
    with pytest.raises(UserError, match="packed codes of a quantised checkpoint"):
        find(tmp_path, {"a.k_proj.qweight": codes, "a.v_proj.qweight": codes})


def test_gguf_deepseek(tmp_path: Path, seed: int) -> None:
    gguf = pytest.importorskip("gguf")
    make = Maker(seed)
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "deepseek2")
    writer.add_block_count(3)
    writer.add_head_count(2)
    for i in range(2):
        writer.add_tensor(f"blk.{i}.attn_kv_a_mqa.weight", make(7 + 3, 32))
        writer.add_tensor(f"blk.{i}.attn_kv_a_norm.weight", make(7))
        writer.add_tensor(f"blk.{i}.attn_kv_b.weight", make(22, 7))
        writer.add_tensor(f"blk.{i}.attn_k_b.weight", make(2, 7, 5))
        writer.add_tensor(f"blk.{i}.attn_v_b.weight", make(2, 6, 7))
        writer.add_tensor(f"blk.{i}.attn_q.weight", make(16, 32))
        writer.add_tensor(f"blk.{i}.attn_output.weight", make(32, 12))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = find_operators(open_checkpoint(OpenSpec(str(file))))
    assert [a.layer for a in found.attentions] == [0, 1]
    parts = found.attentions[0].parts
    assert {r: (p.m, p.n) for r, p in parts.items()} == {
        "kv_down": (7, 32), "k_rope": (3, 32), "kv_up": (22, 7), "q": (16, 32), "o": (32, 12)
    }  # fmt: skip
    assert found.attentions[0].norms == {"kv_norm": "blk.0.attn_kv_a_norm.weight"}
    assert found.left_out["blk.1.attn_k_b.weight"] == "shape [2, 7, 5] is no matrix"
    assert found.missing_layers == [2]


def test_real_files(assets: Path) -> None:
    for name, blocks in (
        ("minilm_l6_attention_fp16", 6),
        ("smollm2_135m_kv_q4dequant_fp16", 30),
        ("dinov2s_saliency_attention_fp16", 12),
        ("gmflow_transformer", 12),
        ("terrain_consistency_unet_attention", 28),
        ("stories260K", 5),
    ):
        checkpoint = open_checkpoint(str(assets / "weights" / f"{name}.safetensors"))
        found = find_operators(checkpoint)
        assert len(found.attentions) == blocks
        checkpoint.close()
