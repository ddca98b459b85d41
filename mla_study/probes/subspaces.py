"""Row spaces of operators, and how far two of them coincide.

m rows, n columns (inputs), d the ambient dimension (= n), k and l ranks. A subspace is given by an
orthonormal basis Q [d, k].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64

from mla_study.probes.spectrum import TAIL_RATIO, gram

_EPS = float(np.finfo(np.float64).eps)


def row_space(
    blocks: Sequence[Float[np.ndarray, "_ n"]],
    k: int,
    row_scale: Float[np.ndarray, " m"] | None = None,
) -> Float64[np.ndarray, "n k"]:
    """Orthonormal basis of the k leading right singular vectors of the row stack W [m, n].

    Args:
        blocks: row blocks [rows, n], float32 or float64.
        k: dimension, at most the rank of W.
        row_scale: one factor a row of W; None is 1.

    Returns:
        Q float64 [n, k], column i belongs to sigma_i.

    Raises:
        ValueError: NaN or Inf, or k outside 1..rank(W).
    """
    m, n = sum(block.shape[0] for block in blocks), blocks[0].shape[1]
    _check_rank(k, m, n)
    if m >= n:
        square = gram(blocks, n, row_scale)
        if not np.isfinite(square.diagonal()).all():
            raise ValueError("the matrix holds NaN or Inf")
        values, vectors = scipy.linalg.eigh(
            square, lower=True, subset_by_index=[n - k, n - 1], overwrite_a=True, check_finite=False
        )
        if values[0] > TAIL_RATIO**2 * values[-1]:
            return np.ascontiguousarray(vectors[:, ::-1])
    dense = np.concatenate([np.asarray(block, dtype=np.float64) for block in blocks])
    if row_scale is not None:
        dense *= row_scale[:, None]
    if not np.isfinite(dense).all():
        raise ValueError("the matrix holds NaN or Inf")
    return _leading_right_vectors(dense, k)


def factored_row_space(
    up: Float[np.ndarray, "m r"], down: Float[np.ndarray, "r n"], k: int
) -> Float64[np.ndarray, "n k"]:
    """Like :func:`row_space`, of the product up @ down, which is never formed.

    Raises:
        ValueError: inner sizes differ, NaN or Inf, or k outside 1..rank(up @ down).
    """
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"factors of shapes {up.shape} and {down.shape} do not compose")
    _check_rank(k, *up.shape, down.shape[1])
    r_up = np.linalg.qr(np.asarray(up, dtype=np.float64), mode="r")
    basis, r_down = np.linalg.qr(np.asarray(down, dtype=np.float64).T)
    core = r_up @ r_down.T
    if not np.isfinite(core).all():
        raise ValueError("a factor holds NaN or Inf")
    return basis @ _leading_right_vectors(core, k)


def _check_rank(k: int, *sizes: int) -> None:
    if not 1 <= k <= min(sizes):
        raise ValueError(f"a row space of dimension {k} does not fit into sizes {sizes}")


def _leading_right_vectors(dense: np.ndarray, k: int) -> np.ndarray:
    _, sigma, vectors = scipy.linalg.svd(
        dense, full_matrices=False, overwrite_a=True, check_finite=False
    )
    if sigma[k - 1] <= _EPS * max(dense.shape) * sigma[0]:
        raise ValueError(f"the matrix has a rank below {k}, so its {k} leading directions are open")
    return np.ascontiguousarray(vectors[:k].T)


def principal_angles(
    basis_a: Float64[np.ndarray, "d k"], basis_b: Float64[np.ndarray, "d l"]
) -> Float64[np.ndarray, " angles"]:
    """Principal angles between two subspaces, in radians, ascending, [min(k, l)].

    Cosines from svdvals(Qa^T Qb); below 45 degrees the sines, from the part of the smaller basis
    that lies outside the larger space: accurate for small angles (Bjorck and Golub 1973, sec. 3).

    Raises:
        ValueError: different ambient dimensions.
    """
    _check_ambient(basis_a, basis_b)
    large, small = (
        (basis_a, basis_b) if basis_a.shape[1] >= basis_b.shape[1] else (basis_b, basis_a)
    )
    inner = large.T @ small
    cosines = scipy.linalg.svdvals(inner)
    sines = scipy.linalg.svdvals(small - large @ inner)[::-1]
    from_cosines = np.arccos(np.clip(cosines, 0.0, 1.0))
    from_sines = np.arcsin(np.clip(sines, 0.0, 1.0))
    return np.where(np.square(cosines) >= 0.5, from_sines, from_cosines)


def overlap(basis_a: Float64[np.ndarray, "d k"], basis_b: Float64[np.ndarray, "d l"]) -> float:
    """||Qa^T Qb||_F^2 / min(k, l): 1 where one space holds the other, 0 where they are orthogonal.

    Raises:
        ValueError: different ambient dimensions.
    """
    _check_ambient(basis_a, basis_b)
    shared = float(np.square(basis_a.T @ basis_b).sum())
    return shared / min(basis_a.shape[1], basis_b.shape[1])


def overlap_null(k: int, l: int, d: int) -> tuple[float, float]:  # noqa: E741
    """Mean and standard deviation of :func:`overlap` of two independent uniform subspaces of R^d.

    With P and Q the projectors, E tr(PQ) = k l / d and
    Var tr(PQ) = 2 k (d - k) l (d - l) / (d^2 (d - 1) (d + 2)); for k = l the mean overlap is k / d.

    Raises:
        ValueError: k or l outside 1..d.
    """
    if not (1 <= k <= d and 1 <= l <= d):
        raise ValueError(f"subspaces of dimensions {k} and {l} do not fit into {d}")
    smaller = min(k, l)
    spread = 2.0 * k * (d - k) * l * (d - l)
    variance = spread / (d**2 * (d - 1.0) * (d + 2.0)) if spread else 0.0
    return k * l / d / smaller, float(np.sqrt(variance)) / smaller


def _check_ambient(basis_a: np.ndarray, basis_b: np.ndarray) -> None:
    if basis_a.shape[0] != basis_b.shape[0]:
        raise ValueError(
            f"subspaces of R^{basis_a.shape[0]} and R^{basis_b.shape[0]} have no angles"
        )
