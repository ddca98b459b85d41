"""The consistency step and loss against flows whose solution is known, in float64."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.gaussians import Gaussian, latents

from mla_study.errors import UserError
from mla_study.training.flow import add_noise, x0_from_flow
from mla_study.training.objectives import consistency as c

SHAPE = (3, 2, 5, 1, 7)


def levels(*shape: int) -> tuple[Tensor, Tensor]:
    """Timesteps t > t' > 0 of a shape, float64, and every number of them different."""
    t = 200 + 700 * latents(1, *shape).sigmoid()
    return t, t * (0.3 + 0.6 * latents(2, *shape).sigmoid())


def over(t: Tensor) -> Tensor:
    """Noise levels that broadcast over SHAPE."""
    sigma = t / 1000
    if sigma.ndim == 2:
        return sigma[:, None, :, None, None]
    return sigma.reshape(-1, 1, 1, 1, 1)


TIMES = [(), (3,), (3, 5)]


def test_the_grid_is_the_recorded_one_and_goes_on_to_zero(fixtures: Path) -> None:
    recorded = load_file(fixtures / "flow_scheduler.safetensors")["cd48_timesteps"].double()
    grid = c.consistency_grid(48, 5.0)
    assert grid.numel() == 49 and grid[-1] == 0 and grid[0] == 1000
    assert (grid[:-1] - recorded).abs().max() < 1e-3
    assert c.consistency_grid(1, 3.0).tolist() == [1000, 0]
    with pytest.raises(UserError, match="at least 1"):
        c.consistency_grid(0, 5.0)


def test_intervals_are_neighbours_and_all_are_drawn() -> None:
    grid = c.consistency_grid(6, 3.0)
    t, later = c.interval_timesteps(grid, 300, 4, 2, torch.Generator().manual_seed(1))
    assert t.dtype == later.dtype == torch.float32
    pairs = set(zip(t.flatten().tolist(), later.flatten().tolist(), strict=True))
    points = grid.float().tolist()
    assert pairs == set(pairwise(points))
    assert torch.equal(t[:, ::2], t[:, 1::2]) and torch.equal(later[:, ::2], later[:, 1::2])
    assert bool((t[:, 0] != t[:, 2]).any())
    whole, _ = c.interval_timesteps(grid, 50, 4, 4, torch.Generator().manual_seed(1))
    assert torch.equal(whole, whole[:, :1].expand(50, 4))


@pytest.mark.parametrize("times", TIMES)
def test_a_step_is_the_written_out_one(times: tuple[int, ...]) -> None:
    x, cond, uncond = (latents(seed, *SHAPE) for seed in (3, 4, 5))
    t, later = levels(*times)
    mine = c.consistency_step(x, cond, uncond, t, later, 3.0)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in SHAPE)).tolist():
        sample, _, frame, _, _ = place
        where = (sample, frame)[: len(times)]
        now, then = float(t[where]) / 1000, float(later[where]) / 1000
        guided = float(uncond[*place]) + 3 * (float(cond[*place]) - float(uncond[*place]))
        assert float(mine[*place]) == pytest.approx(float(x[*place]) + (then - now) * guided)


@pytest.mark.parametrize("times", TIMES)
def test_towards_a_point_one_step_of_any_length_is_exact(times: tuple[int, ...]) -> None:
    data, noise = Gaussian(0.7, 0.0), latents(6, *SHAPE)
    t, later = levels(*times)
    x = add_noise(torch.full(SHAPE, 0.7, dtype=torch.float64), noise, t)
    flow = data.flow(x, over(t))
    moved = c.consistency_step(x, flow, None, t, later, 1.0)
    assert torch.allclose(moved, data.moved(x, over(t), over(later)), atol=1e-14)
    end = c.consistency_step(x, flow, None, t, torch.zeros_like(t), 1.0)
    assert torch.allclose(end, torch.full_like(end, 0.7), atol=1e-14)


