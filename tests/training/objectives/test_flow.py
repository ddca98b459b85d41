"""The bidirectional teacher's draws, dropped captions and loss."""

from __future__ import annotations

import pytest
import torch
from training.gaussians import latents

from mla_study.errors import UserError
from mla_study.training.flow import flow_matching_loss, loss_weights, weighted_loss
from mla_study.training.objectives.flow import Flow, teacher_timesteps


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def together(t: torch.Tensor) -> torch.Tensor:
    return (t == t[:, :1]).all(dim=1)


def test_a_share_of_samples_has_a_timestep_a_frame() -> None:
    assert bool(together(teacher_timesteps(50, 4, 3.0, drawn())).all())
    assert not bool(together(teacher_timesteps(50, 4, 3.0, drawn(), 1.0)).any())
    share = 1 - together(teacher_timesteps(4000, 4, 3.0, drawn(), 0.35)).double().mean()
    assert share == pytest.approx(0.35, abs=0.04)
    with pytest.raises(UserError, match=r"1\.5"):
        teacher_timesteps(1, 1, 3.0, drawn(), 1.5)


def test_the_loss_is_plain_unless_weighted() -> None:
    flow, x0, noise = (latents(seed, 2, 3, 4, 1, 2) for seed in range(3))
    t = torch.tensor([250.0, 800.0])
    plain = weighted_loss(flow, x0, noise, t, 3.0, Flow().weighting)
    assert torch.equal(plain, flow_matching_loss(flow, x0, noise))
    weight = loss_weights(t, 3.0, "bell")[:, None].expand(2, 4)
    belled = weighted_loss(flow, x0, noise, t, 3.0, "bell")
    assert torch.equal(belled, flow_matching_loss(flow, x0, noise, weight))
    assert float(weighted_loss(noise - x0, x0, noise, t, 3.0, "uniform")) == 0
