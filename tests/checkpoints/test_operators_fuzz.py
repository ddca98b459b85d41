"""Any bag of names and shapes, any config: operators within their tensors, or one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.test_operators import FAMILIES
from mla_study.checkpoints.formats.container import TensorInfo
from mla_study.checkpoints.locate import Located
from mla_study.checkpoints.operators.blocks import Found
from mla_study.checkpoints.operators.find import find_operators
from mla_study.checkpoints.operators.roles import FAMILIES as TOKEN_TABLE
from mla_study.checkpoints.operators.roles import NORMS
from mla_study.checkpoints.reader import Checkpoint, OpenSpec
from mla_study.errors import UserError

TOKENS = sorted(
    {t for table in (TOKEN_TABLE, NORMS) for ts in table.values() for t in ts.split()}
    | {"add_k_proj", "k_img", "linear1", "in_proj", "x"}
)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 9, 12, 24, 36])
PATHS = st.lists(
    st.sampled_from(
        ["blocks", "layers", "0", "1", "2", "10", "attn", "attn2", "self_attn", "cross_attn",
         "encoder", "decoder", "multihead_attn", "single_blocks", "vision_model", "context_block",
         "model", "attention", "self", "block3", "²", "9" * 30, "norm", "generator_ema", ""]
    ),
    max_size=4,
)  # fmt: skip
SHAPES = st.lists(SIZES, max_size=4).map(tuple) | st.tuples(SIZES, SIZES)
NAMES = st.tuples(PATHS, st.sampled_from(TOKENS)).map(lambda p: ".".join([*p[0], p[1], "weight"]))
ENDS = st.sampled_from([".weight"] * 6 + ["", ".bias", ".scale"])
# several projections of one path, so that whole blocks come about
BLOCKS = st.tuples(
    PATHS,
    st.lists(
        st.tuples(st.sampled_from([*TOKENS, *"qkvo" * 8, "qkv", "kv"]), ENDS, SHAPES), max_size=8
    ),
)
BAGS = st.lists(BLOCKS, max_size=6).map(
    lambda blocks: {
        ".".join([*path, token]) + end: shape
        for path, members in blocks
        for token, end, shape in members
    }
)
KEYS = ["num_layers", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "attention_head_dim", "multi_query", "new_decoder_architecture", "multi_query_group_num",
        "model_type", "_class_name", "encoder_layers", "num_decoder_layers", "text_config",
        "vision_config", "layer_types", "num_single_layers", "attn_layer_period",
        "attn_layer_offset", "num_kv_shared_layers", "is_encoder_decoder", "encoder",
        "quantization_config"]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**9, 10**30, -(10**30), "falcon", "chatglm", "codegen", "internlm2",
                       "deberta", "gemma3", "UNet2DConditionModel", "WanModel", "full_attention"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)
CONFIGS = st.none() | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8)
COUNTS = st.none() | st.integers(1, 40)


class Bag:
    """A file of names and shapes without values."""

    path = "bag.safetensors"
    format = "safetensors"
    fingerprint = ""
    bytes_read = 0

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tensors = {n: TensorInfo(n, shape, "F32", 0) for n, shape in shapes.items()}
        self.metadata: dict[str, object] = {}
        self.notes: list[str] = []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise AssertionError("no values are needed to find operators")

    def raw_sha256(self, name: str) -> str:
        raise AssertionError("no values are needed to find operators")

    def close(self) -> None:
        pass


@given(BAGS, CONFIGS, COUNTS, COUNTS, COUNTS)
@settings(max_examples=200)
def test_any_bag(
    shapes: dict[str, tuple[int, ...]],
    config: Any,
    heads: int | None,
    kv_heads: int | None,
    layers: int | None,
) -> None:
    attempt(shapes, config, heads=heads, kv_heads=kv_heads, layers=layers)


@given(
    st.lists(st.sampled_from(sorted(FAMILIES)), min_size=1, max_size=3),
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    st.dictionaries(st.integers(0, 99), st.none() | SHAPES, max_size=3),
    st.lists(NAMES, max_size=2),
    CONFIGS,
    COUNTS,
)
@settings(max_examples=300)
def test_damaged_families(
    families: list[str],
    indices: list[int],
    damage: dict[int, tuple[int, ...] | None],
    more: list[str],
    config: Any,
    heads: int | None,
) -> None:
    shapes = {
        name.format(i=i): shape
        for family in families
        for i in indices
        for name, shape in FAMILIES[family][0].items()
    }
    names = list(shapes)
    for at, shape in damage.items():
        shapes.pop(names[at % len(names)], None)
        if shape is not None:
            shapes[names[at % len(names)]] = shape
    attempt(shapes | dict.fromkeys(more, (4, 15)), config, heads=heads)


def attempt(shapes: dict[str, tuple[int, ...]], config: Any, **options: int | None) -> None:
    located = Located(("bag.safetensors",))
    checkpoint = Checkpoint(OpenSpec("bag.safetensors"), located, [Bag(shapes)], config, None)
    try:
        found = find_operators(checkpoint, **options)
    except UserError as error:
        sentence = str(error)
    else:
        check(checkpoint, found)
        return
    assert "bag.safetensors" in sentence or "layers" in sentence
    assert "\n" not in sentence


def check(checkpoint: Checkpoint, found: Found) -> None:
    assert found.attentions
    for attention in found.attentions:
        for part in attention.parts.values():
            shape = checkpoint.tensors[part.tensor].shape
            stored = shape[0], int(np.prod(shape[1:]))
            outputs, inputs = stored[::-1] if part.transposed else stored
            assert part.n == inputs
            assert part.m > 0
            taken = [i for start, stop in part.rows for i in range(start, stop)]
            assert len(taken) == len(set(taken)) == part.m
            assert 0 <= min(taken) <= max(taken) < outputs
        if attention.heads is not None:
            k = attention.parts["k"]
            assert attention.heads.kv * attention.heads.dim == k.m
            assert attention.heads.q % attention.heads.kv == 0
        for role, name in attention.norms.items():
            target = attention.parts[{"kv_norm": "kv_down"}.get(role, role[0])]
            assert target.m % checkpoint.tensors[name].shape[0] == 0
    for kind in ("self", "cross"):
        numbers = [a.layer for a in found.attentions if a.kind == kind]
        assert len(numbers) == len(set(numbers))
        assert min(numbers, default=0) >= 0
    assert len(found.missing_layers) == len(set(found.missing_layers)) <= 100_000