@pytest.mark.parametrize("convention", ["from_cond", "from_uncond"])
def test_of_a_guided_gaussian_the_error_of_a_step_falls_with_its_square(
    convention: c.Convention,
) -> None:
    cond, uncond, weight = Gaussian(0.9, 0.6), Gaussian(-0.3, 0.6), 3.0
    start = cond.mean if convention == "from_cond" else uncond.mean
    guided = Gaussian(start + weight * (cond.mean - uncond.mean), 0.6)
    x, t = latents(7, *SHAPE), torch.tensor([600.0, 750.0, 900.0], dtype=torch.float64)
    errors: list[float] = []
    for length in (8.0, 4.0, 2.0):
        flows = (one.flow(x, over(t)) for one in (cond, uncond))
        moved = c.consistency_step(x, *flows, t, t - length, weight, convention)
        exact = guided.moved(x, over(t), over(t - length))
        errors.append(float((moved - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_the_walk_over_the_grid_ends_where_the_flow_does() -> None:
    data, x = Gaussian(0.5, 0.4), latents(8, *SHAPE)
    exact = data.moved(x, torch.tensor(1.0), torch.tensor(0.0))
    errors: list[float] = []
    for intervals in (50, 100, 200):
        y = x
        grid = c.consistency_grid(intervals, 5.0)
        for t, later in pairwise(grid):
            y = c.consistency_step(y, data.flow(y, t / 1000), None, t, later, 1.0)
        errors.append(float((y - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_the_exact_consistency_function_has_no_loss_but_the_steps() -> None:
    data, x = Gaussian(0.5, 0.4), latents(9, *SHAPE)
    zero = torch.tensor(0.0, dtype=torch.float64)
    losses: list[float] = []
    for length in (40.0, 20.0):
        t = torch.tensor(700.0, dtype=torch.float64)
        moved = c.consistency_step(x, data.flow(x, t / 1000), None, t, t - length, 1.0)
        mine, theirs = (data.moved(y, at / 1000, zero) for y, at in ((x, t), (moved, t - length)))
        losses.append(float(c.consistency_loss(mine, theirs, distance="squared")))
        assert float(c.consistency_loss(mine, data.moved(x, t / 1000, zero))) == 0
    assert losses[0] / losses[1] == pytest.approx(16, rel=0.2)


def test_time_zero_is_noise_level_zero() -> None:
    x, flow, zero = torch.randn(SHAPE), torch.randn(SHAPE), torch.zeros(3)
    assert torch.equal(c.consistency_step(x, flow, None, zero, zero, 1.0), x)
    assert torch.equal(c.x0_from_flow(x, flow, zero), x)
    t = torch.tensor([1000.0, 937.5, 1.0])
    step = c.consistency_step(x, flow, None, t, zero, 1.0)
    assert torch.allclose(step, x0_from_flow(x, flow, t), atol=1e-6)


def test_nothing_flows_into_teacher_or_average() -> None:
    x, cond, uncond, student, average = (
        latents(seed, *SHAPE).requires_grad_() for seed in range(5)
    )
    t, later = levels(3)
    assert not c.consistency_step(x, cond, uncond, t, later, 3.0).requires_grad
    c.consistency_loss(student, average).backward()
    assert student.grad is not None and average.grad is None


def test_bad_steps_are_told() -> None:
    x, flow = torch.randn(SHAPE), torch.randn(SHAPE)
    t, later = (times.float() for times in levels(3, 5))
    for now, then in ((t.bfloat16(), later), (t, later.bfloat16()), (t.half(), later.half())):
        with pytest.raises(UserError, match="float32"):
            c.consistency_step(x, flow, flow, now, then, 3.0)
    with pytest.raises(UserError, match="swap"):
        c.consistency_step(x, flow, flow, later, t, 3.0)
    with pytest.raises(UserError, match="do not fit"):
        c.consistency_step(x, flow, flow, t[:2], later[:2], 3.0)
    with pytest.raises(UserError, match="do not fit"):
        c.consistency_step(x, flow, flow, t[:, :2], later[:, :2], 3.0)


def test_mixed_shapes_of_times_and_sixteen_bit_latents() -> None:
    x, cond, uncond = (latents(seed, *SHAPE) for seed in (3, 4, 5))
    t, later = levels(3)
    whole = c.consistency_step(x, cond, uncond, t, later, 2.0)
    spread = c.consistency_step(x, cond, uncond, t, later[:, None].expand(3, 5), 2.0)
    assert torch.equal(whole, spread)
    half = c.consistency_step(*(y.bfloat16() for y in (x, cond, uncond)), t, later, 2.0)
    assert half.dtype == torch.bfloat16
    # rounded once at the end, beside the rounding of the inputs
    assert (half.double() - whole).abs().max() < 0.02 * whole.abs().max()


def test_the_distance_is_the_published_one() -> None:
    student, average = latents(1, *SHAPE), latents(2, *SHAPE)
    scalars = student[0].numel()
    constant = 0.00054 * scalars**0.5
    total = 0.0
    for mine, theirs in zip(student, average, strict=True):
        norm = float((mine - theirs).norm())
        total += ((norm**2 + constant**2) ** 0.5 - constant) / scalars**0.5
    assert float(c.consistency_loss(student, average)) == pytest.approx(total / 3, rel=1e-12)
    squared = float(((student - average) ** 2).mean())
    assert float(c.consistency_loss(student, average, distance="squared")) == pytest.approx(squared)
    weight = torch.tensor([2.0, 0.0, 1.0])
    weighted = c.consistency_loss(student, average, weight, "squared")
    by_hand = sum(w * float(((student - average)[i] ** 2).mean()) for i, w in enumerate([2, 0, 1]))
    assert float(weighted) == pytest.approx(by_hand / 3)
    with pytest.raises(UserError, match="positive"):
        c.consistency_loss(student, average, constant=0.0)


def test_the_distance_knows_no_size_and_keeps_small_gaps() -> None:
    student, average = latents(1, *SHAPE), latents(2, *SHAPE)
    tiled = c.consistency_loss(student.repeat(1, 1, 2, 3, 1), average.repeat(1, 1, 2, 3, 1))
    assert float(tiled) == pytest.approx(float(c.consistency_loss(student, average)))
    tiny = torch.full(SHAPE, 1e-7)
    mine = c.consistency_loss(tiny, torch.zeros(SHAPE))
    assert float(mine) == pytest.approx(1e-14 / (2 * c.HUBER), rel=1e-3)


@pytest.mark.parametrize("distance", ["pseudo_huber", "squared"])
def test_gradients_of_the_loss(distance: c.Distance) -> None:
    average, weight = latents(2, 2, 1, 3, 1, 2), torch.tensor([0.3, 2.0])
    for student in (latents(1, 2, 1, 3, 1, 2), average + 1e-5 * latents(1, 2, 1, 3, 1, 2)):
        assert torch.autograd.gradcheck(
            lambda y: c.consistency_loss(y, average, weight, distance),
            (student.clone().requires_grad_(),),
        )
    same = average.clone().requires_grad_()
    c.consistency_loss(same, average, weight, distance).backward()
    assert same.grad is not None and not bool(same.grad.any())


def test_gradients_go_through_the_students_flow() -> None:
    x, average, t = latents(1, *SHAPE), latents(2, *SHAPE), levels(3, 5)[0]
    assert torch.autograd.gradcheck(
        lambda flow: c.consistency_loss(x0_from_flow(x, flow, t), average),
        (latents(3, *SHAPE).requires_grad_(),),
    )


def test_misfits_are_told_by_name() -> None:
    x, one = latents(1, *SHAPE), latents(2, 1, *SHAPE[1:])
    misfit = r" has shape \[1, 2, 5, 1, 7\], but \[3, 2, 5, 1, 7\] is wanted"
    for name, call in {
        "flow_cond": lambda: c.consistency_step(x, one, None, 3.0, 2.0, 1.0),
        "flow_uncond": lambda: c.consistency_step(x, x, one, 3.0, 2.0, 3.0),
        "ema_x0": lambda: c.consistency_loss(x, one),
    }.items():
        with pytest.raises(UserError, match=f"^{name}{misfit}"):
            call()
    for shape in ((1,), (5,), (3, 1), ()):
        with pytest.raises(UserError, match=r"^weight has shape .*, but \[3\] is wanted, one a s"):
            c.consistency_loss(x, x, latents(3, *shape))
    with pytest.raises(UserError, match=r"^student_x0 has shape \[7\], but samples"):
        c.consistency_loss(x[0, 0, 0, 0], x[0, 0, 0, 0])
    for now, then, told in ((1500.0, 3.0, "t hold 1500"), (500.0, -100.0, "t_next hold -100")):
        with pytest.raises(UserError, match=f"timesteps {told}, but they lie from 0 to 1000"):
            c.consistency_step(x, x, x, now, torch.tensor([then, 3.0, 4.0]), 3.0)
    with pytest.raises(UserError, match=r"timesteps t_next of shape \[2\] do not fit"):
        c.consistency_step(x, x, x, 900.0, torch.tensor([2.0, 3.0]), 3.0)


def test_single_frames_and_numbers_do_as_well(seed: int) -> None:
    x, cond, uncond = (latents(seed + i, 5, 2, 3, 7) for i in range(3))
    t, later = levels(5)
    clips = [y[:, :, None] for y in (x, cond, uncond)]
    mine = c.consistency_step(x, cond, uncond, t, later, 2.5)
    whole = c.consistency_step(*clips, t, later, 2.5)
    assert torch.equal(mine, whole[:, :, 0])
    assert torch.equal(c.consistency_loss(x, cond), c.consistency_loss(*clips[:2]))
    ends = c.consistency_step(x, cond, uncond, 1000, 0, 2.5)
    assert torch.allclose(ends, x - uncond - 2.5 * (cond - uncond))
