"""From measured blocks to tidy tables: a row for each metric and each null model of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.checkpoints.operators.find import Attention
from mla_study.probes import nulls
from mla_study.probes.stacks import Spectrum
from mla_study.probes.store import Measured

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "checkpoint",
    "series",
    "step",
    "layer",
    "attention",
    "operator",
    "head",
    "gauge",
    "metric",
    "value",
    "null",
    "null_value",
    "null_se",
    "m",
    "n",
    "method",
    "provenance",
)
EDGE = "sigma_dc_over_sigma_1"
"""Metric: the smallest singular value that a latent of the same size could keep, over the first.

Its number is the latent rank d_c of a product, min(m, n) / 8 of another operator."""
SPECTRA_COLUMNS = (*COLUMNS[:8], "index", "sigma")
KINDS = {
    "layer": "int64",
    "head": "int64",
    "m": "int64",
    "n": "int64",
    "index": "int64",
    "step": "Int64",
    "value": "float64",
    "null_value": "float64",
    "null_se": "float64",
    "sigma": "float64",
}
"""dtypes of the columns that are not text."""


_SPECTRA = ("truncated_source", "untrained")  # nulls that are spectra themselves


@dataclass(frozen=True)
class Source:
    """One checkpoint to probe, what the tables call it, and its place in a series."""

    path: str
    label: str
    series: str = ""
    step: int | None = None


@dataclass
class Rows:
    """Collects the rows of both tables.

    ``wants`` chooses metrics; ``seed`` is that of the nulls; ``truncated`` holds a dense source's
    singular values of [K; V] by layer; ``edge`` adds :data:`EDGE`.
    """

    wants: Callable[[str], bool]
    seed: int
    truncated: Mapping[int, np.ndarray]
    edge: bool = False
    table: list[tuple[Any, ...]] = field(default_factory=list)
    spectra: list[tuple[tuple[Any, ...], np.ndarray]] = field(default_factory=list)

    def add(
        self,
        source: Source,
        attention: Attention,
        measured: Measured,
        more: Mapping[int, Mapping[str, nulls.NullModel]] | None = None,
    ) -> None:
        """All rows of one block; ``more`` are nulls beside the usual ones, by spectrum's number.

        A null that is a spectrum (``truncated_source``, ``untrained``) is in the operator's scale.
        """
        for number, spectrum in enumerate(measured.spectra):
            place = (
                source.label,
                source.series,
                source.step,
                attention.layer,
                attention.kind,
                spectrum.operator,
                spectrum.head,
                spectrum.gauge,
            )
            tail = (spectrum.m, spectrum.n, spectrum.method, "measured")
            models = measured.nulls.get(number) or self._models(attention, spectrum)
            models = {**models, **(more or {}).get(number, {})}
            values = {**measured.metrics[number], **functional_errors(spectrum)}
            if self.edge:
                values[EDGE] = edge_ratio(spectrum)
            scale = float(np.sqrt(np.square(spectrum.sigma).sum()))
            for metric in filter(self.wants, values):
                for null, model in models.items():
                    factor = 1.0 if null in _SPECTRA else scale
                    if metric == EDGE:
                        expected = self._edge(null, model, spectrum)
                    else:
                        expected = null_of(model, metric, factor)
                    self.table.append((*place, metric, values[metric], null, *expected, *tail))
            self.spectra.append((place, spectrum.sigma))

    def _models(self, attention: Attention, spectrum: Spectrum) -> dict[str, nulls.NullModel]:
        m, n = spectrum.m, spectrum.n
        models = {"gaussian": nulls.gaussian_null(m, n, self.seed)}
        if spectrum.inner is not None:
            models["gaussian_product"] = nulls.gaussian_product_null(
                m, spectrum.inner, n, self.seed
            )
            sigma = self.truncated.get(attention.layer)
            dense = attention.kind == "self" and spectrum.operator == "composed"
            if dense and sigma is not None:
                models["truncated_source"] = nulls.truncated_null(
                    sigma, spectrum.inner, spectrum.full_rank
                )
        return models

    def _edge(self, null: str, model: nulls.NullModel, spectrum: Spectrum) -> tuple[float, float]:
        if EDGE in model:
            return model[EDGE]
        if null == "gaussian" and not spectrum.gauge.startswith("weighted"):
            return nulls.gaussian_edge(spectrum.m, spectrum.n, edge_of(spectrum), self.seed)
        if null == "gaussian":
            return float("nan"), float("nan")
        # of a product the last over the first: the inverse of its condition, a geometric mean
        condition, se = model["condition"]
        return 1 / condition, se / condition**2

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The table (:data:`COLUMNS`) and the singular values (:data:`SPECTRA_COLUMNS`)."""
        import pandas as pd

        lengths = [len(sigma) for _, sigma in self.spectra]
        columns: dict[str, Any] = {
            name: np.repeat(np.array([p[i] for p, _ in self.spectra], dtype=object), lengths)
            for i, name in enumerate(SPECTRA_COLUMNS[:8])
        }
        columns["index"] = np.concatenate([np.arange(1, k + 1) for k in lengths])
        columns["sigma"] = np.concatenate([sigma for _, sigma in self.spectra])
        return table_of(self.table), typed(pd.DataFrame(columns))


