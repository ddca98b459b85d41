"""The cost model against counted FLOPs, the facts of the derivation, and its own limits."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mla_study.errors import UserError
from mla_study.kernels.latent_attention import absorbed, expanded
from mla_study.kernels.latent_attention.cost import (
    DERIVED,
    Calibration,
    Rates,
    Shape,
    absorbed_cost,
    costs,
    crossover,
    dense_cost,
    reconstruct_cost,
)

WAN = Shape(4680, 15600)
_SDPA = "scaled_dot_product_attention"


def two_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * (scale or 1.0), -1) @ v


def tensors(shape: Shape) -> tuple[torch.Tensor, ...]:
    s = shape
    return (
        torch.randn(s.batch, s.queries, s.heads, s.d_nope),
        torch.randn(s.batch, s.queries, s.heads, s.d_rope),
        torch.randn(s.batch, s.keys, s.d_c),
        torch.randn(s.batch, s.keys, s.d_rope),
        torch.randn(s.heads, s.d_nope, s.d_c),
        torch.randn(s.heads, s.d_head, s.d_c),
    )


@given(
    batch=st.integers(1, 3),
    queries=st.integers(2, 9),  # a product along one is no product to torch
    keys=st.integers(2, 11),
    heads=st.integers(2, 4),
    d_c=st.integers(2, 13),
    d_head=st.integers(4, 12),
    draw=st.data(),
)
def test_flops_are_those_that_torch_counts(
    batch: int, queries: int, keys: int, heads: int, d_c: int, d_head: int, draw: st.DataObject
) -> None:
    d_rope = 2 * draw.draw(st.integers(0, d_head // 2 - 1))
    shape = Shape(queries, keys, batch, heads, d_c, d_rope, d_head, "fp32")
    given_ = tensors(shape)
    # fused attention is not counted, two products are
    with FlopCounterMode(display=False) as counter, patch.object(F, _SDPA, two_products):
        absorbed(*given_)
    assert counter.get_total_flops() == absorbed_cost(shape, value_is_key=True).flops
    with FlopCounterMode(display=False) as counter:
        expanded(given_[2], given_[4], given_[5])
    assert counter.get_total_flops() == reconstruct_cost(shape).phases[0].flops
    assert dense_cost(shape).flops == 4 * batch * heads * queries * keys * d_head


def test_facts_of_wan() -> None:
    """facts: 269, 896 and 143 queries; 1.58x and 1.625x; a transient of 96 MB."""
    assert round(crossover(192, 32, 128)) == 269
    assert round(crossover(128, 32, 128)) == 896
    assert round(crossover(512, 32, 128)) == 143
    assert crossover(112, 32, 128) == float("inf") != crossover(113, 32, 128)
    ratio = absorbed_cost(WAN).flops / reconstruct_cost(WAN).flops
    assert ratio == pytest.approx(1.58, abs=0.005)
    wide = replace(WAN, keys=10**9)
    against_dense = absorbed_cost(wide).phases[1].flops / dense_cost(wide).flops
    assert against_dense == pytest.approx(1.625)
    assert reconstruct_cost(WAN).transient / 1e6 == pytest.approx(95.8, abs=0.1)


def test_the_crossover_is_where_the_counts_meet() -> None:
    for d_c in (120, 192, 320, 512):
        for value_is_key in (False, True):
            limit = crossover(d_c, 32, 128, value_is_key)
            for queries, cheaper in ((int(limit * 0.98), True), (int(limit * 1.02) + 1, False)):
                shape = Shape(queries, 10**8, d_c=d_c)
                told = absorbed_cost(shape, value_is_key).flops < reconstruct_cost(shape).flops
                assert told is cheaper


@pytest.mark.parametrize("keys", [100, 700, 15600])
def test_few_keys_move_the_crossover(keys: int) -> None:
    for d_c in (96, 128, 192, 512):
        limit = crossover(d_c, 32, 128, keys=keys)
        assert limit <= crossover(d_c, 32, 128)
        for queries in range(1, keys, max(1, keys // 97)):
            shape = Shape(queries, keys, d_c=d_c)
            cheaper = absorbed_cost(shape).flops < reconstruct_cost(shape).flops
            assert cheaper is (queries < limit)


def test_keeping_expansions_divides_their_cost_and_holds_a_dense_cache() -> None:
    five = replace(WAN, passes=5)
    kept, anew = reconstruct_cost(five, keep_expanded=True), reconstruct_cost(five)
    share = (15600 + 4 * 4680) / 5 / 15600
    assert kept.phases[0].flops == pytest.approx(share * anew.phases[0].flops)
    assert kept.phases[1] == anew.phases[1]
    assert kept.held == 15600 * 3072 * 2 and kept.transient == 0.0  # bytes of a dense bf16 cache
    assert anew.held == 0.0
    once = replace(WAN, passes=1)
    assert reconstruct_cost(once, True).flops == reconstruct_cost(once).flops


def test_seconds_are_a_roofline() -> None:
    rates = Calibration("x", "fp32", 1, 2.0, 4.0, Rates(8.0, 3.0, 0.5), Rates(1.0))
    shape = Shape(1, 1, heads=1, d_c=1, d_rope=0, d_head=1, dtype="fp32")
    gemm, attention = reconstruct_cost(shape).phases
    expected = 0.5 + max(gemm.flops / 2, gemm.bytes / 4)
    expected += max(attention.flops / (8 * 1 / 4), attention.bytes / 4)
    assert rates.seconds(reconstruct_cost(shape), "reconstruct") == pytest.approx(expected)
    assert rates.seconds(reconstruct_cost(shape), "absorbed_triton") == float("inf")
    told = costs(shape)["absorbed"]
    assert DERIVED.seconds(told, "absorbed") == told.flops


@pytest.mark.parametrize(
    "wrong",
    [
        {"queries": 0}, {"keys": -1}, {"heads": 0}, {"d_rope": 3}, {"d_rope": 130},
        {"d_rope": -2}, {"dtype": "int3"}, {"passes": 0}, {"d_c": 0},
    ],
)  # fmt: skip
def test_shapes_that_are_none(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        replace(WAN, **wrong)
