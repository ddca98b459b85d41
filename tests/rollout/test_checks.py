"""Misfits are told by name, on the CPU by value too; elsewhere a wrong timestep gives NaN."""

from __future__ import annotations

import math

import pytest
import torch

from mla_study.errors import UserError
from mla_study.rollout import checks as c
from mla_study.rollout import sampler as s


def test_a_misfit_is_told_by_name_and_both_shapes() -> None:
    x = torch.zeros(3, 2, 5, 1, 7)
    c.require_like(x, "x", x0=x, name=x, nothing=None)
    for wrong in ((1, 2, 5, 1, 7), (3, 2, 5, 1), (3, 2, 5, 1, 7, 1), ()):
        told = (
            rf"second has shape \[{', '.join(map(str, wrong))}\], but \[3, 2, 5, 1, 7\] is wanted"
        )
        with pytest.raises(UserError, match=told + ", that of x$"):
            c.require_like(x, "x", first=x, second=torch.zeros(wrong))


def test_a_mask_says_of_every_axis_its_length_or_one() -> None:
    x = torch.zeros(3, 2, 5, 1, 7)
    for shape in ((3, 2, 5, 1, 7), (1, 1, 5, 1, 1), (3, 1, 1, 1, 7)):
        c.require_mask("mask", torch.ones(shape, dtype=torch.bool), x)
    for shape in ((7,), (5, 1, 7), (1, 1, 4, 1, 1), (1, 3, 2, 5, 1, 7)):
        with pytest.raises(UserError, match=r"mask has shape .* but \[3, 2, 5, 1, 7\] is wanted"):
            c.require_mask("mask", torch.ones(shape, dtype=torch.bool), x)
    with pytest.raises(UserError, match=r"mask is float32, but bool is wanted: mask\.bool\(\)"):
        c.require_mask("mask", torch.ones(3, 2, 5, 1, 7), x)


def test_single_frames_are_clips_of_one_frame() -> None:
    x = torch.randn(3, 2, 5, 7)
    assert torch.equal(c.as_clips(x, "x"), x[:, :, None])
    clip = x[:, :, None]
    assert c.as_clips(clip, "x") is clip
    for shape in ((3, 2, 5), (1, 3, 2, 5, 1, 7), ()):
        with pytest.raises(UserError, match=r"x has shape .*, but latents are \[B, C, F, height"):
            c.as_clips(torch.zeros(shape), "x")


def test_timesteps_may_be_numbers_and_lie_from_zero_to_a_thousand() -> None:
    for number in (0, 1000, 937.5):
        told = c.timesteps(number)
        assert told.shape == () and told.dtype == torch.float64 and told.item() == number
    whole = c.timesteps(torch.tensor([[0, 1000]]))
    assert whole.dtype == torch.float64 and whole.tolist() == [[0, 1000]]
    single = torch.tensor([0.0, 1000.0])
    assert c.timesteps(single) is single
    # a shift whose last entry rounding has moved above 1000
    assert c.timesteps(1000 * 0.1 / (1 + (0.1 - 1))).item() > 1000
    for wrong, shown in ((1500, "1500"), (-5, "-5"), (1000.01, "1000.01"), (math.nan, "nan")):
        for t in (wrong, torch.tensor([[3.0, 4.0], [wrong, 5.0]])):
            with pytest.raises(
                UserError, match=f"timesteps when hold {shown}, but they lie from 0"
            ):
                c.timesteps(t, "when")
    for dtype in (torch.float16, torch.bfloat16, torch.complex64, torch.bool):
        with pytest.raises(UserError, match=str(dtype).removeprefix("torch.") + ".*: give float32"):
            c.timesteps(torch.ones(2).to(dtype))


def test_values_are_looked_at_on_the_cpu_alone() -> None:
    # to look at what lies on this device is an error
    t, x = torch.empty(3, 5, device="meta"), torch.empty(3, 2, 5, 1, 7, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((t > 0).all())
    assert c.timesteps(t).shape == (3, 5)
    c.require_like(x, "x", y=x)
    c.require_mask("mask", x > 0, x)
    for lookup in ("exact", "table"):
        assert s.add_noise(x, x, t, 5.0, lookup).shape == x.shape


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    t = torch.tensor([0.0, -5.0, 1000.0, 1500.0, math.nan], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        told = c.timesteps(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert told.isnan().tolist() == [False, True, False, True, True]
    assert told[[0, 2]].tolist() == [0, 1000] and told.dtype == torch.float32
    for levels in (s.sigma_at(t), s.sigma_at(t, "table"), s.bell_weight_at(t)):
        assert levels.isnan().tolist() == told.isnan().tolist()
