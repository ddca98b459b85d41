"""All claims, in the order of the page: memory, spectra, ranks, quality, speed, choices."""

from __future__ import annotations

from mla_study.study.claims.definitions import (
    cache,
    design,
    published,
    quality,
    ranks,
    spectra,
    speed,
    vbench,
)
from mla_study.study.claims.model import Claim

CLAIMS: tuple[Claim, ...] = (
    *cache.CLAIMS,
    *spectra.CLAIMS,
    *ranks.CLAIMS,
    *quality.CLAIMS,
    *vbench.CLAIMS,
    *published.CLAIMS,
    *speed.CLAIMS,
    *design.CLAIMS,
)
