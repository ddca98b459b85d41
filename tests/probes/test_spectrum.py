"""Spectra against float64 svdvals, measures against closed forms and brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from mla_study.probes.spectrum import (
    DEFAULT_KS,
    DEFAULT_TAUS,
    METRICS,
    combine_grams,
    condition,
    effective_rank,
    effective_rank_interpolated,
    energy_at,
    energy_curve,
    entropy_rank,
    factored_singular_values,
    gram,
    gram_singular_values,
    measures,
    metric_names,
    needs_svd,
    participation_ratio,
    singular_values,
    stable_rank,
    tail_exponent,
)

REFUSED = (ValueError, TypeCheckError)
spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(
    lambda values: np.sort(np.array(values))[::-1].copy()
)


def _with_spectrum(rng: np.random.Generator, m: int, n: int, sigma: np.ndarray) -> np.ndarray:
    left = np.linalg.qr(rng.standard_normal((m, sigma.size)))[0]
    right = np.linalg.qr(rng.standard_normal((n, sigma.size)))[0]
    return (left * sigma) @ right.T


def _within_contract(got: np.ndarray, want: np.ndarray) -> bool:
    top = want[0]
    floor = np.maximum(want, np.finfo(float).tiny)
    return bool((np.abs(got - want) <= 1e-10 * top * np.maximum(1, 1e-5 * top / floor)).all())


# Grams


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gram_of_panels_is_that_of_the_stack(dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    panels = [rng.standard_normal((rows, 37)).astype(dtype) for rows in (1, 700, 0, 13)]
    scale = rng.standard_normal(714)
    stack = np.concatenate(panels).astype(np.float64)
    got = gram(panels, 37)
    assert got.flags.f_contiguous
    np.testing.assert_allclose(np.tril(got), np.tril(stack.T @ stack), rtol=1e-12, atol=1e-10)
    scaled = gram(iter(panels), 37, scale)
    want = stack.T @ (stack * scale[:, None] ** 2)
    np.testing.assert_allclose(np.tril(scaled), np.tril(want), rtol=1e-12, atol=1e-10)


def test_gram_adds_into_a_given_one_and_leaves_panels_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 9, 5))
    kept = a.copy()
    total = gram([a], 5)
    assert gram([b], 5, into=total) is total
    np.testing.assert_allclose(np.tril(total), np.tril(a.T @ a + b.T @ b), atol=1e-13)
    gram([a], 5, np.full(9, 3.0))
    np.testing.assert_array_equal(a, kept)


def test_gram_takes_panels_of_any_memory_order(seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal((40, 12)).astype(np.float32)
    want = gram([w], 12)
    np.testing.assert_array_equal(gram([np.asfortranarray(w)], 12), want)
    np.testing.assert_array_equal(gram([w[::-1][::-1]], 12), want)


def test_combined_grams(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = gram([rng.standard_normal((9, 6))], 6), gram([rng.standard_normal((4, 6))], 6)
    kept = a.copy()
    np.testing.assert_allclose(combine_grams(a, b, 2.0, 0.5), 2 * a + 0.5 * b, rtol=1e-15)
    np.testing.assert_array_equal(a, kept)


def test_grams_refuse_what_does_not_fit() -> None:
    with pytest.raises(REFUSED, match=r"columns|" + "type-check"):
        gram([np.ones((3, 4))], 5)
    with pytest.raises(REFUSED):
        gram([np.ones(4)], 4)
    for entries in (2, 4):
        with pytest.raises(ValueError, match="row_scale"):
            gram([np.ones((3, 4))], 4, np.ones(entries))
    with pytest.raises(ValueError, match="Fortran"):
        gram([np.ones((3, 4))], 4, into=np.zeros((4, 4)))
    for poison in (np.nan, np.inf):
        w = np.ones((3, 4))
        w[1, 2] = poison
        with pytest.raises(ValueError, match="not finite"):
            gram_singular_values(gram([w], 4), 3)


# Singular values

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 3), (31, 17), (17, 31), (40, 40), (129, 65), (65, 129)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("exact", [False, True])
def test_singular_values_match_svdvals(m: int, n: int, exact: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((m, n)).astype(np.float32)
    scale = rng.uniform(0.5, 2.0, m)
    cut = m // 3
    for gains in (None, scale):
        got, method = singular_values([w[:cut], w[cut:]], gains, exact_tail=exact)
        dense = w.astype(np.float64) * (1 if gains is None else gains[:, None])
        want = scipy.linalg.svdvals(dense)
        assert got.shape == (min(m, n),)
        assert method == "svdvals" if exact or needs_svd(want) else "gram"
        assert (np.diff(got) <= 0).all()
        assert (got >= 0).all()
        assert _within_contract(got, want)
        assert [effective_rank(got, t) for t in DEFAULT_TAUS] == [
            effective_rank(want, t) for t in DEFAULT_TAUS
        ]


@pytest.mark.parametrize(("m", "n"), [(90, 50), (50, 90), (60, 60)])
@pytest.mark.parametrize(
    ("smallest", "method"), [(1e-3, "gram"), (2e-4, "gram"), (1e-9, "svdvals")]
)
def test_the_tail_is_right_and_says_where_it_comes_from(
    m: int, n: int, smallest: float, method: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = _with_spectrum(rng, m, n, 7.0 * np.geomspace(1, smallest, min(m, n)))
    got, said = singular_values([w])
    assert said == method
    want = scipy.linalg.svdvals(w)
    assert _within_contract(got, want)
    np.testing.assert_allclose(condition(got), want[0] / want[-1], rtol=1e-5)


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_squares_out_of_range_do_not_spoil_a_spectrum(size: float, seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal((20, 11))
    got, _ = singular_values([w * size])
    np.testing.assert_allclose(got, scipy.linalg.svdvals(w) * size, rtol=1e-10)
    want = measures(scipy.linalg.svdvals(w), 11)
    have = measures(got, 11)
    for metric in ("r_0.99_interp", "entropy_rank", "participation_ratio", "tail_exponent"):
        np.testing.assert_allclose(have[metric], want[metric], rtol=1e-8)


def test_rank_deficiency_shows_as_an_infinite_condition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((50, 7)) @ rng.standard_normal((7, 30))
    sigma, method = singular_values([w])
    assert method == "svdvals"
    assert condition(sigma, 30) == np.inf
    assert effective_rank(sigma, 0.999999) <= 7


def test_singular_values_refuse_bad_input() -> None:
    for shape in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="without rows or columns"):
            singular_values([np.ones(shape)])
    with pytest.raises(ValueError, match="without rows or columns"):
        singular_values([])
    with pytest.raises(REFUSED):
        singular_values([np.ones((3, 4)), np.ones((3, 5))])
    for shape in ((6, 4), (4, 6)):
        for poison in (np.nan, np.inf, -np.inf):
            w = np.ones(shape)
            w[2, 3] = poison
            with pytest.raises(ValueError, match="NaN or Inf"):
                singular_values([w])
        with pytest.raises(ValueError, match="row_scale"):
            singular_values([np.ones(shape)], np.ones(3))


SIZES = [(30, 7, 20), (5, 9, 20), (20, 9, 5), (3, 8, 4), (1, 1, 1), (1, 4, 9), (12, 12, 12)]


@pytest.mark.parametrize(("m", "r", "n"), SIZES)
def test_factored_spectrum_is_that_of_the_product(m: int, r: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((m, r)), rng.standard_normal((r, n)).astype(np.float32)
    got = factored_singular_values(up, down)
    want = scipy.linalg.svdvals(up @ down)[: min(m, n, r)]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * want[0])


def test_factored_spectrum_keeps_a_tail_that_a_gram_would_lose(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sigma = np.geomspace(1, 1e-11, 12)
    basis = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    up = np.linalg.qr(rng.standard_normal((80, 12)))[0] * sigma @ basis
    down = basis.T @ np.linalg.qr(rng.standard_normal((60, 12)))[0].T
    np.testing.assert_allclose(factored_singular_values(up, down), sigma, rtol=1e-3)


def test_factors_refuse_bad_input() -> None:
    for up, down in (((3, 4), (5, 6)), ((0, 4), (4, 6)), ((3, 0), (0, 6))):
        with pytest.raises(REFUSED):
            factored_singular_values(np.ones(up), np.ones(down))
    with pytest.raises(ValueError, match="NaN"):
        factored_singular_values(np.full((3, 2), np.nan), np.ones((2, 4)))


# Measures


@pytest.mark.parametrize("n", [1, 2, 10, 97])
def test_equal_values_have_the_full_rank_by_every_measure(n: int) -> None:
    sigma = np.full(n, 3.0) * (1 + 1e-15 * np.arange(n)[::-1])
    assert stable_rank(sigma) == pytest.approx(n, rel=1e-9)
    assert entropy_rank(sigma) == pytest.approx(n, rel=1e-9)
    assert participation_ratio(sigma) == pytest.approx(n, rel=1e-9)
    assert condition(sigma) == pytest.approx(1)
    assert [effective_rank(sigma, k / n) for k in range(1, n + 1)] == list(range(1, n + 1))
    assert effective_rank_interpolated(sigma, 0.9) == pytest.approx(0.9 * n, abs=1e-9)


def test_hand_computed_measures() -> None:
    sigma = np.array([2.0, 1.0, 1.0])
    np.testing.assert_allclose(energy_curve(sigma), [4 / 6, 5 / 6, 1])
    assert effective_rank(sigma, 0.7) == 2
    assert effective_rank_interpolated(sigma, 0.7) == pytest.approx(1 + (0.7 - 4 / 6) * 6)
    assert effective_rank_interpolated(sigma, 0.5) == pytest.approx(0.75)
    assert stable_rank(sigma) == pytest.approx(6 / 4)
    assert participation_ratio(sigma) == pytest.approx(36 / 18)
    p = np.array([4, 1, 1]) / 6
    assert entropy_rank(sigma) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    got = measures(sigma, full_rank=10, ks=(1, 3, 7), taus=(0.7,))
    assert got["energy_at_1"] == pytest.approx(4 / 6)
    assert got["energy_at_3"] == got["energy_at_7"] == 1.0
    assert got["energy_at_n/8"] == pytest.approx(4 / 6 + 0.25 / 6)
    assert energy_at(energy_curve(sigma), 0.5) == pytest.approx(2 / 6)
    assert (got["spectral_norm"], got["condition"]) == (2.0, 2.0)
    assert tuple(got) == metric_names((1, 3, 7), (0.7,))


@given(spectra, st.floats(0.01, 1.0), st.floats(1e-3, 1e3))
def test_measures_are_ordered_and_scale_free(sigma: np.ndarray, tau: float, by: float) -> None:
    n = sigma.size
    curve = energy_curve(sigma)
    assert curve[-1] == 1.0
    assert (np.diff(curve) >= 0).all()
    slack = 1 + 1e-9
    # Renyi entropies of order infinity, 2 and 1, and the count.
    assert stable_rank(sigma) * slack >= 1
    assert stable_rank(sigma) <= participation_ratio(sigma) * slack
    assert participation_ratio(sigma) <= entropy_rank(sigma) * slack
    assert entropy_rank(sigma) <= n * slack
    k = effective_rank(sigma, tau)
    assert 1 <= k <= n
    assert curve[k - 1] >= tau - 1e-12
    assert k == 1 or curve[k - 2] < tau
    assert k - 1 <= effective_rank_interpolated(sigma, tau) <= k
    scaled = measures(sigma * by, n)
    for metric, value in measures(sigma, n).items():
        if metric.endswith("interp") or metric in ("stable_rank", "entropy_rank"):
            assert scaled[metric] == pytest.approx(value, rel=1e-6)
    assert scaled["spectral_norm"] == pytest.approx(by * sigma[0])


def test_a_zero_matrix_has_no_ranks_and_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    sigma, method = singular_values([np.zeros((6, 4))])
    got = measures(sigma, 4)
    assert method == "svdvals"
    assert got.pop("spectral_norm") == 0.0
    assert all(np.isnan(v) for v in got.values())
    assert effective_rank(sigma, 0.9) == 0
    assert np.isnan(effective_rank_interpolated(sigma, 0.9))
    assert not recwarn.list


def test_measures_have_the_agreed_names_and_refuse_nonsense() -> None:
    got = measures(np.array([1.0]), 1)
    assert tuple(got) == METRICS
    assert {"r_0.5", "r_0.999_interp", "energy_at_192", "energy_at_n/8"} <= set(METRICS)
    assert len(METRICS) == 2 * len(DEFAULT_TAUS) + len(DEFAULT_KS) + 7
    assert np.isnan(got["tail_exponent"])
    for bad in (np.array([]), np.array([np.nan]), np.array([np.inf, 1.0])):
        with pytest.raises(ValueError, match="finite"):
            measures(bad, 1)


def _tail_by_brute_force(sigma: np.ndarray) -> float:
    x = np.sort(sigma**2)
    best, alpha = np.inf, np.nan
    for i in range(x.size - 1):
        tail = x[i:]
        if tail[-1] == tail[0]:
            continue
        a = 1 + tail.size / np.log(tail / tail[0]).sum()
        model = 1 - (tail / tail[0]) ** (1 - a)
        below = np.arange(tail.size) / tail.size
        above = (np.arange(tail.size) + 1) / tail.size
        distance = max(np.abs(model - below).max(), np.abs(model - above).max())
        if distance < best - 1e-12:
            best, alpha = distance, a
    return alpha


@pytest.mark.parametrize("n", [3, 5, 40, 333])
def test_tail_exponent_is_the_best_of_all_candidates(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for sigma in (rng.lognormal(size=n), rng.uniform(1, 2, n), rng.pareto(1.5, n) + 1):
        sigma = np.sort(sigma)[::-1].copy()
        assert tail_exponent(sigma) == pytest.approx(_tail_by_brute_force(sigma), rel=1e-9)


def test_tail_exponent_recovers_a_power_law() -> None:
    alpha = 2.7
    u = np.random.default_rng(5).uniform(size=4000)
    sigma = np.sort(np.sqrt(u ** (-1 / (alpha - 1))))[::-1].copy()
    assert tail_exponent(sigma) == pytest.approx(alpha, abs=0.15)


def test_tail_exponent_of_nothing_to_fit() -> None:
    for values in ([], [1.0], [2.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0]):
        assert np.isnan(tail_exponent(np.array(values)))
    assert np.isfinite(tail_exponent(np.array([3.0, 3.0, 1.0, 1.0])))


# Real weights


@pytest.mark.assets
@pytest.mark.parametrize(
    ("file", "names", "full", "energy"),
    [
        ("minilm_l6", "encoder.layer.{}.attention.self.{}.weight key value", 384, 0.446),
        ("smollm2_135m_kv_q4dequant", "blk.{}.attn_{}.weight k v", 384, 0.448),
    ],
)
def test_real_joint_spectra(assets: Path, file: str, names: str, full: int, energy: float) -> None:
    from safetensors import safe_open

    path = next((assets / "weights").glob(f"{file}*.safetensors"))
    pattern, first, second = names.split()
    found: list[float] = []
    with safe_open(path, framework="numpy") as weights:
        keys = set(weights.keys())
        layer = 0
        while pattern.format(layer, first) in keys:
            both = [pattern.format(layer, x) for x in (first, second)]
            blocks = [weights.get_tensor(name).astype(np.float32) for name in both]
            sigma, _ = singular_values(blocks)
            want = scipy.linalg.svdvals(np.concatenate(blocks).astype(np.float64))
            assert _within_contract(sigma, want)
            assert all(effective_rank(sigma, t) == effective_rank(want, t) for t in DEFAULT_TAUS)
            found.append(measures(sigma, full)["energy_at_n/8"])
            layer += 1
    assert np.median(found) == pytest.approx(energy, abs=1e-3)
