"""What does not belong together is told before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from training.runs import DENSE, LATENT, Clips, stage

from mla_study.errors import UserError
from mla_study.training.batch import Batch
from mla_study.training.fit import require_fit
from mla_study.training.objective import make_objective


class Untold(Clips):
    def batch(self, samples: Sequence[int]) -> Batch:
        return replace(super().batch(samples), latents=None)


class Wide(Clips):
    def batch(self, samples: Sequence[int]) -> Batch:
        return replace(super().batch(samples), context=torch.zeros(len(samples), 5, 8))


def test_what_fits_is_silent() -> None:
    for name in ("teacher_forcing", "distribution_matching"):
        require_fit(stage(name), make_objective(name), LATENT, DENSE, Clips())
    chosen = make_objective("distribution_matching")
    require_fit(stage("distribution_matching"), chosen, LATENT, DENSE, Untold())


def test_what_does_not_is_named() -> None:
    plain, forcing = stage("teacher_forcing"), make_objective("teacher_forcing")
    with pytest.raises(UserError, match="teacher's text_dim is 9, but the generator's is 7"):
        require_fit(plain, forcing, LATENT, replace(DENSE, text_dim=9), Clips())
    with pytest.raises(UserError, match="learns from videos, but the data are prompts alone"):
        require_fit(plain, forcing, LATENT, None, Untold())
    with pytest.raises(UserError, match="text has 8 channels, but model 'mini' reads 7"):
        require_fit(plain, forcing, LATENT, None, Wide())
    with pytest.raises(UserError, match=r"\(3, 6, 4, 4\), but the stage .* take \(3, 4, 4, 4\)"):
        require_fit(replace(plain, frames=4), forcing, LATENT, None, Clips())
