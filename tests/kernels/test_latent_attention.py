"""The forms of latent attention against the float64 oracle, at Wan's shapes and at odd ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mla_study.kernels.latent_attention import (
    FORMS,
    PORTABLE,
    absorbed,
    attend_expanded,
    expanded,
    reconstruct,
    reference,
)
from mla_study.kernels.latent_attention.reconstruct import augmented_up

FAST = ("reconstruct", "absorbed")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def inputs(
    batch: int, queries: int, keys: int, heads: int, d_nope: int, d_rope: int, d_v: int, d_c: int,
    seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """q_nope, q_rope, c, k_rope, k_up, v_up; logits of order ``scale``."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    given = (
        normal(batch, queries, heads, d_nope) * scale,
        normal(batch, queries, heads, d_rope) * scale,
        normal(batch, keys, d_c),
        normal(batch, keys, d_rope),
        normal(heads, d_nope, d_c) / math.sqrt(d_c),
        normal(heads, d_v, d_c) / math.sqrt(d_c),
    )
    return tuple(x.to(dtype) for x in given)


def error(mine: Tensor, theirs: Tensor) -> float:
    return ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item()


def oracle(*given: Tensor) -> Tensor:
    return reference(*(x.double() for x in given))


def by_hand(*given: Tensor) -> Tensor:
    """The equations once more, as one einsum a line."""
    q_nope, q_rope, c, k_rope, k_up, v_up = given
    k_nope = torch.einsum("hnc,bkc->bkhn", k_up, c)
    v = torch.einsum("hvc,bkc->bkhv", v_up, c)
    score = torch.einsum("bmhn,bkhn->bhmk", q_nope, k_nope)
    score = score + torch.einsum("bmhr,bkr->bhmk", q_rope, k_rope)
    weights = (score / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])).softmax(-1)
    return torch.einsum("bhmk,bkhv->bmhv", weights, v)


def test_the_oracle_reads_like_the_equations(seed: int) -> None:
    given = inputs(2, 3, 5, 3, 7, 4, 9, 6, seed, torch.float64)
    assert error(reference(*given), by_hand(*given)) < 1e-14


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_at_the_shapes_of_wan(form: str, dtype: torch.dtype, seed: int) -> None:
    given = inputs(1, 23, 67, 12, 96, 32, 128, 192, seed, dtype)
    assert error(FORMS[form](*given), oracle(*given)) < TOLERANCE[dtype]


def test_forms_agree_with_each_other(seed: int) -> None:
    given = inputs(1, 31, 45, 12, 96, 32, 128, 192, seed, scale=3.0)
    assert error(absorbed(*given), reconstruct(*given)) < 2e-6


@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 19),
    keys=st.integers(1, 37),
    heads=st.integers(1, 5),
    d_nope=st.integers(1, 13),
    pairs=st.integers(0, 5),
    d_v=st.integers(1, 17),
    d_c=st.integers(1, 21),
    group=st.sampled_from([None, 1, 2, 3, 99]),
    draw=st.integers(0, 2**31),
)
def test_at_odd_shapes(
    batch: int, queries: int, keys: int, heads: int, d_nope: int, pairs: int, d_v: int, d_c: int,
    group: int | None, draw: int,
) -> None:  # fmt: skip
    given = inputs(batch, queries, keys, heads, d_nope, 2 * pairs, d_v, d_c, draw)
    truth = oracle(*given)
    # few values may cancel: what is rounded are the values of which the mean is taken
    values = torch.einsum("hvc,bkc->bkhv", given[5].double(), given[2].double())
    size = max(truth.norm().item(), truth.numel() ** 0.5 * values.abs().mean().item())
    for mine, most in (
        (reference(*given), 2e-7), (reconstruct(*given, head_group=group), 2e-6),
        (absorbed(*given), 2e-6),
    ):  # fmt: skip
        assert (mine.double() - truth).norm().item() < most * size


def test_without_content_channels(seed: int) -> None:
    given = inputs(1, 4, 6, 2, 0, 6, 6, 5, seed)
    for form in FAST:
        assert error(FORMS[form](*given), oracle(*given)) < 2e-6


@pytest.mark.parametrize("form", PORTABLE)
def test_gradients(form: str, seed: int) -> None:
    given = inputs(2, 3, 4, 2, 3, 2, 5, 4, seed, torch.float64)
    leaves = [x.requires_grad_() for x in given]
    assert torch.autograd.gradcheck(FORMS[form], leaves)


@pytest.mark.parametrize("form", FAST)
def test_gradients_are_those_of_the_oracle(form: str, seed: int) -> None:
    given = inputs(1, 9, 14, 4, 24, 8, 32, 40, seed)
    mine = [x.clone().requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    weights = torch.randn(1, 9, 4, 32)
    (FORMS[form](*mine) * weights).sum().backward()
    (reference(*truth) * weights).sum().backward()
    for a, b in zip(mine, truth, strict=True):
        assert a.grad is not None and b.grad is not None
        assert error(a.grad, b.grad) < 1e-5


def test_the_rotary_part_of_the_augmented_gemm_is_exact(seed: int) -> None:
    _, _, c, k_rope, k_up, v_up = inputs(2, 1, 11, 3, 5, 4, 7, 6, seed)
    both = torch.cat([c, k_rope], dim=-1) @ augmented_up(k_up, v_up, 4)
    keys = both[..., : 3 * 9].unflatten(-1, (3, 9))
    for head in range(3):
        assert torch.equal(keys[:, :, head, 5:], k_rope)


def test_expanding_first_changes_nothing(seed: int) -> None:
    q_nope, q_rope, c, k_rope, k_up, v_up = inputs(2, 5, 9, 3, 7, 4, 6, 8, seed, torch.float64)
    k_nope, v = expanded(c, k_up, v_up)
    window = slice(2, 8)
    mine = attend_expanded(q_nope, q_rope, k_nope[:, window], k_rope[:, window], v[:, window])
    truth = reference(q_nope, q_rope, c[:, window], k_rope[:, window], k_up, v_up)
    assert error(mine, truth) < 1e-14


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_head_by_head_is_the_same_function(dtype: torch.dtype, seed: int) -> None:
    given = inputs(2, 7, 33, 3, 24, 8, 40, 48, seed, dtype)
    graph = reconstruct(*given[:-1], given[-1].clone().requires_grad_())
    plain = reconstruct(*given)
    assert graph.requires_grad and not plain.requires_grad
    assert plain.dtype == dtype
    assert error(plain, graph.detach()) < 2 * TOLERANCE[dtype]
    assert error(plain, oracle(*given)) < TOLERANCE[dtype]


def test_head_groups_bound_the_transient(seed: int) -> None:
    given = inputs(1, 5, 64, 6, 8, 4, 12, 10, seed)
    given[2].requires_grad_()  # without gradients the CPU goes head by head anyway
    sizes: list[int] = []

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") in ("matmul", "__matmul__"):
                sizes.append(out.numel())
            return out

    with Largest():
        whole = reconstruct(*given)
        grouped = reconstruct(*given, head_group=2)
    assert error(grouped, whole) < 1e-6
    assert sizes == [64 * 6 * 24] + [64 * 2 * 24] * 3
