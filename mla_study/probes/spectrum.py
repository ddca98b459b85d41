"""Singular spectra of weight matrices, and the numbers that summarise one.

m rows (outputs), n columns (inputs), r latent rank, k a rank to cut at. Arithmetic is float64.

The spectrum of a stack of blocks comes from the Gram matrix on its smaller side, accumulated in
panels; the Gram squares the condition, so a spectrum that reaches below ``TAIL_RATIO`` of its
top is computed again by ``svdvals``. Factored operators never form the product.

Run with one BLAS thread a process: more threads lose on a machine that does anything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64

from mla_study.probes.eigenvalues import symmetric_eigenvalues

Method = Literal["gram", "svdvals", "factors"]

DEFAULT_KS: tuple[int, ...] = (64, 128, 192, 256, 512)
DEFAULT_TAUS: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99, 0.999)

TAIL_RATIO = 1e-4
"""Below this sigma_n / sigma_1 the Gram's tail is not trusted and ``svdvals`` takes over."""

_dsyrk, _daxpy = scipy.linalg.get_blas_funcs(("syrk", "axpy"), dtype=np.float64)
_PANEL_ROWS = 512
_TIE = 1e-12
_EPS = float(np.finfo(np.float64).eps)


def gram(
    panels: Iterable[Float[np.ndarray, "_ n"]],
    n: int,
    row_scale: Float[np.ndarray, " m"] | None = None,
    into: Float64[np.ndarray, "n n"] | None = None,
) -> Float64[np.ndarray, "n n"]:
    """W^T diag(row_scale)^2 W for the matrix W [m, n] whose rows arrive in panels.

    Args:
        panels: row blocks [rows, n], float32 or float64, in row order; each is converted to float64
            a few hundred rows at a time, so W is never held in float64.
        n: number of columns.
        row_scale: one factor a row of W [m], such as the gains of a norm that follows; None is 1.
        into: a Gram of the same kind to add to, in place (then it is also what is returned).

    Returns:
        float64 [n, n], Fortran order, of which only the lower triangle means anything.

    Raises:
        ValueError: a panel is not [rows, n], or row_scale has not m entries.
    """
    total = np.zeros((n, n), order="F") if into is None else into
    if total.shape != (n, n) or not total.flags.f_contiguous:
        raise ValueError(f"the Gram to add to must be [{n}, {n}] in Fortran order")
    start = 0
    for panel in panels:
        if panel.ndim != 2 or panel.shape[1] != n:
            raise ValueError(f"a panel of shape {panel.shape} does not have {n} columns")
        for low in range(0, panel.shape[0], _PANEL_ROWS):
            rows = np.array(panel[low : low + _PANEL_ROWS], dtype=np.float64, order="C")
            if row_scale is not None:
                rows *= _scale_of(row_scale, start + low, rows.shape[0])[:, None]
            total = _dsyrk(1.0, rows.T, beta=1.0, c=total, lower=1, overwrite_c=1)
        start += panel.shape[0]
    if row_scale is not None and start != row_scale.shape[0]:
        raise ValueError(f"row_scale has {row_scale.shape[0]} entries for {start} rows")
    return total


def _scale_of(row_scale: np.ndarray, start: int, count: int) -> np.ndarray:
    scale = np.asarray(row_scale[start : start + count], dtype=np.float64)
    if scale.shape != (count,):
        raise ValueError(f"row_scale has {row_scale.shape[0]} entries, too few for the rows")
    return scale


def combine_grams(
    first: Float64[np.ndarray, "n n"],
    second: Float64[np.ndarray, "n n"],
    first_weight: float = 1.0,
    second_weight: float = 1.0,
) -> Float64[np.ndarray, "n n"]:
    """first_weight * first + second_weight * second, in one new array in Fortran order.

    Both are Grams as :func:`gram` returns them; no temporary of their size is made.
    """
    total = np.multiply(first, first_weight, order="F")
    _daxpy(second.ravel(order="K"), total.ravel(order="K"), a=second_weight)
    return total


