"""Row stacks in every gauge, against dense float64 arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from probe_files import Arrays, as_bf16, gqa, joint, wan, write

from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import Attention, Part, find_operators
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError
from mla_study.probes.stacks import STACKS, Stacks, Weights, _compact


def opened(path: Path, **options: int) -> tuple[Checkpoint, list[Attention]]:
    checkpoint = open_checkpoint(str(path))
    return checkpoint, find_operators(checkpoint, **options).attentions


def spectra(path: Path, operators: list[str], layer: int = 0, **options: object):
    checkpoint, attentions = opened(path)
    stacks = Stacks(Weights(checkpoint), attentions[layer], **options)  # type: ignore[arg-type]
    return {(s.operator, s.gauge): s for s in stacks.run(operators)}


def agrees(sigma: np.ndarray, dense: np.ndarray) -> bool:
    """The agreement that is promised with float64 svdvals."""
    want = scipy.linalg.svdvals(dense)
    if sigma.shape != want.shape:
        return False
    bound = 1e-10 * want[0] * np.maximum(1, 1e-5 * want[0] / np.maximum(want, 1e-300))
    return bool((np.abs(sigma - want) <= bound).all())


def scaled(arrays: Arrays, layer: int, roles: str, gauge: str) -> np.ndarray:
    """A row stack of a Wan block in a gauge, written down as its definition says."""
    blocks = []
    for role in roles:
        w = joint(arrays, layer, role)
        norm = np.linalg.norm(w)
        if gauge == "balanced":
            w = w / norm
        if gauge == "folded" and role in "qk":
            gain = arrays[f"blocks.{layer}.self_attn.norm_{role}.weight"].astype(np.float64)
            w = gain[:, None] * w * np.sqrt(len(w)) / norm
        blocks.append(w)
    return np.concatenate(blocks)


@pytest.mark.parametrize("d", [1, 7, 24, 65])
def test_each_gauge_of_each_stack_is_its_definition(d: int, tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=1, d=d)
    found = spectra(write(tmp_path / "w.safetensors", arrays), list(STACKS))
    singles = {"q": ["raw", "folded"], "k": ["raw", "folded"], "v": ["raw"], "o": ["raw"]}
    everything = ["raw", "balanced", "folded"]
    expected = {**singles, "kv": everything, "qkv": everything}
    assert list(found) == [(op, g) for op in STACKS for g in expected[op]]
    for (op, gauge), spectrum in found.items():
        dense = scaled(arrays, 0, STACKS[op], gauge)
        assert agrees(spectrum.sigma, dense), (op, gauge)
        assert (spectrum.m, spectrum.n) == dense.shape
        assert spectrum.head == -1 and spectrum.inner is None


def test_any_subset_and_order_of_the_requests_gives_the_same_values(
    tmp_path: Path, seed: int
) -> None:
    """Grams are shared and destroyed at their last use: no request may see another's ruins."""
    rng = np.random.default_rng(seed)
    arrays = wan(rng, layers=1, d=11)
    path = write(tmp_path / "w.safetensors", arrays)
    checkpoint, attentions = opened(path)
    whole = spectra(path, list(STACKS))
    for _ in range(25):
        operators = list(rng.permutation(list(STACKS))[: rng.integers(1, 7)])
        gauges = list(rng.permutation(["raw", "balanced", "folded"])[: rng.integers(1, 4)])
        for spectrum in Stacks(Weights(checkpoint), attentions[0]).run(operators, gauges):
            want = whole[spectrum.operator, spectrum.gauge].sigma
            np.testing.assert_allclose(spectrum.sigma, want, rtol=1e-9, atol=1e-12 * want[0])


def test_wide_stacks_of_grouped_queries(tmp_path: Path, seed: int) -> None:
    arrays = gqa(np.random.default_rng(seed), layers=1)
    found = spectra(write(tmp_path / "w.safetensors", arrays), ["kv", "k", "q", "qkv"])
    k, v, q = (
        arrays[f"model.layers.0.self_attn.{role}_proj.weight"].astype(np.float64) for role in "kvq"
    )
    assert agrees(found["kv", "raw"].sigma, np.concatenate([k, v]))
    halves = [k / np.linalg.norm(k), v / np.linalg.norm(v)]
    assert agrees(found["kv", "balanced"].sigma, np.concatenate(halves))
    assert agrees(found["k", "raw"].sigma, k)
    assert agrees(found["qkv", "raw"].sigma, np.concatenate([q, k, v]))
    assert ("k", "folded") not in found


@pytest.mark.parametrize("factor", [8.0, 1e-3])
def test_a_factor_on_k_moves_the_raw_gauge_only(factor: float, tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=1, d=33)
    before = spectra(write(tmp_path / "a.safetensors", arrays), ["kv", "k"])
    arrays["blocks.0.self_attn.k.weight"] *= np.float32(factor)
    after = spectra(write(tmp_path / "b.safetensors", arrays), ["kv", "k"])
    for key, spectrum in before.items():
        near = np.allclose(spectrum.sigma, after[key].sigma, rtol=1e-6)
        assert near == (key[1] != "raw"), key


