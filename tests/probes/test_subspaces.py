"""Row spaces and angles against scipy and closed forms; the overlap's null by direct sampling."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from jaxtyping import TypeCheckError

from mla_study.probes.subspaces import (
    factored_row_space,
    overlap,
    overlap_null,
    principal_angles,
    row_space,
)

REFUSED = (ValueError, TypeCheckError)


def _basis(rng: np.random.Generator, d: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, k)))[0]


def _leading(w: np.ndarray, k: int) -> np.ndarray:
    return np.linalg.svd(w, full_matrices=False)[2][:k].T


@pytest.mark.parametrize(("m", "n", "k"), [(50, 23, 7), (23, 50, 7), (31, 31, 31), (1, 9, 1)])
def test_row_space_is_that_of_the_leading_singular_vectors(
    m: int, n: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((m, min(m, n))) * np.geomspace(1, 0.1, min(m, n))
    w = (w @ _basis(rng, n, min(m, n)).T).astype(np.float32)
    scale = rng.uniform(0.5, 2, m)
    for gains in (None, scale):
        got = row_space([w[: m // 2], w[m // 2 :]], k, gains)
        dense = w.astype(np.float64) * (1 if gains is None else gains[:, None])
        want = _leading(dense, k)
        assert got.shape == (n, k)
        np.testing.assert_allclose(got.T @ got, np.eye(k), atol=1e-12)
        np.testing.assert_allclose(got @ got.T, want @ want.T, atol=1e-7)
        aligned = np.abs(np.sum(got[:, 0] * want[:, 0]))
        assert aligned == pytest.approx(1, abs=1e-6)


def test_row_space_of_an_ill_conditioned_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    right = _basis(rng, 30, 30)
    w = _basis(rng, 60, 30) * np.geomspace(1, 1e-10, 30) @ right.T
    got = row_space([w], 29)
    np.testing.assert_allclose(got @ got.T, right[:, :29] @ right[:, :29].T, atol=1e-4)


@pytest.mark.parametrize(("m", "r", "n", "k"), [(40, 6, 25, 6), (40, 6, 25, 2), (4, 9, 25, 4)])
def test_factored_row_space(m: int, r: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((m, r)), rng.standard_normal((r, n)).astype(np.float32)
    got = factored_row_space(up, down, k)
    want = _leading(up @ down, k)
    np.testing.assert_allclose(got @ got.T, want @ want.T, atol=1e-8)


def test_row_spaces_refuse_what_is_not_determined() -> None:
    rng = np.random.default_rng(0)
    low = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 10))
    assert row_space([low], 3).shape == (10, 3)
    for w in (low, low.T, np.zeros((20, 10))):
        with pytest.raises(ValueError, match="rank below"):
            row_space([w], 4)
    for k in (0, 11):
        with pytest.raises(ValueError, match="does not fit"):
            row_space([low], k)
    for w in (np.full((5, 3), np.nan), np.full((3, 5), np.inf)):
        with pytest.raises(ValueError, match="NaN or Inf"):
            row_space([w], 2)
    with pytest.raises(REFUSED):
        factored_row_space(np.ones((3, 2)), np.ones((3, 4)), 1)
    with pytest.raises(ValueError, match="NaN"):
        factored_row_space(np.full((3, 2), np.nan), np.ones((2, 4)), 1)


@pytest.mark.parametrize(
    ("d", "k", "l"), [(20, 5, 5), (20, 3, 8), (20, 8, 3), (7, 7, 2), (5, 1, 1)]
)
def test_angles_match_scipy(d: int, k: int, l: int, seed: int) -> None:  # noqa: E741
    rng = np.random.default_rng(seed)
    a, b = _basis(rng, d, k), _basis(rng, d, l)
    got = principal_angles(a, b)
    assert got.shape == (min(k, l),)
    assert (np.diff(got) >= -1e-12).all()
    np.testing.assert_allclose(got, scipy.linalg.subspace_angles(a, b)[::-1], atol=1e-10)
    assert overlap(a, b) == pytest.approx(np.square(np.cos(got)).mean())
    np.testing.assert_allclose(principal_angles(b, a), got, atol=1e-10)


@pytest.mark.parametrize("tilt", [0.0, 1e-9, 1e-4, 0.3, np.pi / 4, 1.2, np.pi / 2])
def test_constructed_angles_small_and_large(tilt: float, seed: int) -> None:
    frame = _basis(np.random.default_rng(seed), 11, 4)
    a = frame[:, :2]
    b = np.cos(tilt) * frame[:, :2] + np.sin(tilt) * frame[:, 2:]
    np.testing.assert_allclose(principal_angles(a, b), [tilt, tilt], atol=1e-14, rtol=1e-6)
    assert overlap(a, b) == pytest.approx(np.cos(tilt) ** 2, abs=1e-12)


@pytest.mark.parametrize(("k", "l", "d"), [(3, 3, 12), (2, 5, 9), (1, 1, 2), (6, 6, 7)])
def test_overlap_null_matches_sampling(k: int, l: int, d: int, seed: int) -> None:  # noqa: E741
    rng = np.random.default_rng(seed)
    fixed, draws = np.eye(d)[:, :k], 4000
    values = [overlap(fixed, _basis(rng, d, l)) for _ in range(draws)]
    mean, sd = overlap_null(k, l, d)
    assert np.mean(values) == pytest.approx(mean, abs=6 * sd / np.sqrt(draws))
    assert np.std(values) == pytest.approx(sd, rel=0.12)


def test_overlap_null_at_its_edges() -> None:
    assert overlap_null(192, 192, 1536)[0] == pytest.approx(0.125)
    assert overlap_null(1, 1, 1) == (1.0, 0.0)
    assert overlap_null(5, 3, 5) == (1.0, 0.0)
    for k, l, d in ((0, 1, 3), (1, 4, 3), (4, 1, 3)):  # noqa: E741
        with pytest.raises(ValueError, match="do not fit"):
            overlap_null(k, l, d)


def test_subspaces_of_different_spaces_do_not_compare() -> None:
    for compare in (principal_angles, overlap):
        with pytest.raises(REFUSED):
            compare(np.eye(4)[:, :2], np.eye(5)[:, :2])
