"""Eigenvalues of a symmetric matrix, by whichever LAPACK route is fastest at its size.

Below ``TWO_STAGE_FROM`` columns: ``dsyevd`` without vectors. From there on: ``dsyevd_2stage`` (full
to band to tridiagonal), whose first stage is matrix products where ``dsytrd`` waits for memory. The
OpenBLAS inside scipy's wheels has that routine but scipy does not wrap it, so it is called through
ctypes; a build without it falls back to ``dsyevd``.

CPU-seconds on one core of an AMD EPYC (Zen 4, 32 MB L3, 50 GF/s dsyrk), float64, one BLAS thread:

====  =======  ============  ==============  =============  ==============
n     dsyevd   2stage        torch eigvalsh  own band code  dsyevd float32
====  =======  ============  ==============  =============  ==============
 384  0.005    0.008         0.007           -              -
1536  0.19     0.23          0.26            0.30           0.126
2048  0.53     0.56          0.69            0.68           0.31
2560  1.17     0.98          1.11            1.15           0.53
3072  2.2      1.5           1.75            2.0            -
5120  11.3     7.1           8.1             -              -
====  =======  ============  ==============  =============  ==============

The drivers ev, evr, evx and numpy tie with evd within 3 % (numpy at 5120: 10 %). torch loses to the
two-stage routine wherever it beats dsyevd, and costs a copy: it is never imported here. A float32
pass takes half to 2/3 of the time, but leaves 1e-7 sigma_1 where 1e-10 is promised, and a float64
correction of all eigenvalues would need the vectors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import scipy.linalg
from jaxtyping import Float64

TWO_STAGE_FROM = 2200

# The plain prefix is scipy's 32-bit integer build, the 64_ suffix its 64-bit one.
_SYMBOLS = (("scipy_dsyevd_2stage_", ctypes.c_int32), ("scipy_dsyevd_2stage_64_", ctypes.c_int64))


def symmetric_eigenvalues(
    matrix: Float64[np.ndarray, "n n"], overwrite: bool = False
) -> Float64[np.ndarray, " n"]:
    """All eigenvalues, ascending, of the symmetric matrix whose lower triangle is given.

    Args:
        matrix: float64 [n, n], finite. Fortran order saves a copy.
        overwrite: let the solver destroy the matrix.

    Raises:
        numpy.linalg.LinAlgError: the solver did not converge.
    """
    if matrix.shape[0] >= TWO_STAGE_FROM:
        solve = two_stage_solver()
        if solve is not None:
            return solve(matrix, overwrite)
    return scipy.linalg.eigh(
        matrix,
        lower=True,
        eigvals_only=True,
        driver="evd",
        overwrite_a=overwrite,
        check_finite=False,
    )


@cache
def two_stage_solver() -> Callable[[np.ndarray, bool], np.ndarray] | None:
    """``dsyevd_2stage`` as (matrix, overwrite) -> eigenvalues; None where no library offers it."""
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library.get("internal_api") != "openblas":
            continue
        try:
            handle = ctypes.CDLL(library["filepath"])
        except OSError:
            continue
        for name, integer in _SYMBOLS:
            function = getattr(handle, name, None)
            if function is not None:
                return _bind(function, integer)
    return None


def _bind(function: Callable[..., None], integer: type) -> Callable[[np.ndarray, bool], np.ndarray]:
    def solve(matrix: np.ndarray, overwrite: bool) -> np.ndarray:
        n = matrix.shape[0]
        in_place = overwrite and matrix.flags.f_contiguous and matrix.flags.writeable
        work_on = matrix if in_place else np.array(matrix, order="F")
        values = np.empty(n)
        work, iwork = _call(
            function, integer, work_on, values, np.empty(1), np.empty(1, integer), -1
        )
        size, isize = int(work[0]), max(1, int(iwork[0]))
        _call(function, integer, work_on, values, np.empty(size), np.empty(isize, integer), size)
        return values

    return solve


def _call(
    function: Callable[..., None],
    integer: type,
    matrix: np.ndarray,
    values: np.ndarray,
    work: np.ndarray,
    iwork: np.ndarray,
    lwork: int,
) -> tuple[np.ndarray, np.ndarray]:
    n, info = integer(matrix.shape[0]), integer(0)
    liwork = -1 if lwork == -1 else iwork.size
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (matrix, values, work, iwork)]
    function(
        b"N",
        b"L",
        ctypes.byref(n),
        pointers[0],
        ctypes.byref(n),
        pointers[1],
        pointers[2],
        ctypes.byref(integer(lwork)),
        pointers[3],
        ctypes.byref(integer(liwork)),
        ctypes.byref(info),
        ctypes.c_size_t(1),
        ctypes.c_size_t(1),
    )
    if info.value != 0:
        raise np.linalg.LinAlgError(f"dsyevd_2stage did not converge (info {info.value})")
    return work, iwork