def test_one_gain_a_head_is_folded_head_by_head(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = gqa(rng, layers=1, kv=6)
    gain = rng.uniform(0.5, 2, 4).astype(np.float32)
    arrays["model.layers.0.self_attn.k_norm.weight"] = gain
    found = spectra(write(tmp_path / "w.safetensors", arrays), ["k"])
    heads = arrays["model.layers.0.self_attn.k_proj.weight"].astype(np.float64).reshape(6, 4, -1)
    norms = np.linalg.norm(heads, axis=(1, 2), keepdims=True)
    dense = heads * gain[None, :, None] * np.sqrt(4) / norms
    assert agrees(found["k", "folded"].sigma, dense.reshape(24, -1))


def test_the_tail_comes_from_svdvals_where_it_is_long_or_asked_for(
    tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = wan(rng, layers=1, d=20)
    left, right = (np.linalg.qr(rng.standard_normal((20, 20)))[0] for _ in range(2))
    steep = (left * np.geomspace(1, 1e-6, 20)) @ right
    arrays["blocks.0.self_attn.k.weight"] = steep  # float64
    path = write(tmp_path / "w.safetensors", arrays)
    found = spectra(path, ["kv", "k"])
    assert found["kv", "raw"].method == "gram"
    assert found["k", "raw"].method == "svdvals"
    assert agrees(found["k", "raw"].sigma, steep)
    arrays["blocks.0.self_attn.v.weight"] = steep @ steep  # now no gauge of the stack is flat
    steeper = write(tmp_path / "s.safetensors", arrays)
    found = spectra(steeper, ["kv", "v"])
    assert {s.method for s in found.values()} == {"svdvals"}
    assert agrees(found["kv", "folded"].sigma, scaled(arrays, 0, "kv", "folded"))
    exact = spectra(path, ["kv", "k", "v"], exact_tail=True)
    assert {s.method for s in exact.values()} == {"svdvals"}
    wide = gqa(rng, layers=1)
    path = write(tmp_path / "wide.safetensors", wide)
    assert {s.method for s in spectra(path, ["kv"]).values()} == {"gram"}
    assert {s.method for s in spectra(path, ["kv"], exact_tail=True).values()} == {"svdvals"}


@pytest.mark.parametrize("scale", [0.0, 1e-140, 1e-30, 1e140])
def test_extreme_scales(scale: float, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = wan(rng, layers=1, d=9)
    k = scale * rng.standard_normal((9, 9))
    arrays["blocks.0.self_attn.k.weight"] = k
    found = spectra(write(tmp_path / "w.safetensors", arrays), ["kv", "k"])
    assert all(np.isfinite(s.sigma).all() for s in found.values())
    want = scipy.linalg.svdvals(k)
    np.testing.assert_allclose(found["k", "raw"].sigma, want, rtol=1e-9, atol=1e-12 * want[0])
    if scale > 0:
        arrays["blocks.0.self_attn.k.weight"] = k / scale
        same = spectra(write(tmp_path / "b.safetensors", arrays), ["kv", "k"])
        for key in (("kv", "balanced"), ("kv", "folded"), ("k", "folded")):
            np.testing.assert_allclose(found[key].sigma, same[key].sigma, rtol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_are_named(bad: float, tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=2, d=6)
    arrays["blocks.1.self_attn.v.weight"][3, 2] = bad
    path = write(tmp_path / "w.safetensors", arrays)
    spectra(path, ["kv"], layer=0)
    with pytest.raises(UserError, match=r"w\.safetensors.*'blocks\.1\.self_attn\.v\.weight'.*1 of"):
        spectra(path, ["kv"], layer=1)
    arrays = wan(np.random.default_rng(seed), layers=1, d=6)
    arrays["blocks.0.self_attn.norm_k.weight"][0] = bad
    with pytest.raises(UserError, match=r"norm_k.*NaN or Inf"):
        spectra(write(tmp_path / "g.safetensors", arrays), ["kv"])


def test_values_whose_squares_overflow_are_refused(tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=1, d=6)
    arrays["blocks.0.self_attn.v.weight"] = np.full((6, 6), 1e200)
    with pytest.raises(UserError, match="exceed 1e\\+150"):
        spectra(write(tmp_path / "w.safetensors", arrays), ["kv"])


def test_row_ranges_and_transposed_storage_read_as_written(tmp_path: Path, seed: int) -> None:
    stored = np.random.default_rng(seed).standard_normal((12, 7)).astype(np.float32)
    checkpoint = open_checkpoint(str(write(tmp_path / "w.safetensors", {"w": stored})))
    weights = Weights(checkpoint)
    rows = ((6, 8), (0, 3), (11, 12))
    picked = [6, 7, 0, 1, 2, 11]
    np.testing.assert_array_equal(weights.values(Part("w", rows, 7)), stored[picked])
    turned = Part("w", ((5, 7), (1, 2)), 12, transposed=True)
    np.testing.assert_array_equal(weights.values(turned), stored.T[[5, 6, 1]])
    assert set(weights.digests) == {"w[(6, 8), (0, 3), (11, 12)]", "w[(5, 7), (1, 2)]"}


def test_a_large_tensor_is_read_in_pieces(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = np.random.default_rng(seed).standard_normal((11, 7)).astype(np.float32)
    path = write(tmp_path / "w.safetensors", {"w": stored})
    part = Part("w", ((1, 10),), 7)
    weights = Weights(open_checkpoint(str(path)))
    weights.values(part)
    monkeypatch.setattr("mla_study.probes.stacks._READ_VALUES", 15)  # two rows
    pieces = Weights(open_checkpoint(str(path)))
    np.testing.assert_array_equal(pieces.values(part), stored[1:10])
    assert pieces.digests == weights.digests


@pytest.mark.parametrize("exact", [False, True])
def test_no_byte_is_read_twice(exact: bool, tmp_path: Path, seed: int) -> None:
    arrays, dtypes = as_bf16(wan(np.random.default_rng(seed), layers=1, d=40))
    path = write(tmp_path / "w.safetensors", arrays, dtypes)
    checkpoint, attentions = opened(path)
    before = checkpoint.bytes_read
    found = Stacks(Weights(checkpoint), attentions[0], exact_tail=exact).run(["kv", "k", "v"])
    assert len(found) == 6
    assert checkpoint.bytes_read - before == 2 * (2 * 40 * 40 + 40)


def test_sixteen_bits_are_held_and_given_back_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((5, 6)).astype(np.float32)
    short = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    half = (values * 1e-6).astype(np.float16).astype(np.float32)  # subnormal ones among them
    mixed = np.concatenate([short, values])
    for array in (values, short, half, mixed, values.astype(np.float64), short[:, ::2], short[:0]):
        back = _compact(array)()
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
    assert _compact(values)() is values
    zero = np.array([[-0.0, 0.0]], dtype=np.float32)
    assert np.signbit(_compact(zero)()).tolist() == [[True, False]]


# Weighted gauges


def covariance(rng: np.random.Generator, d: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """C = X^T X / tokens of made-up inputs, and a root of it with as many columns as C has rank."""
    inputs = rng.standard_normal((tokens, d)) * np.geomspace(3, 0.1, d)
    c = inputs.T @ inputs / tokens
    values, vectors = np.linalg.eigh(c)
    kept = values > 1e-12 * values[-1]
    return c, vectors[:, kept] * np.sqrt(values[kept])


@pytest.mark.parametrize("tokens", [200, 9])
def test_weighted_gauges_are_those_of_w_times_the_root_of_c(
    tokens: int, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    d = 15
    arrays = wan(rng, layers=1, d=d)
    c, root = covariance(rng, d, tokens)
    half = scipy.linalg.sqrtm(c).real
    checkpoint, attentions = opened(write(tmp_path / "w.safetensors", arrays))
    weights = Weights(checkpoint)
    weighted = Stacks(weights, attentions[0], root=root)
    found = {(s.operator, s.gauge): s for s in weighted.run(["kv", "k", "q"])}
    k, v = joint(arrays, 0, "k") @ half, joint(arrays, 0, "v") @ half
    gain = arrays["blocks.0.self_attn.norm_k.weight"].astype(np.float64)[:, None]
    folded = gain * k * np.sqrt(d) / np.linalg.norm(k)
    expected = {
        ("kv", "weighted-raw"): np.concatenate([k, v]),
        ("kv", "weighted-balanced"): np.concatenate([k / np.linalg.norm(k), v / np.linalg.norm(v)]),
        ("kv", "weighted-folded"): np.concatenate([folded, v]),
        ("k", "weighted-folded"): folded,
        ("q", "weighted-raw"): joint(arrays, 0, "q") @ half,
    }
    for key, dense in expected.items():
        want = scipy.linalg.svdvals(dense)
        assert found[key].sigma.shape == want.shape
        np.testing.assert_allclose(found[key].sigma, want, atol=1e-7 * want[0])
    # the plain folded gauge takes the RMS that the inputs really give
    plain = Stacks(weights, attentions[0], measured=weighted)
    [one] = plain.run(["k"], ["folded"])
    want = scipy.linalg.svdvals(gain * joint(arrays, 0, "k") * np.sqrt(d) / np.linalg.norm(k))
    np.testing.assert_allclose(one.sigma, want, rtol=1e-9, atol=1e-12 * want[0])


def test_queries_of_cross_attention_have_other_inputs(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, root = covariance(rng, 12, 50)
    checkpoint, attentions = opened(
        write(tmp_path / "w.safetensors", wan(rng, layers=1, d=12, cross=True))
    )
    by_kind = {a.kind: Stacks(Weights(checkpoint), a, root=root) for a in attentions}
    assert [by_kind["self"].sees(role) for role in "qkvo"] == [True, True, True, False]
    assert [by_kind["cross"].sees(role) for role in "qkvo"] == [False, True, True, False]
    assert not Stacks(Weights(checkpoint), attentions[0], root=root[:5]).sees("k")
