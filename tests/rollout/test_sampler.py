"""Flow arithmetic against recorded outputs of the reference code, and solvers on a known flow."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mla_study.errors import UserError
from mla_study.rollout import sampler as s


@pytest.fixture(scope="module")
def recorded(fixtures: Path) -> dict[str, Tensor]:
    return load_file(fixtures / "flow_scheduler.safetensors")


def close(mine: Tensor, theirs: Tensor, tolerance: float = 2e-6) -> None:
    assert mine.shape == theirs.shape
    assert (mine.double() - theirs.double()).abs().max() <= tolerance * max(1, theirs.abs().max())


@pytest.mark.parametrize("shift", [5, 8])
def test_tables_are_the_recorded_ones(recorded: dict[str, Tensor], shift: int) -> None:
    close(s.sigma_table(shift), recorded[f"sigmas_shift{shift}"])
    close(s.timestep_table(shift), recorded[f"timesteps_shift{shift}"])
    close(s.bell_weights(shift), recorded[f"train_weight_shift{shift}"], 1e-4)
    close(s.warped_steps((1000, 750, 500, 250), shift), recorded[f"warped_steps_shift{shift}"])


def test_consistency_grid(recorded: dict[str, Tensor]) -> None:
    close(s.sigma_table(5, 48), recorded["cd48_sigmas"])
    close(s.timestep_table(5, 48), recorded["cd48_timesteps"])
    assert s.sigma_table(5, 7, extra_one_step=False)[-1] == 0


def test_few_steps_warp_to_the_papers() -> None:
    steps = s.warped_steps((1000, 750, 500, 250), 5)
    assert steps.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625])


def test_conversions_are_the_recorded_ones(recorded: dict[str, Tensor]) -> None:
    x0, noise, flow, t = (recorded[k] for k in ("x0", "noise", "flow", "t"))
    x_t = s.add_noise(x0, noise, t, 5, "table")
    close(x_t, recorded["add_noise"])
    close(s.x0_from_flow(x_t, flow, t, 5, "table"), recorded["x0_from_flow_table5"])
    by8 = s.x0_from_flow(x_t, flow, t, 8, "table")
    close(by8, recorded["x0_from_flow_table8"])
    late = t >= 20
    close(
        s.flow_from_x0(x_t[late], by8[late], t[late], 5, "table"),
        recorded["flow_roundtrip_8to5"],
        1e-5,
    )
    close(
        s.flow_from_x0(x_t[late], x0[late], t[late], 5, "table"),
        recorded["flow_from_x0_table5"],
        1e-5,
    )
    close(s.flow_target(x0, noise), recorded["train_target"])
    close(s.bell_weight_at(t, 5), recorded["train_weight_at_t"], 1e-4)
    close(
        s.shifted_timesteps(recorded["dmd_uniform_t"], 5).clamp(20, 980),
        recorded["dmd_shifted_clamped_t"],
    )


def test_time_zero_is_clean_only_in_the_exact_look_up() -> None:
    zero = torch.zeros(3)
    assert s.sigma_at(zero).tolist() == [0, 0, 0]
    assert s.sigma_at(zero, "table", 5)[0] == pytest.approx(0.005 / 1.004)
    x0, noise = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    assert torch.equal(s.add_noise(x0, noise, zero), x0)
    with pytest.raises(UserError, match="timestep 0"):
        s.flow_from_x0(x0, x0, zero)


def test_round_trip_with_a_time_a_frame() -> None:
    x0, noise = torch.randn(2, 3, 5, 2, 4), torch.randn(2, 3, 5, 2, 4)
    t = 1 + 999 * torch.rand(2, 5)
    x_t = s.add_noise(x0, noise, t)
    sigma = t[1, 3] / 1000
    assert torch.allclose(x_t[1, :, 3], (1 - sigma) * x0[1, :, 3] + sigma * noise[1, :, 3])
    close(s.x0_from_flow(x_t, s.flow_target(x0, noise), t), x0)
    close(s.flow_from_x0(x_t, x0, t), noise - x0, 1e-3)
    assert s.add_noise(x0.bfloat16(), noise, t).dtype == torch.bfloat16
    with pytest.raises(UserError, match="do not fit"):
        s.add_noise(x0, noise, torch.rand(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_are_kept_out_of_sixteen_bits(dtype: torch.dtype) -> None:
    assert float(torch.tensor(937.5).bfloat16()) == 936
    for call in (s.sigma_at, s.bell_weight_at, lambda t: s.shifted_timesteps(t, 5)):
        with pytest.raises(UserError, match="float32"):
            call(torch.tensor([937.5], dtype=dtype))


@pytest.mark.parametrize("lookup", ["exact", "table"])
def test_times_may_be_numbers_and_lie_in_the_range(lookup: s.Lookup) -> None:
    x0, noise = torch.randn(3, 2, 5, 1, 7), torch.randn(3, 2, 5, 1, 7)
    for t in (250, 937.5, torch.tensor([250, 3, 1000])):
        same = torch.as_tensor(t, dtype=torch.float64).expand(3)
        assert torch.equal(
            s.add_noise(x0, noise, t, 5, lookup), s.add_noise(x0, noise, same, 5, lookup)
        )
    for wrong in (1500.0, -5.0, float("nan")):
        for t in (wrong, torch.tensor([3.0, wrong, 4.0])):
            for call in (
                lambda t: s.add_noise(x0, noise, t, 5, lookup),
                lambda t: s.x0_from_flow(x0, noise, t, 5, lookup),
                lambda t: s.flow_from_x0(x0, noise, t, 5, lookup),
                s.bell_weight_at,
                lambda t: s.shifted_timesteps(t, 5),
            ):
                with pytest.raises(
                    UserError, match=r"timesteps t hold (1500|-5|nan), but they lie"
                ):
                    call(t)


def test_an_unknown_look_up_is_refused() -> None:
    # without the checker of the test run, which would refuse it first
    sigma_at = inspect.unwrap(s.sigma_at)
    with pytest.raises(UserError, match="look-up 'foo': give exact or table"):
        sigma_at(torch.tensor(3.0), "foo")


def test_nothing_is_broadcast_but_times() -> None:
    x, one = torch.randn(3, 2, 5, 1, 7), torch.randn(1, 2, 5, 1, 7)
    for name, call in {
        "noise": lambda: s.add_noise(x, one, 3.0),
        "flow": lambda: s.x0_from_flow(x, one, 3.0),
        "x0": lambda: s.flow_from_x0(x, one, 3.0),
        "uncond": lambda: s.guide(x, one, 3.0, "from_cond"),
    }.items():
        with pytest.raises(UserError, match=rf"^{name} has shape \[1, 2, 5, 1, 7\], but \[3, 2, 5"):
            call()
    with pytest.raises(UserError, match=r"^noise has shape \[3, 2, 5, 1, 7\], but \[1, 2"):
        s.flow_target(one, x)


def test_single_frames_have_a_time_each() -> None:
    x0, noise, t = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7), torch.rand(3) * 1000
    mine = s.add_noise(x0, noise, t)
    assert torch.equal(mine, s.add_noise(x0[:, :, None], noise[:, :, None], t)[:, :, 0])
    assert torch.equal(mine, s.add_noise(x0, noise, t[:, None]))
    with pytest.raises(UserError, match=r"timesteps t of shape \[3, 5\] do not fit"):
        s.add_noise(x0, noise, torch.rand(3, 5))


def test_the_two_guidances_differ_by_one() -> None:
    cond, uncond = torch.randn(4), torch.randn(4)
    assert torch.allclose(s.guide(cond, uncond, 3, "from_cond"), 4 * cond - 3 * uncond)
    assert torch.allclose(s.guide(cond, uncond, 3, "from_uncond"), 3 * cond - 2 * uncond)
    assert torch.allclose(
        s.guide(cond, uncond, 2, "from_cond"), s.guide(cond, uncond, 3, "from_uncond")
    )


def gaussian_flow(mean: float, spread: float):
    """The exact flow of data N(mean, spread^2): E[noise - x0 | x_t], and where it takes x."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        sigma = (t.double() / 1000).reshape(-1, *(1 for _ in x.shape[1:]))
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        score = (x - (1 - sigma) * mean) / variance
        return sigma * score - (mean + (1 - sigma) * spread**2 * score)

    return velocity, lambda x: mean + spread * x


