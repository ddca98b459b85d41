"""Latent attention in exact forms of one function: see README.md beside this file."""

from __future__ import annotations

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
    "absorbed",
    "absorbed_triton",
    "attend_expanded",
    "expanded",
    "reconstruct",
    "reference",
]

FORMS = {"reference": reference, "reconstruct": reconstruct, "absorbed": absorbed}
