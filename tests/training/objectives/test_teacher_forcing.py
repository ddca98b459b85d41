"""Teacher forcing: the loss against a loop, the masked pass against a rollout through a cache."""

from __future__ import annotations

import pytest
import torch
from model.tiny import BOTH, make, step
from torch import Tensor
from training.gaussians import latents

from mla_study.config import WindowConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import Positions
from mla_study.model.cache import RollingCache
from mla_study.rollout.sampler import bell_weight_at
from mla_study.training.flow import add_noise, block_timesteps
from mla_study.training.objectives.teacher_forcing import (
    clean_and_noisy,
    teacher_forcing,
    teacher_forcing_flow,
    teacher_forcing_loss,
)

WINDOW = WindowConfig(sink=1, history=2, chunk=2)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    clean, noise = (latents(seed + i, 2, 3, 8, 4, 6).to(dtype) for i in range(2))
    t = block_timesteps(2, 8, 2, 5.0, torch.Generator().manual_seed(seed))
    return clean, noise, t, latents(seed, 2, 5, 7).to(dtype)


def test_the_loss_is_the_loop_over_frames() -> None:
    clean, noise, t, _ = batch(1)
    flow = latents(9, *clean.shape)
    total = 0.0
    for sample in range(2):
        for frame in range(8):
            gap = (flow - (noise - clean))[sample, :, frame]
            total += float(bell_weight_at(t[sample, frame], 5.0)) * float((gap**2).mean())
    assert float(teacher_forcing_loss(flow, clean, noise, t, 5.0)) == pytest.approx(total / 16)
    assert float(teacher_forcing_loss(noise - clean, clean, noise, t, 5.0)) == 0
    plain = teacher_forcing_loss(flow, clean, noise, t, 5.0, "uniform")
    assert float(plain) == pytest.approx(float(((flow - noise + clean) ** 2).mean()))
    with pytest.raises(UserError, match="float32"):
        teacher_forcing_loss(flow, clean, noise, t.bfloat16(), 5.0)


@pytest.mark.parametrize("kind", ["dense", "latent"])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_the_windowed_pass_is_the_rollout_over_clean_history(
    kind: str, positions: Positions
) -> None:
    model = make(BOTH[kind], 2, torch.float64)
    clean, noise, t, text = batch(4)
    noisy = add_noise(clean, noise, t)
    with torch.no_grad():
        conditioning = model.condition(text)
        rule = teacher_forcing(8, 2, WINDOW, positions)
        mine = teacher_forcing_flow(model, noisy, clean, t, conditioning, rule)
        cache = RollingCache(model.config, WINDOW, 2, 6, "fp64")
        flows: list[Tensor] = []
        for start in range(0, 8, 2):
            inside, ids = slice(start, start + 2), range(start, start + 2)
            flows.append(
                step(model, noisy[:, :, inside], t[:, inside], conditioning, cache, ids, positions)
            )
            zero = torch.zeros(2, 2)
            step(model, clean[:, :, inside], zero, conditioning, cache, ids, positions)
    rolled = torch.cat(flows, dim=2)
    assert (mine - rolled).abs().max() < 1e-9
    whole = teacher_forcing_loss(mine, clean, noise, t, 5.0)
    by_chunk = [
        teacher_forcing_loss(
            rolled[:, :, i : i + 2], clean[:, :, i : i + 2], noise[:, :, i : i + 2],
            t[:, i : i + 2], 5.0,
        )
        for i in range(0, 8, 2)
    ]  # fmt: skip
    assert float(whole) == pytest.approx(float(torch.stack(by_chunk).mean()))


def test_a_chunk_never_sees_its_own_clean_frames() -> None:
    model = make(BOTH["latent"], 3, torch.float64)
    clean, noise, t, text = batch(5)
    noisy, rule = add_noise(clean, noise, t), teacher_forcing(8, 2, WINDOW, "relative")
    other = clean.clone()
    other[:, :, 4:] += 1
    with torch.no_grad():
        conditioning = model.condition(text)
        first, second = (
            teacher_forcing_flow(model, noisy, context, t, conditioning, rule)
            for context in (clean, other)
        )
    assert torch.equal(first[:, :, :6], second[:, :, :6])
    assert not torch.allclose(first[:, :, 6:], second[:, :, 6:])


def test_every_weight_of_the_student_gets_a_gradient() -> None:
    model = make(BOTH["latent"], 6, torch.float32)
    clean, noise, t, text = batch(7, torch.float32)
    rule = teacher_forcing(8, 2, WINDOW, "relative")
    flow = teacher_forcing_flow(
        model, add_noise(clean, noise, t), clean, t, model.condition(text), rule
    )
    teacher_forcing_loss(flow, clean, noise, t, 5.0).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None and bool(value.grad.isfinite().all()), name
        assert bool(value.grad.abs().max() > 0), name


def test_clean_frames_are_at_time_zero_or_where_they_were_put() -> None:
    clean, noise, t, _ = batch(8)
    both, times = clean_and_noisy(clean, noise, t)
    assert torch.equal(both, torch.cat([clean, noise], dim=2))
    assert torch.equal(times, torch.cat([torch.zeros(2, 8), t], dim=1))
    _, times = clean_and_noisy(clean, noise, torch.tensor([5.0, 6.0]), torch.tensor(20.0))
    assert times.tolist() == [[20.0] * 8 + [5.0] * 8, [20.0] * 8 + [6.0] * 8]


def test_a_rule_of_other_frames_is_refused() -> None:
    model = make(BOTH["dense"], 1)
    clean, noise, t, text = batch(2, torch.float32)
    with pytest.raises(UserError, match="16"):
        teacher_forcing_flow(
            model, noise, clean, t, model.condition(text), teacher_forcing(4, 2, WINDOW)
        )


def test_misfits_are_told_by_name() -> None:
    clean, noise, t, _ = batch(3)
    misfit = r" has shape \[1, 3, 8, 4, 6\], but \[2, 3, 8, 4, 6\] is wanted, that of "
    for name, call in {
        "clean": lambda: teacher_forcing_loss(clean, clean[:1], noise, t, 5.0),
        "noise": lambda: teacher_forcing_loss(clean, clean, noise[:1], t, 5.0),
        "clean ": lambda: clean_and_noisy(clean[:1], noise, t),
    }.items():
        with pytest.raises(UserError, match=f"^{name.strip()}{misfit}"):
            call()
    with pytest.raises(UserError, match=r"timesteps t of shape \[3, 5\] do not fit 2 samples of 8"):
        teacher_forcing_loss(clean, clean, noise, torch.zeros(3, 5), 5.0)
    with pytest.raises(UserError, match="timesteps clean_t hold -1, but they lie"):
        clean_and_noisy(clean, noise, 3, -1.0)


def test_single_frames_are_clips_of_one_frame(seed: int) -> None:
    flow, clean, noise = (latents(seed + i, 5, 2, 3, 7) for i in range(3))
    t = torch.tensor([0.0, 3.0, 400.0, 930.0, 1000.0])
    total = 0.0
    for sample in range(5):
        gap = (flow - (noise - clean))[sample]
        total += float(bell_weight_at(t[sample], 5.0)) * float((gap**2).mean())
    assert float(teacher_forcing_loss(flow, clean, noise, t, 5.0)) == pytest.approx(total / 5)
    number = teacher_forcing_loss(flow, clean, noise, 400, 5.0)
    assert torch.equal(number, teacher_forcing_loss(flow, clean, noise, t[2], 5.0))
