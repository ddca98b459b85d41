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


def test_a_weight_is_one_a_frame() -> None:
    flow, x0, noise = (latents(seed, 3, 2, 5, 1, 7) for seed in range(3))
    for shape in ((5,), (3, 1), (1, 5), (3,), (5, 3), (3, 5, 1)):
        wrong = latents(4, *shape)
        with pytest.raises(
            UserError, match=r"^weight has shape .*, but \[3, 5\] is wanted, one a f"
        ):
            f.flow_matching_loss(flow, x0, noise, wrong)


def test_single_frames_are_clips_of_one_frame(seed: int) -> None:
    flow, x0, noise = (latents(seed + i, 5, 2, 3, 7) for i in range(3))
    t, weight = latents(seed, 5).abs() * 300 % 1000, latents(seed + 3, 5).abs()
    clips = [x[:, :, None] for x in (flow, x0, noise)]
    mine = f.flow_matching_loss(flow, x0, noise, weight)
    assert torch.equal(mine, f.flow_matching_loss(flow, x0, noise, weight[:, None]))
    assert torch.equal(mine, f.flow_matching_loss(*clips, weight[:, None]))
    error = (flow - noise + x0).square().mean(dim=(1, 2, 3))
    assert float(mine) == pytest.approx(float((weight * error).mean()))
    for times in (t, t[:, None], t[0], float(t[0])):
        belled = f.weighted_loss(flow, x0, noise, times, 5.0, "bell")
        assert torch.equal(belled, f.weighted_loss(*clips, times, 5.0, "bell"))
    with pytest.raises(UserError, match=r"weight has shape \[3\], but \[5\] is wanted"):
        f.flow_matching_loss(flow, x0, noise, weight[:3])


def test_shapes_that_do_not_fit_are_told_by_name() -> None:
    whole, one = latents(1, 3, 2, 5, 1, 7), latents(2, 1, 2, 5, 1, 7)
    with pytest.raises(UserError, match=r"^x0 has shape \[1, 2, 5, 1, 7\], but \[3, 2, 5, 1, 7\]"):
        f.flow_matching_loss(whole, one, whole)
    with pytest.raises(UserError, match=r"^noise has shape \[3, 2, 5, 1, 7\], but \[1, 2"):
        f.weighted_loss(one, one, whole, 3.0, 5.0, "uniform")
    for flat in (whole[0, 0], whole[0, 0, 0], whole[None]):
        for call in (
            lambda x: f.flow_matching_loss(x, x, x),
            lambda x: f.weighted_loss(x, x, x, 3.0, 5.0, "bell"),
        ):
            with pytest.raises(UserError, match=r"^flow has shape .*, but latents are \[B, C, F"):
                call(flat)
    for t in (torch.zeros(2), torch.zeros(7, 5), 1500.0, torch.tensor(float("nan"))):
        for weighting in ("bell", "uniform"):
            with pytest.raises(UserError, match="timesteps t "):
                f.weighted_loss(whole, whole, whole, t, 5.0, weighting)


def test_gradients_reach_the_flow_alone() -> None:
    flow, x0, noise = (latents(seed, 2, 1, 3, 2, 1).requires_grad_() for seed in range(3))
    weight = latents(4, 2, 3).abs()
    assert torch.autograd.gradcheck(
        lambda y: f.flow_matching_loss(y, x0.detach(), noise.detach(), weight), (flow,)
    )
    f.flow_matching_loss(flow, x0, noise, weight).backward()
    assert flow.grad is not None and x0.grad is None and noise.grad is None
