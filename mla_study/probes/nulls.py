"""What random matrices of the same shape would give: null models for the measures of a spectrum.

m rows, n columns, r inner rank of a product; M = max(m, n), N = min(m, n), c = N / M.

A null is a dict metric -> (value, se). ``value`` is the mean over the draws; ``se`` is the standard
deviation of the metric of ONE random matrix, widened by sqrt(1 + 1/draws) for the value's own
error, so that z = (measured - value) / se is of order 1 for one fresh random matrix. Exceptions:
integer metrics have 1/12 added to their variance, for rounding; ``condition`` has the geometric
mean (its mean is infinite for square matrices) and se = value * sd(log); se is 0 where the shape
fixes the metric, and both are NaN where a draw has no such metric.
``spectral_norm`` is that of a matrix of unit Frobenius norm: multiply by ||W||_F to compare.

Everything is determined by the shape, the seed and the number of draws, and cached in the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float64
from scipy.linalg import eigvalsh_tridiagonal

from mla_study.probes.spectrum import (
    DEFAULT_KS,
    DEFAULT_TAUS,
    measures,
    metric_names,
    singular_values,
)

NullModel = dict[str, tuple[float, float]]

_LOOSE_TAIL = 1e-7  # a Gram's value there is good to a percent, far below the spread of draws


def gaussian_null(
    m: int,
    n: int,
    seed: int = 0,
    draws: int | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    taus: Sequence[float] = DEFAULT_TAUS,
) -> NullModel:
    """Measures of an iid Gaussian [m, n] matrix, sampled exactly in O(N^2) a draw.

    The singular values are those of a bidiagonal matrix with chi-distributed entries (Dumitriu and
    Edelman 2002, section III, beta = 1): no m x n matrix is made. 0.7 CPU-s at N = 1536.

    Args:
        m, n: shape; ``energy_at_n/8`` reads at min(m, n) / 8.
        seed: with m and n, all that determines the draws.
        draws: number of samples, at least 2; None: 32, fewer for N > 1024.

    Raises:
        ValueError: m or n below 1, draws below 2.
    """
    _check_sizes(draws, m, n)
    count = _default_draws(min(m, n)) if draws is None else draws
    return dict(_gaussian(m, n, seed, count, tuple(ks), tuple(taus)))


@lru_cache(maxsize=1024)
def _gaussian(
    m: int, n: int, seed: int, draws: int, ks: tuple[int, ...], taus: tuple[float, ...]
) -> NullModel:
    rng = np.random.default_rng(np.random.SeedSequence([seed, m, n]))
    return _sample(lambda: _gaussian_draw(rng, m, n), draws, min(m, n), ks, taus)


@lru_cache(maxsize=1024)
def gaussian_edge(m: int, n: int, k: int, seed: int = 0) -> tuple[float, float]:
    """sigma_k / sigma_1 of an iid Gaussian [m, n]: (value, se) as :func:`gaussian_null` has them.

    Raises:
        ValueError: a size below 1, or k outside 1..min(m, n).
    """
    _check_sizes(None, m, n)
    if not 1 <= k <= min(m, n):
        raise ValueError(f"a matrix of sizes {(m, n)} has no singular value number {k}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, m, n]))
    drawn = [_gaussian_draw(rng, m, n) for _ in range(_default_draws(min(m, n)))]
    ratio = np.array([sigma[k - 1] / sigma[0] for sigma in drawn])
    return float(ratio.mean()), float(ratio.std(ddof=1) * np.sqrt(1 + 1 / ratio.size))


def _gaussian_draw(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    large, small = max(m, n), min(m, n)
    diagonal = np.sqrt(rng.chisquare(large - np.arange(small)))
    above = np.sqrt(rng.chisquare(np.arange(small - 1, 0, -1)))
    return _bidiagonal_singular_values(diagonal, above)


def _bidiagonal_singular_values(diagonal: np.ndarray, above: np.ndarray) -> np.ndarray:
    # B B^T is tridiagonal. Squaring costs eps * condition^2 of the smallest value: 1e-2 only from a
    # condition of 7e6 on, which one in 1000 draws of a square 5120 reaches.
    main = np.square(diagonal)
    main[:-1] += np.square(above)
    eigenvalues = eigvalsh_tridiagonal(
        main, above * diagonal[1:], lapack_driver="sterf", check_finite=False
    )
    return np.sqrt(np.maximum(eigenvalues[::-1], 0.0))


def marchenko_pastur(
    m: int,
    n: int,
    ks: Sequence[int] = DEFAULT_KS,
    taus: Sequence[float] = DEFAULT_TAUS,
) -> dict[str, float]:
    """The large-size limit of :func:`gaussian_null`, in closed form (Marchenko and Pastur 1967).

    With lambda = 1 + c + 2 sqrt(c) cos(phi), the share of energy above phi is
    (phi - sin phi cos phi) / pi and the share of values an elementary function. Ranks are not
    rounded; ``condition`` is inf for square shapes; there is no tail exponent (NaN).

    Returns:
        metric -> value, keys as in :func:`~mla_study.probes.spectrum.metric_names`.

    Raises:
        ValueError: m or n below 1.
    """
    _check_sizes(None, m, n)
    small = min(m, n)
    c = small / max(m, n)
    root = np.sqrt(c)

    def count_share(phi: float) -> float:
        # 1 - root is 0 where phi = pi makes the tangent infinite for a square shape.
        lean = (1 - root) / (1 + root)
        angle = np.arctan2(lean * np.sin(phi / 2), np.cos(phi / 2)) if lean > 0 else 0.0
        part = (1 + c) * phi / (4 * c) - np.sin(phi) / (2 * root) - (1 - c) / (2 * c) * angle
        return float(2 / np.pi * part)

    def energy_share(phi: float) -> float:
        return float((phi - np.sin(phi) * np.cos(phi)) / np.pi)

    def solve(share: Callable[[float], float], target: float) -> float:
        low, high = 0.0, float(np.pi)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if share(middle) < target else (low, middle)
        return high

    def energy(k: float) -> float:
        return 1.0 if k >= small else energy_share(solve(count_share, k / small))

    ranks = [small * count_share(solve(energy_share, tau)) for tau in taus]
    values = [
        *(rank for rank in ranks for _ in range(2)),
        *(energy(k) for k in ks),
        energy(small / 8),
        small / (1 + root) ** 2,
        small * np.exp(-c / 2),
        small / (1 + c),
        (1 + root) / np.sqrt(small),
        (1 + root) / (1 - root) if c < 1 else np.inf,
        np.nan,
    ]
    return dict(zip(metric_names(ks, taus), map(float, values), strict=True))


def gaussian_product_null(
    m: int,
    r: int,
    n: int,
    seed: int = 0,
    draws: int | None = None,
    gain: Float64[np.ndarray, " r"] | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    taus: Sequence[float] = DEFAULT_TAUS,
) -> NullModel:
    """Measures of A diag(gain) B with iid Gaussian A [m, r] and B [r, n].

    Only the triangular factors of A and B^T are drawn (Bartlett's decomposition), so a draw costs
    O(r^3) whatever m and n are.

    Args:
        m, r, n: shapes; ``energy_at_n/8`` reads at min(m, n) / 8, whatever r is.
        gain: the gains of a norm that stands between the factors, [r]; None is 1.
        seed, draws: as in :func:`gaussian_null`.

    Raises:
        ValueError: a size below 1, draws below 2, or a gain that is not r finite numbers.
    """
    _check_sizes(draws, m, r, n)
    if gain is not None and (gain.shape != (r,) or not np.isfinite(gain).all()):
        raise ValueError(f"the gain between the factors must be {r} finite numbers")
    count = _default_draws(2 * r) if draws is None else draws
    key = None if gain is None else np.asarray(gain, dtype=np.float64).tobytes()
    return dict(_product(m, r, n, seed, count, key, tuple(ks), tuple(taus)))


@lru_cache(maxsize=1024)
def _product(
    m: int,
    r: int,
    n: int,
    seed: int,
    draws: int,
    gain: bytes | None,
    ks: tuple[int, ...],
    taus: tuple[float, ...],
) -> NullModel:
    rng = np.random.default_rng(np.random.SeedSequence([seed, m, r, n]))
    scale = None if gain is None else np.frombuffer(gain, dtype=np.float64)

    def draw() -> np.ndarray:
        up = _triangular_factor(rng, m, r)
        if scale is not None:
            up *= scale
        return singular_values([up @ _triangular_factor(rng, n, r).T])[0]

    return _sample(draw, draws, min(m, n), ks, taus)


def _triangular_factor(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """R [min(rows, columns), columns] of the QR of an iid Gaussian [rows, columns]."""
    height = min(rows, columns)
    factor = np.triu(rng.standard_normal((height, columns)), 1)
    np.fill_diagonal(factor, np.sqrt(rng.chisquare(rows - np.arange(height))))
    return factor


def weighted_gaussian_null(
    m: int,
    covariance_eigenvalues: Float64[np.ndarray, " n"],
    seed: int = 0,
    draws: int | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    taus: Sequence[float] = DEFAULT_TAUS,
) -> NullModel:
    """Measures of G C^(1/2) with iid Gaussian G [m, n]: what the inputs alone do to a spectrum.

    Args:
        m: rows of W.
        covariance_eigenvalues: those of the input second moment C, [n], in any order. By rotation
            invariance of G nothing else of C matters. Rounding below 0 counts as 0.
        seed, draws: as in :func:`gaussian_null`; a draw costs O(N^3) here.

    Raises:
        ValueError: m below 1, draws below 2, eigenvalues empty, not finite, or all zero.
    """
    eigenvalues = _checked_eigenvalues(covariance_eigenvalues)
    _check_sizes(draws, m, eigenvalues.size)
    count = _default_draws(2 * min(m, eigenvalues.size)) if draws is None else draws
    return dict(_weighted(m, eigenvalues.tobytes(), seed, count, tuple(ks), tuple(taus)))


@lru_cache(maxsize=256)
def _weighted(
    m: int, eigenvalues: bytes, seed: int, draws: int, ks: tuple[int, ...], taus: tuple[float, ...]
) -> NullModel:
    scale, missing = _input_scale(m, eigenvalues)
    rng = np.random.default_rng(np.random.SeedSequence([seed, m, len(eigenvalues) // 8]))

    def draw() -> np.ndarray:
        factor = _triangular_factor(rng, m, scale.size) * scale
        return np.pad(singular_values([factor], tail_ratio=_LOOSE_TAIL)[0], (0, missing))

    return _sample(draw, draws, min(m, len(eigenvalues) // 8), ks, taus)


def _input_scale(rank: int, eigenvalues: bytes) -> tuple[np.ndarray, int]:
    """Square roots of a covariance's eigenvalues above rounding, and how many singular values of
    a matrix of ``rank`` rows on such inputs are 0 for want of inputs."""
    values = np.frombuffer(eigenvalues, dtype=np.float64)
    kept = values[values > np.finfo(np.float64).eps * values.size * values[0]]
    return np.sqrt(kept), max(min(rank, values.size) - kept.size, 0)


def weighted_gaussian_product_null(
    m: int,
    r: int,
    covariance_eigenvalues: Float64[np.ndarray, " n"],
    seed: int = 0,
    draws: int | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    taus: Sequence[float] = DEFAULT_TAUS,
) -> NullModel:
    """Measures of A B C^(1/2) with iid Gaussian A [m, r] and B [r, n]: products on real inputs.

    Args:
        m, r: shapes.
        covariance_eigenvalues: those of C [n], as in :func:`weighted_gaussian_null`.
        seed, draws: as in :func:`gaussian_null`.

    Raises:
        ValueError: as :func:`weighted_gaussian_null`.
    """
    eigenvalues = _checked_eigenvalues(covariance_eigenvalues)
    _check_sizes(draws, m, r, eigenvalues.size)
    count = _default_draws(2 * min(m, r)) if draws is None else draws
    return dict(_weighted_product(m, r, eigenvalues.tobytes(), seed, count, tuple(ks), tuple(taus)))


@lru_cache(maxsize=256)
def _weighted_product(
    m: int,
    r: int,
    eigenvalues: bytes,
    seed: int,
    draws: int,
    ks: tuple[int, ...],
    taus: tuple[float, ...],
) -> NullModel:
    n = len(eigenvalues) // 8
    scale, missing = _input_scale(min(m, r), eigenvalues)
    rng = np.random.default_rng(np.random.SeedSequence([seed, m, r, n]))

    def draw() -> np.ndarray:
        down = rng.standard_normal((r, scale.size)) * scale
        factor = _triangular_factor(rng, m, r) @ down
        return np.pad(singular_values([factor], tail_ratio=_LOOSE_TAIL)[0], (0, missing))

    return _sample(draw, draws, min(m, n), ks, taus)


def truncated_null(
    sigma_source: Float64[np.ndarray, " k"],
    rank: int,
    full_rank: int,
    ks: Sequence[int] = DEFAULT_KS,
    taus: Sequence[float] = DEFAULT_TAUS,
) -> NullModel:
    """Measures of the best rank-``rank`` cut of a dense source, whose spectrum is given; se is 0.

    Args:
        sigma_source: descending singular values of the source, in its own scale.
        rank: how many the cut keeps.
        full_rank: min(m, n) of the operator, for ``energy_at_n/8``.

    Raises:
        ValueError: rank below 1, or an empty or non-finite spectrum.
    """
    if rank < 1:
        raise ValueError("a cut keeps at least one singular value")
    values = measures(sigma_source[:rank], full_rank, ks, taus)
    return {metric: (value, 0.0) for metric, value in values.items()}


def _checked_eigenvalues(given: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Descending; ValueError where they are none, not finite, or all zero."""
    eigenvalues = np.sort(np.asarray(given, dtype=np.float64))[::-1]
    if eigenvalues.size == 0 or not np.isfinite(eigenvalues).all() or eigenvalues[0] <= 0:
        raise ValueError("the eigenvalues of a covariance must be finite and not all zero")
    return eigenvalues


def _check_sizes(draws: int | None, *sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"a matrix of sizes {sizes} has no spectrum")
    if draws is not None and draws < 2:
        raise ValueError("a standard deviation needs at least 2 draws")


def _default_draws(size: int) -> int:
    return 32 if size <= 1024 else 20 if size <= 2048 else 12


def _sample(
    draw: Callable[[], np.ndarray],
    draws: int,
    full_rank: int,
    ks: tuple[int, ...],
    taus: tuple[float, ...],
) -> NullModel:
    rows: list[list[float]] = []
    for _ in range(draws):
        sigma = draw()
        norm = float(np.linalg.norm(sigma))
        rows.append(
            list(measures(sigma / norm if norm > 0 else sigma, full_rank, ks, taus).values())
        )
    table = np.array(rows)
    widen = np.sqrt(1 + 1 / draws)
    null: NullModel = {}
    for metric, column in zip(metric_names(ks, taus), table.T, strict=True):
        if not np.isfinite(column).all():
            null[metric] = (float("nan"), float("nan"))
            continue
        if metric == "condition":
            value = float(np.exp(np.log(column).mean()))
            spread = value * float(np.log(column).std(ddof=1))
        else:
            value, spread = float(column.mean()), float(column.std(ddof=1))
        # What is left of a constant after rounding is no spread.
        se = widen * spread if spread > 1e-12 * abs(value) else 0.0
        if metric.startswith("r_") and not metric.endswith("_interp"):
            se = float(np.sqrt(se**2 + 1 / 12))
        null[metric] = (value, float(se))
    return null
