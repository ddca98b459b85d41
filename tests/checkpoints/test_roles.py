"""Names of the field's checkpoints, and what they mean."""

from __future__ import annotations

import time

import pytest

from mla_study.checkpoints.operators.roles import (
    FAMILIES,
    is_cross,
    match_norm,
    match_weight,
    numbers,
    parse_map,
    template,
)
from mla_study.errors import UserError

WEIGHTS = {
    "blocks.3.self_attn.k.weight": ("k", "blocks.3.self_attn"),
    "blocks.3.attn1.to_out.0.weight": ("o", "blocks.3.attn1"),
    "blocks.3.attn1.to_q.0.weight": ("q", "blocks.3.attn1"),
    "layers.3.self_attn.q_proj.weight": ("q", "layers.3.self_attn"),
    "layers.3.self_attn.q_proj.linear.weight": ("q", "layers.3.self_attn"),
    "layers.3.attention.wv.weight": ("v", "layers.3.attention"),
    "h.3.attn.c_attn.weight": ("qkv", "h.3.attn"),
    "h.3.crossattention.q_attn.weight": ("q", "h.3.crossattention"),
    "h.3.attn.c_proj.weight": ("o", "h.3.attn"),
    "h.3.self_attention.query_key_value.weight": ("qkv_by_head", "h.3.self_attention"),
    "layers.3.self_attn.qkv_proj.weight": ("qkv", "layers.3.self_attn"),
    "layers.3.self_attn.W_pack.weight": ("qkv", "layers.3.self_attn"),
    "blocks.3.attn.Wqkv.weight": ("qkv", "blocks.3.attn"),
    "encoder.layer.3.attention.self.query.weight": ("q", "encoder.layer.3.attention.self"),
    "encoder.layer.3.attention.output.dense.weight": ("o", "encoder.layer.3.attention"),
    "blocks.3.attn.qkv.weight": ("qkv", "blocks.3.attn"),
    "layers.3.self_attn.in_proj_weight": ("qkv", "layers.3.self_attn"),
    "layers.3.self_attn.q_proj_weight": ("q", "layers.3.self_attn"),
    "transformer.layer.3.attention.q_lin.weight": ("q", "transformer.layer.3.attention"),
    "decoder.block.3.layer.1.EncDecAttention.k.weight":
        ("k", "decoder.block.3.layer.1.EncDecAttention"),
    "mid.attn_1.proj_out.weight": ("o", "mid.attn_1"),
    "input_blocks.7.1.qkv.weight": ("qkv", "input_blocks.7.1"),
    "block1.3.attn.kv.weight": ("kv", "block1.3.attn"),
    "layers.3.0.to_kv.weight": ("kv", "layers.3.0"),
    "layers.3.self_attn.kv_a_proj_with_mqa.weight": ("kv_down", "layers.3.self_attn"),
    "layers.3.self_attn.kv_b_proj.weight": ("kv_up", "layers.3.self_attn"),
    "layers.3.self_attn.q_a_proj.weight": ("q_down", "layers.3.self_attn"),
    "layers.3.attn.wkv_a.weight": ("kv_down", "layers.3.attn"),
    "blk.3.attn_kv_a_mqa.weight": ("kv_down", "blk.3.attn"),
    "blk.3.attn_kv_b.weight": ("kv_up", "blk.3.attn"),
    "blk.3.attn_k_b.weight": ("k_up", "blk.3.attn"),
    "blk.3.attn_q.weight": ("q", "blk.3.attn"),
    "blk.3.attn_output.weight": ("o", "blk.3.attn"),
    "blocks.3.self_attn.W_kv_down": ("kv_down", "blocks.3.self_attn"),
    "blocks.3.self_attn.W_kr.weight": ("k_rope", "blocks.3.self_attn"),
    "blocks.3.self_attn.v_up.weight": ("v_up", "blocks.3.self_attn"),
    "lora_unet_blocks_3_self_attn_q.weight": ("q", "lora_unet_blocks_3_self_attn"),
    "lora_unet_mid_attn1_to_out_0.weight": ("o", "lora_unet_mid_attn1"),
    "double_blocks.3.img_attn.qkv.weight": ("qkv", "double_blocks.3.img_attn"),
    "double_blocks.3.img_attn_qkv.weight": ("qkv", "double_blocks.3.img_attn"),
    "single_blocks.3.linear1.weight": ("qkv_mlp", "single_blocks.3"),
    "single_transformer_blocks.3.attn.to_qkv_mlp_proj.weight":
        ("qkv_mlp", "single_transformer_blocks.3.attn"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str) -> None:
    match = match_weight(name)
    assert match is not None
    assert (match.role, match.block) == WEIGHTS[name]
    assert not match.side


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.attn2.add_k_proj.weight",
        "transformer_blocks.3.attn.add_q_proj.weight",
        "transformer_blocks.3.attn.to_add_out.weight",
        "lora_unet_blocks_3_attn2_add_v_proj.weight",
        "blocks.3.cross_attn.k_img.weight",
        "blocks.3.cross_attn.v_img.weight",
        "down_blocks.3.attn2.processor.to_k_ip.0.weight",
        "joint_blocks.3.context_block.attn.qkv.weight",
        "double_blocks.3.txt_attn.qkv.weight",
        "double_blocks.3.txt_attn_qkv.weight",
        "input_blocks.3.1.encoder_kv.weight",
        "blocks.3.attn.qkv_y.weight",
    ],
)
def test_second_streams(name: str) -> None:
    match = match_weight(name)
    assert match is not None
    assert match.side


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.mlp.gate_proj.weight",
        "layers.3.mlp.up_proj.weight",
        "layers.3.mlp.down_proj.weight",
        "backbone.layers.3.mixer.in_proj.weight",
        "layers.3.linear_attn.in_proj_qkv.weight",
        "layers.3.self_attn.pos_q_proj.weight",
        "layers.3.self_attn.W_up_k.weight",
        "layers.3.self_attn.f_a_proj.weight",
        "layers.3.self_attn.indexer.wk.weight",
        "blocks.3.att.time_mix_k",
        "encoder.emb_rel_k",
        "embed_tokens.weight",
        "²",
        "",
        ".",
        "_",
    ],
)
def test_no_projection(name: str) -> None:
    assert match_weight(name) is None


