"""Drawn timesteps, weights and the flow-matching loss, against loops written out in float64."""

from __future__ import annotations

import pytest
import torch
from training.gaussians import latents

from mla_study.errors import UserError
from mla_study.rollout import sampler
from mla_study.training import flow as f


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_arithmetic_is_the_samplers() -> None:
    assert f.add_noise is sampler.add_noise and f.guide is sampler.guide


@pytest.mark.parametrize(("frames", "chunk", "first"), [(9, 3, None), (7, 2, 1), (5, 5, None)])
def test_a_block_shares_its_draw(frames: int, chunk: int, first: int | None) -> None:
    t = f.block_timesteps(64, frames, chunk, 5.0, drawn(), first=first)
    assert t.shape == (64, frames) and t.dtype == torch.float32
    start = first or 0
    for begin in range(start, frames, chunk):
        assert bool((t[:, begin : begin + chunk] == t[:, begin : begin + 1]).all())
    if frames > start + chunk:
        assert bool((t[:, start] != t[:, start + chunk]).any())
    assert torch.equal(t, f.block_timesteps(64, frames, chunk, 5.0, drawn(), first=first))


def test_draws_are_entries_of_the_table_and_reach_both_ends() -> None:
    t = f.block_timesteps(20000, 1, 1, 3.0, drawn())
    table = sampler.timestep_table(3.0).float()
    assert set(t.flatten().tolist()) <= set(table.tolist())
    assert t.max() == 1000 and t.min() == table.min() > 0
    exact, near = f.sigma_at(t), f.sigma_at(t, "table", 3.0)
    assert (exact - near).abs().max() < 1e-7
    some = f.block_timesteps(500, 2, 1, 1.0, drawn(), low=3, high=6)
    assert set(some.flatten().tolist()) == {4.0, 5.0, 6.0}


def test_draws_that_cannot_be_are_told() -> None:
    for call in (
        lambda: f.block_timesteps(1, 5, 2, 5.0, drawn()),
        lambda: f.block_timesteps(1, 4, 2, 5.0, drawn(), low=7, high=7),
        lambda: f.block_timesteps(1, 4, 2, 5.0, drawn(), high=1001),
        lambda: f.block_timesteps(1, 4, 2, 0.0, drawn()),
    ):
        with pytest.raises(UserError):
            call()


def test_times_are_spelt_out_a_frame() -> None:
    assert f.per_frame(torch.tensor(3.0), 2, 3).tolist() == [[3] * 3] * 2
    assert f.per_frame(torch.tensor([1.0, 2.0]), 2, 3).tolist() == [[1] * 3, [2] * 3]
    assert f.per_frame(torch.tensor([[1.0, 2.0, 3.0]]), 2, 3).tolist() == [[1, 2, 3]] * 2
    for wrong in (torch.zeros(3), torch.zeros(2, 2), torch.zeros(2, 3, 1), torch.zeros(0)):
        with pytest.raises(UserError, match="do not fit"):
            f.per_frame(wrong, 2, 3)
    with pytest.raises(UserError, match="float32"):
        f.per_frame(torch.zeros(2).bfloat16(), 2, 3)


def test_bell_weights_have_mean_one_over_the_table_and_vanish_at_pure_noise() -> None:
    table = sampler.timestep_table(5.0)
    weights = f.loss_weights(table, 5.0, "bell")
    assert weights.mean() == pytest.approx(1) and weights[0] == 0
    assert abs(float(table[weights.argmax()]) - 500) < 3
    assert f.loss_weights(table.float(), 5.0, "uniform").tolist() == [1] * 1000


@pytest.mark.parametrize("weighted", [False, True])
def test_flow_matching_is_the_loop(weighted: bool) -> None:
    shape = (3, 2, 5, 1, 3)
    flow, x0, noise = (latents(seed, *shape) for seed in range(3))
    weight = latents(4, 3, 5).abs() if weighted else None
    total = 0.0
    for sample in range(3):
        for frame in range(5):
            gap = flow[sample, :, frame] - (noise[sample, :, frame] - x0[sample, :, frame])
            total += float((gap**2).mean()) * (
                1 if weight is None else float(weight[sample, frame])
            )
    mine = f.flow_matching_loss(flow, x0, noise, weight)
    assert float(mine) == pytest.approx(total / 15, rel=1e-12)
    assert f.flow_matching_loss(flow.bfloat16(), x0, noise).dtype == torch.float64
    assert f.flow_matching_loss(*(x.bfloat16() for x in (flow, x0, noise))).dtype == torch.float32


def test_gradients_reach_the_flow_alone() -> None:
    flow, x0, noise = (latents(seed, 2, 1, 3, 2, 1).requires_grad_() for seed in range(3))
    weight = latents(4, 2, 3).abs()
    assert torch.autograd.gradcheck(
        lambda y: f.flow_matching_loss(y, x0.detach(), noise.detach(), weight), (flow,)
    )
    f.flow_matching_loss(flow, x0, noise, weight).backward()
    assert flow.grad is not None and x0.grad is None and noise.grad is None