def gram_singular_values(
    gram_matrix: Float64[np.ndarray, "n n"], count: int, overwrite: bool = False
) -> Float64[np.ndarray, " count"]:
    """The largest ``count`` singular values of W from W^T W.

    Args:
        gram_matrix: float64 [n, n], lower triangle read, Fortran order saves a copy.
        count: how many to return, min(m, n) for the whole spectrum.
        overwrite: let the eigenvalue solver destroy the Gram (saves n^2 float64).

    Returns:
        sigma, descending, not negative. Accurate to about 1e-15 sigma_1^2 / sigma: ask
        :func:`needs_svd` whether that is good enough.

    Raises:
        ValueError: NaN or Inf in the Gram (so also: in W, or W beyond 1e154).
    """
    if not np.isfinite(gram_matrix.diagonal()).all():
        raise ValueError("the Gram matrix is not finite: W holds NaN, Inf or values beyond 1e154")
    eigenvalues = symmetric_eigenvalues(gram_matrix, overwrite)[::-1][:count]
    return np.sqrt(np.maximum(eigenvalues, 0.0))


def needs_svd(sigma: Float64[np.ndarray, " k"], tail_ratio: float = TAIL_RATIO) -> bool:
    """Whether a spectrum from a Gram reaches below tail_ratio of its top, where the error shows."""
    return bool(sigma.size and sigma[0] > 0 and sigma[-1] < tail_ratio * sigma[0])


def singular_values(
    blocks: Sequence[Float[np.ndarray, "_ n"]],
    row_scale: Float[np.ndarray, " m"] | None = None,
    exact_tail: bool = False,
    tail_ratio: float = TAIL_RATIO,
) -> tuple[Float64[np.ndarray, " k"], Method]:
    """Singular values of the row stack W [m, n] of the blocks.

    Args:
        blocks: row blocks [rows, n], float32 or float64, at least one, of equal width.
        row_scale: one factor a row of W [m]; None is 1.
        exact_tail: take ``svdvals`` for all values, as a condition number wants.
        tail_ratio: where the Gram's tail is not trusted; it has an error of about
            1e-15 / tail_ratio^2 there, relative to the value.

    Returns:
        sigma float64 [min(m, n)], descending, and the method: "gram" (eigenvalues of the smaller
        Gram) or "svdvals" (asked for, or sigma_n / sigma_1 < tail_ratio).

    Raises:
        ValueError: no rows or columns, blocks of unequal width, NaN or Inf in W.
    """
    n = blocks[0].shape[1] if blocks and blocks[0].ndim == 2 else 0
    m = sum(block.shape[0] for block in blocks)
    if m == 0 or n == 0:
        raise ValueError("a matrix without rows or columns has no singular values")
    if not exact_tail:
        if m >= n:
            square = gram(blocks, n, row_scale)
        else:
            square = _dsyrk(1.0, _stack(blocks, row_scale).T, trans=1, lower=1)
        diagonal = square.diagonal()
        # Squares that left float64's range say nothing about W itself.
        if np.isfinite(diagonal).all() and (1e-250 < diagonal.max() < 1e250):
            sigma = gram_singular_values(square, min(m, n), overwrite=True)
            if not needs_svd(sigma, tail_ratio):
                return sigma, "gram"
        del square
    tall = _stack(blocks, row_scale)
    tall = tall.T if m < n else tall
    if not all(np.isfinite(column).all() for column in tall.T):
        raise ValueError("the matrix holds NaN or Inf")
    return _svdvals(tall), "svdvals"


def _stack(blocks: Sequence[np.ndarray], row_scale: np.ndarray | None) -> np.ndarray:
    n = blocks[0].shape[1]
    if any(block.ndim != 2 or block.shape[1] != n for block in blocks):
        raise ValueError(f"blocks of shapes {[b.shape for b in blocks]} do not share their columns")
    m = sum(block.shape[0] for block in blocks)
    # The order that the solvers can destroy in place, tall or transposed to be so.
    out = np.empty((m, n), order="F" if m >= n else "C")
    np.concatenate(list(blocks), axis=0, out=out)
    if row_scale is not None:
        if row_scale.shape != (m,):
            raise ValueError(f"row_scale has {row_scale.shape[0]} entries for {m} rows")
        out *= np.asarray(row_scale, dtype=np.float64)[:, None]
    return out


def _triangle(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(np.asarray(matrix, dtype=np.float64), mode="r"))


