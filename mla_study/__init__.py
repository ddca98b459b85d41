"""Measure attention weights: spectra, null models and latent attention.

>>> from mla_study import probe
>>> frame = probe("model.safetensors")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla_study.study.probing import probe

__version__ = "0.1.0"
__all__ = ["__version__", "probe"]


def __getattr__(name: str) -> Any:
    # Importing the package stays instant: the probe brings numpy, scipy and pandas.
    if name == "probe":
        from mla_study.study.probing import probe

        return probe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
