"""From measured blocks to tidy tables: a row for each metric and each null model of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.probes import nulls
from mla_study.probes.layer import Spectrum
from mla_study.probes.work import Item, Measured

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
SPECTRA_COLUMNS = (*COLUMNS[:8], "index", "sigma")


@dataclass(frozen=True)
class Source:
    """One checkpoint to probe, and its place in a series along training."""

    path: str
    label: str
    series: str = ""
    step: int | None = None


@dataclass
class Rows:
    """Collects the rows of both tables; ``truncated`` holds a dense source's spectra by layer."""

    wants: Callable[[str], bool]
    seed: int
    truncated: dict[int, np.ndarray]
    table: list[tuple[Any, ...]] = field(default_factory=list)
    spectra: list[tuple[tuple[Any, ...], np.ndarray]] = field(default_factory=list)

    def add(self, source: Source, item: Item, measured: Measured) -> None:
        attention = item.attention
        for spectrum, metrics in zip(measured.spectra, measured.metrics, strict=True):
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
            models = self._models(item, spectrum)
            values = {**metrics, **functional_errors(spectrum, metrics)}
            for metric, value in values.items():
                if not self.wants(metric):
                    continue
                for null, model in models.items():
                    expected, se = null_of(model, metric, spectrum.sigma)
                    self.table.append(
                        (*place, metric, value, null, expected, se)
                        + (spectrum.m, spectrum.n, spectrum.method, "measured")
                    )
            self.spectra.append((place, spectrum.sigma))

    def _models(self, item: Item, spectrum: Spectrum) -> dict[str, nulls.NullModel]:
        m, n, seed = spectrum.m, spectrum.n, self.seed
        if spectrum.gauge.startswith("weighted"):
            assert item.covariance is not None
            eigenvalues = covariance_eigenvalues(*item.covariance)
            draws = None if n <= 768 else 4
            return {"gaussian": nulls.weighted_gaussian_null(m, eigenvalues, seed, draws)}
        models = {"gaussian": nulls.gaussian_null(m, n, seed)}
        if spectrum.inner is not None:
            models["gaussian_product"] = nulls.gaussian_product_null(m, spectrum.inner, n, seed)
            sigma = self.truncated.get(item.attention.layer)
            if spectrum.operator == "composed" and sigma is not None:
                models["truncated_source"] = nulls.truncated_null(sigma, spectrum.inner, n)
        return models

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        import pandas as pd

        table = pd.DataFrame(self.table, columns=list(COLUMNS))
        lengths = [len(sigma) for _, sigma in self.spectra]
        spectra = pd.DataFrame(
            {
                name: np.repeat(np.array([p[i] for p, _ in self.spectra], dtype=object), lengths)
                for i, name in enumerate(SPECTRA_COLUMNS[:8])
            }
        )
        spectra["index"] = np.concatenate([np.arange(1, k + 1) for k in lengths])
        spectra["sigma"] = np.concatenate([sigma for _, sigma in self.spectra])
        return typed(table), typed(spectra)


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with one dtype a column, whatever its rows were."""
    kinds = {
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
    return frame.astype({c: kinds.get(c, "str") for c in frame.columns})


def functional_errors(spectrum: Spectrum, metrics: Mapping[str, float]) -> dict[str, float]:
    """sqrt(1 - E(k)) of a weighted spectrum: relative RMS output error of the best rank-k cut."""
    if not spectrum.gauge.startswith("weighted"):
        return {}
    return {
        metric.replace("energy", "functional_error"): float(np.sqrt(max(1.0 - value, 0.0)))
        for metric, value in metrics.items()
        if metric.startswith("energy_at_")
    }


def null_of(model: nulls.NullModel, metric: str, sigma: np.ndarray) -> tuple[float, float]:
    """(value, se) of a null, put into the scale of the measured spectrum where it has one."""
    if metric.startswith("functional_error"):
        value, se = model[metric.replace("functional_error", "energy")]
        error = float(np.sqrt(max(1.0 - value, 0.0)))
        return error, se / (2 * error) if error > 0 else 0.0
    value, se = model[metric]
    if metric == "spectral_norm" and se > 0:
        scale = float(np.sqrt(np.square(sigma).sum()))
        return value * scale, se * scale
    return value, se


_EIGENVALUES: dict[tuple[str, str], np.ndarray] = {}


def covariance_eigenvalues(path: str, key: str) -> np.ndarray:
    """Eigenvalues of one stored covariance, computed once."""
    if (path, key) not in _EIGENVALUES:
        from mla_study.probes.activations import load_covariance

        _EIGENVALUES[path, key] = np.linalg.eigvalsh(load_covariance(path)[key])
    return _EIGENVALUES[path, key]