@pytest.mark.parametrize("name", ["euler", "unipc", "dpmpp"])
def test_solvers_converge_to_the_known_solution(name: str) -> None:
    velocity, end = gaussian_flow(0.7, 0.4)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    errors: list[float] = []
    for steps in (10, 40):
        samples = s.solve(name, x, velocity, steps, 3.0)
        assert len(samples) == steps + 1 and torch.equal(samples[0], x)
        errors.append(float((samples[-1] - end(x)).abs().max() / x.abs().max()))
    assert errors[1] < errors[0] / (2.5 if name == "euler" else 6)
    assert errors[1] < (0.1 if name == "euler" else 0.003)


def test_euler_is_the_plain_sum_and_asks_wans_times() -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return torch.ones_like(x)

    samples = s.solve("euler", torch.zeros(1, 2), velocity, 4, 5.0)
    assert asked == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert samples[-1].tolist() == [pytest.approx([-1, -1])]
    assert samples[1][0, 0] == pytest.approx(-0.0625)


def test_bad_solvers_are_told() -> None:
    for name, steps in (("heun", 3), ("euler", 0)):
        with pytest.raises(UserError):
            s.solve(name, torch.zeros(1, 2), lambda x, t: x, steps)
    with pytest.raises(UserError, match="positive"):
        s.sigma_table(0)