@pytest.mark.parametrize(
    ("name", "role", "block"),
    [
        ("blocks.3.self_attn.norm_k.weight", "k_norm", "blocks.3.self_attn"),
        ("layers.3.self_attn.q_norm.weight", "q_norm", "layers.3.self_attn"),
        ("blk.3.attn_k_norm.weight", "k_norm", "blk.3.attn"),
        ("blk.3.attn_kv_a_norm.weight", "kv_norm", "blk.3.attn"),
        ("layers.3.self_attn.kv_a_layernorm.weight", "kv_norm", "layers.3.self_attn"),
        ("layers.3.self_attn.q_a_layernorm.weight", "q_down_norm", "layers.3.self_attn"),
        ("double_blocks.3.img_attn.norm.key_norm.scale", "k_norm", "double_blocks.3.img_attn"),
        ("joint_blocks.3.x_block.attn.ln_q.weight", "q_norm", "joint_blocks.3.x_block.attn"),
    ],
)
def test_norms(name: str, role: str, block: str) -> None:
    match = match_norm(name)
    assert match is not None
    assert (match.role, match.block) == (role, block)


@pytest.mark.parametrize(
    "name", ["blocks.3.cross_attn.norm_k_img.weight", "blocks.3.norm3.weight",
             "blk.3.attn_norm.weight", "transformer_blocks.3.attn.norm_added_k.weight"]
)  # fmt: skip
def test_other_norms(name: str) -> None:
    assert match_norm(name) is None


def test_cross() -> None:
    for path in ("blocks.0.cross_attn", "b.0.attn2", "decoder.layers.0.encoder_attn",
                 "decoder.block.0.layer.1.EncDecAttention", "h.0.crossattention"):  # fmt: skip
        assert is_cross(path), path
    for path in ("blocks.0.self_attn", "b.0.attn1", "encoder.layers.0.self_attn", "h.0.attn",
                 "down.0.motion_modules.0.transformer_blocks.0.attn2"):  # fmt: skip
        assert not is_cross(path), path


def test_numbers_and_templates() -> None:
    for path, found, stack in (
        ("blocks.3.attn1", (3,), "blocks.*.attn1"),
        ("blocks.block12.blocks.0.attn", (12, 0), "blocks.block*.blocks.*.attn"),
        ("lora_unet_blocks_3_self_attn", (3,), "lora_unet_blocks_*_self_attn"),
        ("enc.16x16_block2.qkv", (2,), "enc.16x16_block*.qkv"),
        ("layer.1234567.attn", (), "layer.1234567.attn"),  # no layer's number
        ("layer.٣.attn", (), "layer.٣.attn"),
        ("attn", (), "attn"),
    ):
        assert numbers(path) == found
        assert template(path) == stack


def test_long_names_take_no_time() -> None:
    start = time.process_time()
    for name in ("_" * 400_000, "k_" * 200_000, "model." * 70_000 + "k", "1" * 400_000,
                 "attention" * 40_000 + ".output.dense"):  # fmt: skip
        match_weight(name)
        match_norm(name)
        numbers(name)
        is_cross(name)
    assert time.process_time() - start < 10


def test_map() -> None:
    rule = parse_map(r"mixer\.(\d+)\.key -> k")
    match = rule.match("net.mixer.4.key.weight")
    assert match is not None
    assert (match.role, match.block) == ("k", "mapped.4")
    assert rule.match("net.mixer.key") is None
    cross = parse_map(r"(?P<block>mix\.\d+)\.key->CROSS.K")
    match = cross.match("mix.7.key")
    assert match is not None
    assert (match.role, match.block) == ("k", "mapped.cross.mix.7")
    assert cross.cross and is_cross(match.block)
    arrow = parse_map("a->b -> self.v")
    assert (arrow.pattern.pattern, arrow.role, arrow.cross) == ("a->b", "v", False)
    for role in FAMILIES:
        assert parse_map(f"x -> {role}").role == role


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("k", "is not 'REGEX -> role'"),
        (" -> k", "is not 'REGEX -> role'"),
        ("x -> keys", "is not 'REGEX -> role'"),
        ("x ->", "is not 'REGEX -> role'"),
        ("( -> k", "mend its regular expression"),
        ("x{99999999999999} -> k", "mend its regular expression"),
    ],
)
def test_bad_map(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_map(text)
