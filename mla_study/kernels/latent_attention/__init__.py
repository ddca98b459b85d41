"""Latent attention in exact forms of one function: see README.md beside this file."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mla_study.kernels.latent_attention.absorbed import absorbed
from mla_study.kernels.latent_attention.absorbed_triton import absorbed_triton
from mla_study.kernels.latent_attention.reconstruct import (
    attend_expanded,
    expanded,
    reconstruct,
)
from mla_study.kernels.latent_attention.reference import reference

__all__ = [
    "FORMS",
    "PORTABLE",
    "absorbed",
    "absorbed_triton",
    "attend_expanded",
    "expanded",
    "reconstruct",
    "reference",
]

FORMS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    "reconstruct": reconstruct,
    "absorbed": absorbed,
    "absorbed_triton": absorbed_triton,
}
PORTABLE = ("reference", "reconstruct", "absorbed")
"""The forms that run on any device."""