def table_of(rows: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """Rows in the order of :data:`COLUMNS` as a frame with their dtypes."""
    import pandas as pd

    return typed(pd.DataFrame(list(rows), columns=list(COLUMNS)))


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the dtypes of :data:`KINDS`, text elsewhere, whatever its rows were."""
    return frame.astype({name: KINDS.get(name, "str") for name in frame.columns})


def edge_of(spectrum: Spectrum) -> int:
    """Number of the singular value that :data:`EDGE` compares with the first."""
    return spectrum.inner or max(1, spectrum.full_rank // 8)


def edge_ratio(spectrum: Spectrum) -> float:
    """:data:`EDGE` of a spectrum; NaN for a zero matrix, 0 where the rank is smaller."""
    k = edge_of(spectrum)
    if not spectrum.sigma[0] > 0:
        return float("nan")
    return float(spectrum.sigma[k - 1] / spectrum.sigma[0]) if k <= spectrum.sigma.size else 0.0


def functional_errors(spectrum: Spectrum) -> dict[str, float]:
    """Relative RMS output error of the best rank-k cut, for a weighted spectrum.

    sqrt(sum_{i>k} sigma_i^2 / sum_i sigma_i^2) at the k of the ``energy_at_k`` metrics, without the
    cancellation of 1 - E(k); linear in the square between integers.
    """
    if not spectrum.gauge.startswith("weighted"):
        return {}
    square = np.square(spectrum.sigma / (spectrum.sigma[0] or 1.0))
    left = np.append(np.cumsum(square[::-1])[::-1], 0.0)
    at = {f"{k}": float(k) for k in nulls.DEFAULT_KS} | {"n/8": spectrum.full_rank / 8}
    found = {name: np.interp(k, np.arange(left.size), left) for name, k in at.items()}
    nothing = not left[0] > 0
    return {
        f"functional_error_at_{name}": float("nan") if nothing else float(np.sqrt(rest / left[0]))
        for name, rest in found.items()
    }


def null_of(model: nulls.NullModel, metric: str, scale: float) -> tuple[float, float]:
    """(value, se) of a null; ``scale`` is ||W||_F, which a null of unit norm lacks."""
    if metric.startswith("functional_error"):
        value, se = model[metric.replace("functional_error", "energy")]
        error = float(np.sqrt(max(1.0 - value, 0.0)))
        return error, se / (2 * error) if error > 0 else 0.0
    value, se = model[metric]
    return (value * scale, se * scale) if metric == "spectral_norm" else (value, se)