def _svdvals(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(scipy.linalg.svdvals(matrix, overwrite_a=True, check_finite=False))


def factored_singular_values(
    up: Float[np.ndarray, "m r"], down: Float[np.ndarray, "r n"]
) -> Float64[np.ndarray, " k"]:
    """Singular values of up @ down, from svdvals(R_up R_down^T) of the two QR factors.

    The product [m, n] is never formed: its Gram would lose everything below 1e-8 sigma_1.

    Args:
        up: [m, r], float32 or float64. A gain between the factors belongs into either of them.
        down: [r, n].

    Returns:
        sigma float64 [min(m, n, r)], descending (method "factors").

    Raises:
        ValueError: inner sizes differ, a size is 0, or NaN or Inf.
    """
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"factors of shapes {up.shape} and {down.shape} do not compose")
    if 0 in (*up.shape, *down.shape):
        raise ValueError("a factor without rows or columns has no singular values")
    core = _triangle(up) @ _triangle(down.T).T
    if not np.isfinite(core).all():
        raise ValueError("a factor holds NaN, Inf or values beyond the range of float64")
    return _svdvals(core)


def energy_curve(sigma: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """E(k) = sum_{i<=k} sigma_i^2 / sum_i sigma_i^2 at k = 1..n; all NaN for a zero matrix."""
    square = _relative_squares(sigma)
    cumulative = np.cumsum(square)
    return cumulative / cumulative[-1] if cumulative[-1] > 0 else np.full(sigma.size, np.nan)


def _relative_squares(sigma: np.ndarray) -> np.ndarray:
    top = sigma[0] if sigma.size else 0.0
    return np.square(sigma / top) if top > 0 else np.zeros(sigma.size)


def _rank_on_curve(curve: np.ndarray, tau: float) -> int:
    return min(int(np.searchsorted(curve, tau - _TIE)) + 1, curve.size)


def effective_rank(sigma: Float64[np.ndarray, " n"], tau: float) -> int:
    """r_tau, the smallest k with E(k) >= tau; 0 for a zero matrix.

    An E(k) within 1e-12 below tau counts as reached, so that an orthogonal matrix has one answer.
    """
    curve = energy_curve(sigma)
    return 0 if np.isnan(curve[-1]) else _rank_on_curve(curve, tau)


def effective_rank_interpolated(sigma: Float64[np.ndarray, " n"], tau: float) -> float:
    """k - 1 + (tau - E(k-1)) / (E(k) - E(k-1)) at k = r_tau; NaN for a zero matrix."""
    curve = energy_curve(sigma)
    return float("nan") if np.isnan(curve[-1]) else _interpolated_rank(curve, tau)


def _interpolated_rank(curve: np.ndarray, tau: float) -> float:
    k = _rank_on_curve(curve, tau)
    before = float(curve[k - 2]) if k > 1 else 0.0
    step = float(curve[k - 1]) - before
    part = (tau - before) / step if step > 0 else 1.0
    return k - 1 + min(max(part, 0.0), 1.0)


def energy_at(curve: Float64[np.ndarray, " n"], k: float) -> float:
    """E(k) read off an energy curve, linear between integers; E(0) = 0 and E = 1 past the end."""
    if np.isnan(curve[-1]):
        return float("nan")
    if k >= curve.size:
        return 1.0
    low = int(np.floor(k))
    before = float(curve[low - 1]) if low > 0 else 0.0
    return before + (k - low) * (float(curve[low]) - before)


def stable_rank(sigma: Float64[np.ndarray, " n"]) -> float:
    """||W||_F^2 / ||W||_2^2; NaN for a zero matrix."""
    total = float(_relative_squares(sigma).sum())
    return total if total > 0 else float("nan")


def entropy_rank(sigma: Float64[np.ndarray, " n"]) -> float:
    """exp of the Shannon entropy of p_i = sigma_i^2 / sum sigma^2; NaN for a zero matrix."""
    square = _relative_squares(sigma)
    square = square[square > 0]
    if square.size == 0:
        return float("nan")
    p = square / square.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def participation_ratio(sigma: Float64[np.ndarray, " n"]) -> float:
    """(sum sigma^2)^2 / sum sigma^4; NaN for a zero matrix."""
    square = _relative_squares(sigma)
    return float(square.sum() ** 2 / np.square(square).sum()) if square.sum() > 0 else float("nan")


def condition(sigma: Float64[np.ndarray, " n"], full_rank: int | None = None) -> float:
    """sigma_1 / sigma_n; inf where sigma_n drowns in rounding, NaN for a zero matrix.

    Rounding means eps max(len(sigma), full_rank) sigma_1, numpy's tolerance for a matrix rank.
    """
    if sigma.size == 0 or not sigma[0] > 0:
        return float("nan")
    floor = _EPS * max(sigma.size, full_rank or 0) * sigma[0]
    return float(sigma[0] / sigma[-1]) if sigma[-1] > floor else float("inf")


def tail_exponent(sigma: Float64[np.ndarray, " n"]) -> float:
    """alpha of the power law p(x) ~ x^-alpha fitted to the upper tail of x = sigma^2.

    Maximum likelihood above each candidate x_min; the one with the smallest Kolmogorov-Smirnov
    distance wins (Clauset, Shalizi and Newman 2009, eqs. 3.1 and 3.9). NaN where fewer than 3
    values are positive, or all are equal.
    """
    kept = sigma[sigma > _EPS * sigma.size * sigma[0]] if sigma.size else sigma
    n = kept.size
    if n < 3 or kept[0] == kept[-1]:
        return float("nan")
    height = 2.0 * np.log(kept / kept[-1])
    # Candidate i has x_min = x[last[i]]; the tail is x[0..last].
    last = np.arange(1, n)
    excess = np.cumsum(height)[1:] - (last + 1) * height[1:]
    rate = np.divide(last + 1, excess, out=np.full(n - 1, np.nan), where=excess > 0)

    # The distance seen at every 16th point bounds the true one from below, so only candidates whose
    # bound beats the best distance so far are worth a full evaluation.
    seen = np.arange(0, n, 16)
    above = np.maximum(height[seen][None, :] - height[1:, None], 0.0)
    gap = np.abs(np.exp(-rate[:, None] * above) - (seen + 0.5)[None, :] / (last + 1)[:, None])
    gap[seen[None, :] > last[:, None]] = 0.0
    bound = gap.max(axis=1) + 0.5 / (last + 1)
    best, alpha = np.inf, float("nan")
    for i in np.argsort(bound, kind="stable"):
        if not bound[i] < best:
            break
        count = int(last[i]) + 1
        survival = np.exp(-rate[i] * (height[:count] - height[count - 1]))
        # The empirical curve is a staircase: half a step more covers both of its sides.
        steps = (np.arange(count) + 0.5) / count
        distance = float(np.abs(survival - steps).max()) + 0.5 / count
        if distance < best:
            best, alpha = distance, 1.0 + float(rate[i])
    return alpha


def metric_names(
    ks: Sequence[int] = DEFAULT_KS, taus: Sequence[float] = DEFAULT_TAUS
) -> tuple[str, ...]:
    """Names of what :func:`measures` returns, in its order."""
    ranks = [name for tau in taus for name in (f"r_{tau:g}", f"r_{tau:g}_interp")]
    energies = [f"energy_at_{k}" for k in ks]
    whole = "stable_rank entropy_rank participation_ratio spectral_norm condition tail_exponent"
    return (*ranks, *energies, "energy_at_n/8", *whole.split())


METRICS: tuple[str, ...] = metric_names()


def measures(
    sigma: Float64[np.ndarray, " k"],
    full_rank: int,
    ks: Sequence[int] = DEFAULT_KS,
    taus: Sequence[float] = DEFAULT_TAUS,
) -> dict[str, float]:
    """Every measure of one spectrum.

    Args:
        sigma: descending singular values.
        full_rank: min(m, n) of the operator, n of ``energy_at_n/8``: the energy curve at
            k = full_rank / 8, linear between integers. A product of smaller rank has fewer sigma.
        ks, taus: where the energy curve is read, and the energies whose ranks are wanted.

    Returns:
        metric name -> value, keys in the order of :func:`metric_names`. A zero matrix has NaN
        everywhere but in spectral_norm, which is 0.

    Raises:
        ValueError: sigma is empty or not finite.
    """
    if sigma.size == 0 or not np.isfinite(sigma).all():
        raise ValueError("measures need a finite, non-empty spectrum")
    curve = energy_curve(sigma)
    zero = bool(np.isnan(curve[-1]))
    values: list[float] = []
    for tau in taus:
        values += [
            float("nan") if zero else float(_rank_on_curve(curve, tau)),
            float("nan") if zero else _interpolated_rank(curve, tau),
        ]
    values += [energy_at(curve, k) for k in ks]
    values += [
        energy_at(curve, full_rank / 8),
        stable_rank(sigma),
        entropy_rank(sigma),
        participation_ratio(sigma),
        float(sigma[0]),
        condition(sigma, full_rank),
        tail_exponent(sigma),
    ]
    return dict(zip(metric_names(ks, taus), values, strict=True))
