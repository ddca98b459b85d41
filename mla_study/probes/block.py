"""One attention block measured: spectra, measures, row space, and what its inputs alone do."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from jaxtyping import Float64

from mla_study.checkpoints.operators.find import Attention
from mla_study.errors import UserError
from mla_study.probes import nulls
from mla_study.probes.layer import Request, measure_attention, subspace_of, subspace_rank
from mla_study.probes.spectrum import measures
from mla_study.probes.stacks import Spectrum, Weights
from mla_study.probes.store import Measured

_WIDE = 768  # from here on a draw of a weighted null costs as much as the spectrum it stands beside


def measure_block(
    weights: Weights,
    attention: Attention,
    request: Request,
    root: Float64[np.ndarray, "n c"] | None = None,
) -> Measured:
    """Spectra, measures and row space of one block; no nulls, and ``bytes_read`` is 0.

    Arguments as :func:`~mla_study.probes.layer.measure_attention` takes them.

    Raises:
        UserError: NaN or Inf in a tensor (named), or a spectrum that does not converge.
    """
    try:
        spectra = measure_attention(weights, attention, request, root)
        k = request.subspace
        basis = None
        if k:
            rank = subspace_rank(attention) if k < 0 else k
            basis = subspace_of(weights, attention, rank)
    except np.linalg.LinAlgError as error:
        raise UserError(
            f"{weights.name}: the spectrum of block {attention.block!r} did not converge "
            f"({error}): check the weights there"
        ) from None
    metrics = [measures(s.sigma, s.full_rank) for s in spectra]
    return Measured(spectra, metrics, weights.digests, basis=basis)


def root_of(
    covariance: Float64[np.ndarray, "n n"],
) -> tuple[Float64[np.ndarray, "n c"], Float64[np.ndarray, " n"]]:
    """The root of C = root root^T, c its rank, and the n eigenvalues, ascending; C is destroyed."""
    values, vectors = scipy.linalg.eigh(covariance, overwrite_a=True, check_finite=False)
    kept = values > np.finfo(np.float64).eps * values.size * max(values[-1], 0.0)
    return np.ascontiguousarray(vectors[:, kept] * np.sqrt(values[kept])), values


def weighted_nulls(
    spectrum: Spectrum,
    eigenvalues: Float64[np.ndarray, " n"],
    seed: int = 0,
    draws: int | None = None,
    nearest: bool = False,
) -> dict[str, nulls.NullModel]:
    """Nulls of a weighted spectrum: a Gaussian operator, and product, on the same inputs.

    Args:
        spectrum: of W C^(1/2); the ``gaussian_product`` is given where W is stored as factors.
        eigenvalues: of C.
        seed, draws: as in :func:`~mla_study.probes.nulls.weighted_gaussian_null`; None takes 32
            draws or fewer, by size.
        nearest: of a product leave out the operator of full rank, which costs the most.
    """
    found: dict[str, nulls.NullModel] = {}
    if spectrum.inner is None or not nearest:
        few = 4 if draws is None and min(spectrum.m, spectrum.n) > _WIDE else draws
        found["gaussian"] = nulls.weighted_gaussian_null(spectrum.m, eigenvalues, seed, few)
    if spectrum.inner is not None:
        found["gaussian_product"] = nulls.weighted_gaussian_product_null(
            spectrum.m, spectrum.inner, eigenvalues, seed, draws
        )
    return found
