"""Distribution matching: gradient, losses and conventions against loops and known Gaussians."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.gaussians import Gaussian, latents

from mla_study.errors import UserError
from mla_study.training.flow import add_noise, guide
from mla_study.training.objectives import distribution_matching as d

SHAPE = (3, 2, 5, 1, 7)


def some(*seeds: int) -> list[Tensor]:
    return [latents(seed, *SHAPE) for seed in seeds]


def test_bounded_times_are_the_recorded_ones(fixtures: Path) -> None:
    recorded = load_file(fixtures / "flow_scheduler.safetensors")
    mine = d.bounded_timesteps(recorded["dmd_uniform_t"], 5.0)
    assert (mine - recorded["dmd_shifted_clamped_t"]).abs().max() < 1e-3


def test_scores_are_asked_at_one_bounded_time_a_sample() -> None:
    t = d.score_timesteps(4000, 3, 5.0, torch.Generator().manual_seed(1))
    assert t.dtype == torch.float32 and torch.equal(t, t[:, :1].expand(4000, 3))
    assert t.min() == 20 and t.max() == 980
    late = d.score_timesteps(300, 1, 5.0, torch.Generator(), low=500)
    assert late.min() >= 1000 * 2.5 / 3 - 1e-3
    u = torch.tensor([0.0, 2.0, 500.0, 1000.0])
    assert d.bounded_timesteps(u, 5.0, (1.0, 999.0)).tolist() == pytest.approx(
        [1, 10 / 1.008, 2500 / 3, 999]
    )
    assert torch.equal(d.bounded_timesteps(u, 0.5, (0.0, 1000.0)), u.double())


@pytest.mark.parametrize("convention", ["from_cond", "from_uncond"])
def test_the_gradient_is_the_loop(convention: d.Convention) -> None:
    x, fake, cond, uncond = some(1, 2, 3, 4)
    mine = d.kl_gradient(x, fake, cond, uncond, 3.0, convention)
    start = cond if convention == "from_cond" else uncond
    for sample in range(3):
        real = start[sample] + 3 * (cond - uncond)[sample]
        by = float((x[sample] - real).abs().mean())
        assert torch.allclose(mine[sample], (fake[sample] - real) / by, rtol=1e-12)
    bare = d.kl_gradient(x, fake, cond, uncond, 3.0, convention, normalise=False)
    assert torch.allclose(bare, fake - start - 3 * (cond - uncond))


def test_three_in_distribution_matching_is_four_in_consistency_code() -> None:
    x, fake, cond, uncond = some(1, 2, 3, 4)
    assert torch.allclose(
        d.kl_gradient(x, fake, cond, uncond, 3.0),
        d.kl_gradient(x, fake, cond, uncond, 4.0, "from_uncond"),
    )


def test_guiding_clean_latents_is_guiding_flows() -> None:
    x_t, cond, uncond = some(1, 2, 3)
    t = torch.tensor([50.0, 500.0, 980.0])
    late = guide(d.score_x0(x_t, cond, t), d.score_x0(x_t, uncond, t), 3.0, "from_cond")
    assert torch.allclose(late, d.score_x0(x_t, guide(cond, uncond, 3.0, "from_cond"), t))


def test_the_gradient_points_away_from_the_teachers_gaussian() -> None:
    real, fake = Gaussian(1.0, 0.5), Gaussian(-0.4, 0.5)
    x, noise = some(1, 2)
    x = fake.mean + fake.spread * x
    t = torch.tensor([100.0, 500.0, 900.0])
    sigma = (t.double() / 1000).reshape(3, 1, 1, 1, 1)
    x_t = add_noise(x, noise, t)
    told = d.kl_gradient(
        x, d.score_x0(x_t, fake.flow(x_t, sigma), t), d.score_x0(x_t, real.flow(x_t, sigma), t),
        torch.zeros_like(x), 0.0, normalise=False,
    )  # fmt: skip
    # the difference of the scores times sigma^2 / (1 - sigma), which is the same everywhere
    gap = (real.middle(sigma) - fake.middle(sigma)) / real.width(sigma) ** 2
    assert torch.allclose(told, (-gap * sigma**2 / (1 - sigma)).expand_as(x))
    assert bool((told < 0).all())


def test_what_is_not_finite_moves_nothing() -> None:
    x, fake, cond, uncond = some(1, 2, 3, 4)
    x[0] = cond[0]
    uncond[0] = cond[0]
    fake[1, 0, 0, 0, 0] = float("nan")
    cond[2, 0, 0, 0, 0] = float("inf")
    gradient = d.kl_gradient(x, fake, cond, uncond, 3.0)
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[0].any()) and not bool(gradient[2].any())
    assert gradient[1].count_nonzero() == gradient[1].numel() - 1


def test_loss_and_gradient_of_the_generator() -> None:
    x, gradient = some(1, 2)
    moved = x.clone().requires_grad_()
    loss = d.generator_loss(moved, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(float(0.5 * ((x - (x - gradient)) ** 2).mean()))
    assert moved.grad is not None
    assert torch.allclose(moved.grad, gradient / x.numel(), rtol=1e-14)


def test_small_gradients_survive_sixteen_bits() -> None:
    x = (100 * torch.ones(SHAPE)).bfloat16().requires_grad_()
    gradient = torch.full(SHAPE, 1e-3)
    loss = d.generator_loss(x, gradient)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.5e-6)
    assert x.grad is not None
    assert float(x.grad.mean()) == pytest.approx(1e-3 / x.numel(), rel=0.01)


def test_a_mask_counts_what_it_lets_through() -> None:
    x, gradient = some(1, 2)
    pixels = latents(9, *SHAPE) > 0
    for mask in (d.gradient_window(5, 3), pixels, pixels[:, :1, :, :1, :1]):
        moved = x.clone().requires_grad_()
        loss = d.generator_loss(moved, gradient, mask)
        loss.backward()
        counted = mask.expand(SHAPE)
        assert loss.item() == pytest.approx(float(0.5 * (gradient[counted] ** 2).mean()))
        assert moved.grad is not None
        assert torch.allclose(moved.grad, gradient * counted / counted.sum())
    assert d.gradient_window(5, 3).flatten().tolist() == [False] * 3 + [True] * 2
    with pytest.raises(UserError, match="no frame"):
        d.generator_loss(x, gradient, d.gradient_window(5, 5))


def test_a_masked_frame_may_hold_anything() -> None:
    x, gradient = some(1, 2)
    gradient[:, :, :2] = float("nan")
    moved = x.requires_grad_()
    d.generator_loss(moved, gradient, d.gradient_window(5, 2)).backward()
    assert moved.grad is not None and bool(moved.grad.isfinite().all())


def test_nothing_flows_into_the_scores() -> None:
    x, fake, cond, uncond = (y.requires_grad_() for y in some(1, 2, 3, 4))
    gradient = d.kl_gradient(x, fake, cond, uncond, 3.0)
    assert not gradient.requires_grad
    d.generator_loss(x, fake - cond).backward()
    assert x.grad is not None and fake.grad is None and cond.grad is None


def critic(t: Tensor, tables: d.MixedTables | None = None) -> tuple[Tensor, Tensor, Tensor, float]:
    flow, x, noise = some(1, 2, 3)
    x_t = add_noise(x, noise, t, 5.0, "table")
    return flow, x, noise, float(d.critic_loss(flow, x, noise, x_t, t, tables))


def test_the_exact_critic_is_flow_matching() -> None:
    flow, x, noise, mine = critic(torch.tensor([30.0, 400.0, 980.0]))
    assert mine == pytest.approx(float(((flow - noise + x) ** 2).mean()))


def test_the_mixed_tables_scale_the_flow() -> None:
    t = torch.tensor([23.0, 57.1, 900.0])
    flow, x, noise, mine = critic(t, d.MixedTables())
    exact = critic(t)[-1]
    scales: list[float] = []
    for shift in (8.0, 5.0):
        u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
        table = shift * u / (1 + (shift - 1) * u)
        near = (1000 * table - t.double()[:, None]).abs().argmin(1)
        scales.append(table[near].reshape(3, 1, 1, 1, 1))
    scaled = flow * scales[0] / scales[1]
    assert mine == pytest.approx(float(((scaled - noise + x) ** 2).mean()), rel=1e-9)
    assert abs(mine - exact) > 1e-3 * exact
    same = critic(t, d.MixedTables(5.0, 5.0))[-1]
    assert same == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("tables", [None, d.MixedTables()])
def test_gradients_reach_the_critic_alone(tables: d.MixedTables | None) -> None:
    flow, x, noise = (latents(seed, 2, 1, 3, 1, 2).requires_grad_() for seed in range(3))
    t = torch.tensor([40.0, 800.0])
    x_t = add_noise(x.detach(), noise.detach(), t, 5.0, "table")
    assert torch.autograd.gradcheck(
        lambda y: d.critic_loss(y, x.detach(), noise.detach(), x_t, t, tables), (flow,)
    )
    d.critic_loss(flow, x, noise, x_t, t, tables).backward()
    assert flow.grad is not None and x.grad is None and noise.grad is None


def test_sixteen_bit_timesteps_are_refused() -> None:
    x_t, flow = some(1, 2)
    t = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    for tables in (None, d.MixedTables()):
        with pytest.raises(UserError, match="float32"):
            d.score_x0(x_t, flow, t, tables)


def test_misfits_are_told_by_name() -> None:
    x, one = some(1)[0], latents(2, 1, *SHAPE[1:])
    misfit = r" has shape \[1, 2, 5, 1, 7\], but \[3, 2, 5, 1, 7\] is wanted, that of "
    for name, call in {
        "fake_x0": lambda: d.kl_gradient(x, one, x, x, 3.0),
        "real_cond": lambda: d.kl_gradient(x, x, one, x, 3.0),
        "real_uncond": lambda: d.kl_gradient(x, x, x, one, 3.0),
        "gradient": lambda: d.generator_loss(x, one),
        "x": lambda: d.critic_loss(x, one, x, x, 3.0),
        "noise": lambda: d.critic_loss(x, x, one, x, 3.0),
        "x_t": lambda: d.critic_loss(x, x, x, one, 3.0),
        "flow": lambda: d.score_x0(x, one, 3.0),
    }.items():
        with pytest.raises(UserError, match=f"^{name}{misfit}"):
            call()
    for name, call in {
        "x": lambda y: d.kl_gradient(y, y, y, y, 3.0),
        "flow": lambda y: d.critic_loss(y, y, y, y, 3.0),
    }.items():
        with pytest.raises(UserError, match=rf"^{name} has shape \[2, 5, 7\], but latents are"):
            call(x[0, :, :, 0])
    # the axis of a mask of frames is the third, not the last
    for mask in (torch.ones(5), torch.ones(5).bool(), torch.ones(1, 1, 4, 1, 1).bool()):
        with pytest.raises(UserError, match=r"^mask "):
            d.generator_loss(x, x, mask)


@pytest.mark.parametrize("tables", [None, d.MixedTables()])
def test_the_critics_times_are_looked_at(tables: d.MixedTables | None) -> None:
    x = some(1)[0]
    for t in (
        torch.zeros(7, 5),
        torch.zeros(2),
        torch.tensor([3.0, 4.0, float("nan")]),
        1500,
        -5.0,
    ):
        with pytest.raises(UserError, match=r"^timesteps t "):
            d.critic_loss(x, x, x, x, t, tables)


@pytest.mark.parametrize("tables", [None, d.MixedTables()])
def test_single_frames_are_clips_of_one_frame(tables: d.MixedTables | None, seed: int) -> None:
    x, fake, cond, uncond = frames = [latents(seed + i, 5, 2, 3, 7) for i in range(4)]
    clips = [y[:, :, None] for y in frames]
    gradient = d.kl_gradient(x, fake, cond, uncond, 2.0)
    for sample in range(5):
        real = 3 * cond[sample] - 2 * uncond[sample]
        by = (x[sample] - real).abs().mean()
        assert torch.allclose(gradient[sample], (fake[sample] - real) / by)
    assert torch.equal(gradient, d.kl_gradient(*clips, 2.0)[:, :, 0])
    mask = latents(seed, 5, 1, 3, 1) > 0
    mask[0, 0, 0, 0] = True
    masked = d.generator_loss(x, gradient, mask)
    assert torch.equal(masked, d.generator_loss(clips[0], gradient[:, :, None], mask[:, :, None]))
    for t in (torch.tensor([1.0, 30.0, 400.0, 980.0, 1000.0]), 400, 37.5):
        mine = d.critic_loss(x, fake, cond, uncond, t, tables)
        assert torch.equal(mine, d.critic_loss(*clips, t, tables))
