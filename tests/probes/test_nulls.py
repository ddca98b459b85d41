"""Null models against direct sampling, closed forms and the numbers of the literature."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.linalg

from mla_study.probes.nulls import (
    _gaussian,
    gaussian_null,
    gaussian_product_null,
    marchenko_pastur,
    truncated_null,
    weighted_gaussian_null,
    weighted_gaussian_product_null,
)
from mla_study.probes.spectrum import METRICS, measures

TINY = [(1, 1), (1, 7), (7, 1), (2, 3), (3, 2), (3, 3)]


# The spread of `energy_at_2` has a relative error of 2 sqrt(1 / DRAWS + 1 / MATRICES): kurtosis 17.
DRAWS = 2500
MATRICES = 10_000


def _agrees_with(matrices: np.ndarray, null: dict[str, tuple[float, float]]) -> None:
    """Mean and spread of the smooth measures of a null against those of matrices [many, m, n]."""
    square = np.linalg.svd(matrices, compute_uv=False) ** 2
    p = square / square.sum(axis=1, keepdims=True)
    direct = {
        "energy_at_1": p[:, 0],
        "energy_at_2": p[:, :2].sum(axis=1),
        "stable_rank": 1 / p[:, 0],
        "spectral_norm": np.sqrt(p[:, 0]),
        "participation_ratio": 1 / np.square(p).sum(axis=1),
        "entropy_rank": np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)),
    }
    for metric, values in direct.items():
        value, se = null[metric]
        mean, sd = values.mean(), values.std()
        assert abs(value - mean) < 6 * sd * np.sqrt(1 / DRAWS + 1 / values.size) + 1e-12, metric
        assert se == pytest.approx(sd, rel=0.3, abs=1e-12), metric


@pytest.mark.parametrize(("m", "n"), [(2, 2), (5, 3), (3, 5), (8, 8)])
def test_bidiagonal_sampling_is_that_of_gaussian_matrices(m: int, n: int, seed: int) -> None:
    matrices = np.random.default_rng(seed).standard_normal((MATRICES, m, n))
    _agrees_with(matrices, gaussian_null(m, n, seed % 2**31, DRAWS, ks=(1, 2)))


@pytest.mark.parametrize(("m", "r", "n"), [(6, 3, 4), (2, 4, 5), (5, 4, 2)])
@pytest.mark.parametrize("gained", [False, True])
def test_triangular_sampling_is_that_of_products(
    m: int, r: int, n: int, gained: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    gain = np.linspace(0.5, 2.0, r) if gained else None
    up = rng.standard_normal((MATRICES, m, r)) * (1 if gain is None else gain)
    matrices = up @ rng.standard_normal((MATRICES, r, n))
    _agrees_with(matrices, gaussian_product_null(m, r, n, seed % 2**31, DRAWS, gain, ks=(1, 2)))


@pytest.mark.parametrize("m", [3, 9])
def test_weighted_sampling_is_that_of_weighted_matrices(m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    eigenvalues = np.array([0.1, 4.0, 1.0, 0.5, 2.0])
    basis = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    matrices = rng.standard_normal((MATRICES, m, 5)) @ (basis * np.sqrt(eigenvalues) @ basis.T)
    null = weighted_gaussian_null(m, eigenvalues, seed % 2**31, DRAWS, ks=(1, 2))
    _agrees_with(matrices, null)


@pytest.mark.parametrize(("m", "r", "n"), [(6, 3, 4), (2, 4, 5), (5, 4, 2)])
def test_weighted_products_are_those_of_real_inputs(m: int, r: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    eigenvalues = rng.uniform(0.1, 4, n)
    matrices = rng.standard_normal((MATRICES, m, r)) @ rng.standard_normal((MATRICES, r, n))
    null = weighted_gaussian_product_null(m, r, eigenvalues, seed % 2**31, DRAWS, ks=(1, 2))
    _agrees_with(matrices * np.sqrt(eigenvalues), null)


def test_directions_without_input_are_zeros_of_the_weighted_nulls() -> None:
    eigenvalues = np.array([3.0, 2.0, 1.0, 1e-18, 0.0, -1e-17])
    few = np.array([3.0, 2.0, 1.0])
    for null, same in (
        (weighted_gaussian_null(20, eigenvalues), weighted_gaussian_null(20, few)),
        (
            weighted_gaussian_product_null(20, 5, eigenvalues),
            weighted_gaussian_product_null(20, 5, few),
        ),
    ):
        assert null["energy_at_64"] == (1.0, 0.0)
        assert null["r_0.999"][0] <= 3
        assert np.isnan(null["condition"]).all()
        assert abs(null["stable_rank"][0] - same["stable_rank"][0]) < 4 * same["stable_rank"][1]
    assert weighted_gaussian_null(2, eigenvalues)["condition"][0] > 1


@pytest.mark.parametrize(
    ("m", "n", "ranks", "energy"),
    [(3072, 1536, (1020, 1194, 1424), 0.292), (1536, 1536, (783, 936, 1184), 0.376)],
)
def test_known_ranks_of_gaussian_matrices(
    m: int, n: int, ranks: tuple[int, ...], energy: float
) -> None:
    _gaussian.cache_clear()
    before = time.process_time()
    null = gaussian_null(m, n)
    spent = time.process_time() - before
    for tau, rank in zip(("0.9", "0.95", "0.99"), ranks, strict=True):
        value, se = null[f"r_{tau}"]
        assert value == pytest.approx(rank, abs=1)
        assert 0.28 < se < 1.5
    assert null["energy_at_192"][0] == pytest.approx(energy, abs=5e-4)
    assert null["energy_at_n/8"] == null["energy_at_192"]
    assert spent < 5, "a null that costs more than a layer is no use"


@pytest.mark.parametrize(
    ("r", "rank", "ratio"),
    [(64, 63, 0.62), (128, 126, 0.48), (192, 187, 0.405), (256, 248, 0.35), (512, 481, 0.20)],
)
def test_known_ranks_of_gaussian_products(r: int, rank: int, ratio: float) -> None:
    null = gaussian_product_null(2688, r, 1536, draws=4)
    assert null["r_0.99"][0] == pytest.approx(rank, abs=0.6)
    assert 1 / null["condition"][0] == pytest.approx(ratio, abs=0.012)


def test_known_soft_ranks_of_the_random_product() -> None:
    null = gaussian_product_null(2688, 192, 1536)
    assert null["entropy_rank"][0] == pytest.approx(174, abs=0.6)
    assert null["participation_ratio"][0] == pytest.approx(160, abs=0.6)
    assert null["stable_rank"][0] == pytest.approx(92, abs=2.5)


@pytest.mark.parametrize(("m", "n"), [(3072, 1536), (1536, 1536), (700, 999), (2000, 300)])
def test_sampling_meets_marchenko_and_pastur(m: int, n: int) -> None:
    null, limit = gaussian_null(m, n, draws=4), marchenko_pastur(m, n)
    assert tuple(limit) == METRICS
    for metric, value in limit.items():
        got = null[metric][0]
        if metric.startswith("r_"):
            assert got == pytest.approx(value, abs=1.5), metric
        elif metric.startswith("energy") or metric in ("entropy_rank", "participation_ratio"):
            assert got == pytest.approx(value, rel=3e-3), metric
        elif metric in ("stable_rank", "spectral_norm") or (metric == "condition" and m != n):
            assert got == pytest.approx(value, rel=0.06), metric


def test_marchenko_pastur_closed_forms_match_quadrature() -> None:
    m, n = 900, 400
    c = n / m
    low, high = (1 - np.sqrt(c)) ** 2, (1 + np.sqrt(c)) ** 2
    x = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, 200_001))) / 2
    density = np.sqrt(np.maximum((high - x) * (x - low), 0)) / (2 * np.pi * c * x)
    step = np.diff(x)
    mass = np.concatenate([[0], np.cumsum(step * (density[1:] + density[:-1]) / 2)])
    energy = x * density
    spent = np.concatenate([[0], np.cumsum(step * (energy[1:] + energy[:-1]) / 2)])
    limit = marchenko_pastur(m, n, ks=(64,), taus=(0.3, 0.99))
    assert mass[-1] == pytest.approx(1, abs=1e-6)
    for tau in (0.3, 0.99):
        rank = n * (1 - np.interp(1 - tau, spent, mass))
        assert limit[f"r_{tau:g}"] == pytest.approx(rank, abs=1e-3)
    assert limit["energy_at_64"] == pytest.approx(1 - np.interp(1 - 64 / n, mass, spent), abs=1e-6)
    entropy = -np.trapezoid(energy * np.log(np.maximum(x, 1e-300)), x)
    assert limit["entropy_rank"] == pytest.approx(n * np.exp(entropy), rel=1e-6)


@pytest.mark.parametrize("shape", [(700, 350), (120, 120), (61, 203)])
def test_a_fresh_gaussian_matrix_is_not_remarkable(shape: tuple[int, int], seed: int) -> None:
    m, n = shape
    sigma = scipy.linalg.svdvals(np.random.default_rng(seed).standard_normal(shape))
    null = gaussian_null(m, n)
    scores = []
    for metric, value in measures(sigma / np.linalg.norm(sigma), min(m, n)).items():
        mean, se = null[metric]
        if se == 0:
            assert value == pytest.approx(mean, abs=1e-12)
        elif metric not in ("condition", "tail_exponent"):  # heavy tails
            scores.append((value - mean) / se)
    assert np.abs(scores).max() < 7
    assert np.sqrt(np.mean(np.square(scores))) < 4


def test_a_fresh_product_is_not_remarkable_but_a_matrix_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    null = gaussian_product_null(200, 24, 150)

    def score(w: np.ndarray, metric: str) -> float:
        sigma = scipy.linalg.svdvals(w)[:24]
        value = measures(sigma / np.linalg.norm(sigma), 150)[metric]
        return (value - null[metric][0]) / null[metric][1]

    product = rng.standard_normal((200, 24)) @ rng.standard_normal((24, 150))
    decaying = np.diag(np.geomspace(1, 0.01, 24))
    assert abs(score(product, "entropy_rank")) < 7
    assert score(decaying, "entropy_rank") < -20


def test_nulls_depend_on_shape_seed_and_draws_only() -> None:
    first = gaussian_null(40, 30, seed=3)
    assert first == gaussian_null(40, 30, seed=3)
    first["r_0.5"] = (0.0, 0.0)
    assert gaussian_null(40, 30, seed=3)["r_0.5"] != (0.0, 0.0)
    _gaussian.cache_clear()
    again = gaussian_null(40, 30, seed=3)
    assert all(again[k] == first[k] for k in first if k != "r_0.5")
    assert again != gaussian_null(40, 30, seed=4)
    assert again != gaussian_null(40, 30, seed=3, draws=5)
    transposed = gaussian_null(30, 40, seed=3, draws=200)
    assert transposed["entropy_rank"][0] == pytest.approx(again["entropy_rank"][0], rel=0.02)


def test_equal_gains_and_equal_variances_change_nothing() -> None:
    plain = gaussian_product_null(20, 6, 15, draws=8)
    scaled = gaussian_product_null(20, 6, 15, draws=8, gain=np.full(6, 4.0))
    for metric, (value, se) in plain.items():
        assert scaled[metric] == pytest.approx((value, se), rel=1e-9), metric
    uneven = gaussian_product_null(20, 6, 15, draws=8, gain=np.array([9.0, 1, 1, 1, 1, 1]))
    assert uneven["entropy_rank"][0] < plain["entropy_rank"][0] - 1
    white = weighted_gaussian_null(60, np.full(25, 3.0), draws=200)
    iid = gaussian_null(60, 25, draws=200)
    assert white["entropy_rank"][0] == pytest.approx(iid["entropy_rank"][0], rel=0.01)


@pytest.mark.parametrize(("m", "n"), TINY)
def test_tiny_shapes(m: int, n: int, recwarn: pytest.WarningsRecorder) -> None:
    for null in (
        gaussian_null(m, n),
        gaussian_product_null(m, 1, n),
        gaussian_product_null(m, 5, n),
        weighted_gaussian_null(m, np.arange(1.0, n + 1)),
        weighted_gaussian_product_null(m, 3, np.arange(1.0, n + 1)),
    ):
        assert tuple(null) == METRICS
        assert all(null[f"r_{tau}"][1] > 0.28 for tau in ("0.5", "0.99"))
        for metric, (value, se) in null.items():
            if metric != "tail_exponent":
                assert np.isfinite([value, se]).all(), metric
                assert se >= 0
    limit = marchenko_pastur(m, n)
    assert not np.isnan([v for k, v in limit.items() if k != "tail_exponent"]).any()
    # what earlier tests left open is closed whenever the collector runs
    assert not [w.message for w in recwarn.list if w.category is not ResourceWarning]


def test_many_small_shapes_are_cheap() -> None:
    before = time.process_time()
    for n in range(40, 60):
        gaussian_null(2 * n, n, seed=77)
    assert time.process_time() - before < 5


def test_truncated_source_keeps_its_scale() -> None:
    sigma = np.geomspace(9.0, 0.1, 50)
    null = truncated_null(sigma, 20, 100)
    assert null == {k: (v, 0.0) for k, v in measures(sigma[:20], 100).items()}
    assert null["spectral_norm"] == (9.0, 0.0)
    assert null["energy_at_64"] == (1.0, 0.0)
    beyond = truncated_null(sigma, 99, 100)
    assert beyond["condition"][0] == pytest.approx(90)


def test_nulls_refuse_what_has_no_meaning() -> None:
    for m, n in ((0, 3), (3, 0), (-1, 3)):
        with pytest.raises(ValueError, match="no spectrum"):
            gaussian_null(m, n)
        with pytest.raises(ValueError, match="no spectrum"):
            marchenko_pastur(m, n)
    with pytest.raises(ValueError, match="2 draws"):
        gaussian_null(3, 3, draws=1)
    with pytest.raises(ValueError, match="no spectrum"):
        gaussian_product_null(3, 0, 3)
    with pytest.raises(ValueError, match="gain"):
        gaussian_product_null(3, 2, 3, gain=np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="covariance"):
        weighted_gaussian_null(3, np.zeros(4))
    with pytest.raises(ValueError, match="covariance"):
        weighted_gaussian_product_null(3, 2, np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="at least one"):
        truncated_null(np.ones(3), 0, 3)
