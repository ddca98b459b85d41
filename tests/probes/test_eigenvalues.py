"""Both eigenvalue routes against numpy, at sizes around the band width of the two-stage one."""

from __future__ import annotations

import numpy as np
import pytest

from mla_study.probes import eigenvalues
from mla_study.probes.eigenvalues import symmetric_eigenvalues, two_stage_solver


def _symmetric(n: int, seed: int) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((n, n))
    return np.asfortranarray(a + a.T)


@pytest.mark.parametrize("n", [1, 2, 7, 33, 129, 258])
@pytest.mark.parametrize("threshold", [1, 10**9])
@pytest.mark.parametrize("overwrite", [False, True])
def test_eigenvalues_match_numpy_on_both_routes(
    n: int, threshold: int, overwrite: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenvalues, "TWO_STAGE_FROM", threshold)
    full = _symmetric(n, seed)
    want = np.linalg.eigvalsh(full)
    lower = np.tril(full).copy(order="F")
    kept = lower.copy()
    got = symmetric_eigenvalues(lower, overwrite)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())
    if not overwrite:
        np.testing.assert_array_equal(lower, kept)


def test_a_row_major_matrix_is_copied_not_misread(seed: int) -> None:
    full = _symmetric(40, seed)
    lower = np.ascontiguousarray(np.tril(full))
    solve = two_stage_solver()
    for route in (symmetric_eigenvalues, solve) if solve else (symmetric_eigenvalues,):
        np.testing.assert_allclose(route(lower, False), np.linalg.eigvalsh(full), atol=1e-12)


def test_without_the_two_stage_routine_the_plain_one_serves(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenvalues, "TWO_STAGE_FROM", 1)
    monkeypatch.setattr(eigenvalues, "two_stage_solver", lambda: None)
    full = _symmetric(21, seed)
    np.testing.assert_allclose(
        symmetric_eigenvalues(full), np.linalg.eigvalsh(full), rtol=0, atol=1e-12
    )


def test_libraries_without_the_symbol_give_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigenvalues, "_SYMBOLS", (("no_such_symbol", int),))
    two_stage_solver.cache_clear()
    try:
        assert two_stage_solver() is None
    finally:
        two_stage_solver.cache_clear()
