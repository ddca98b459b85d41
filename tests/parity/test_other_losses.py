"""Recorded losses of other sizes, shifts, weights and masks, made by formulas written out here."""

from __future__ import annotations

import pytest
import torch
from parity.making import Save, replay
from parity.recording import Recording
from torch import Tensor

from mla_study.kernels.masks import teacher_forcing
from mla_study.model.transformer import WanTransformer


def table(shift: float) -> Tensor:
    u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    return shift * u / (1 + (shift - 1) * u)


def level(t: Tensor, shift: float) -> Tensor:
    """Sigma of the nearest entry, over latents [B, F, C, height, width]."""
    near = (1000 * table(shift) - t.double()[..., None]).abs().argmin(-1)
    return table(shift)[near][..., None, None, None]


def drawn(samples: int, frames: int, shift: float, low: float, high: float) -> Tensor:
    u = torch.randint(0, 1000, (samples, 1)).double() / 1000
    t = 1000 * shift * u / (1 + (shift - 1) * u)
    return t.clamp(low, high).float().expand(samples, frames)


def dmd(
    shape: tuple[int, ...], shift: float, guidance: float, fake_guidance: float, first: int,
    bounds: tuple[float, float], wrapper_shift: float = 8.0,
) -> tuple[dict[str, Tensor], dict[str, object]]:  # fmt: skip
    names = ("x", "noise", "pred_fake_cond", "pred_fake_uncond", "pred_real_cond",
             "pred_real_uncond", "critic_flow")  # fmt: skip
    out = {name: torch.randn(shape) for name in names}
    x, noise, flow = out["x"].double(), out["noise"].double(), out["critic_flow"].double()
    samples, frames = shape[:2]
    for prefix in ("", "critic_"):
        t = out[f"{prefix}timestep"] = drawn(samples, frames, shift, *bounds)
        sigma = level(t, shift)
        out[f"{prefix}noisy"] = ((1 - sigma) * x + sigma * noise).float()
    fake, fake_un = out["pred_fake_cond"].double(), out["pred_fake_uncond"].double()
    real, real_un = out["pred_real_cond"].double(), out["pred_real_uncond"].double()
    real = (1 + guidance) * real - guidance * real_un
    fake = (1 + fake_guidance) * fake - fake_guidance * fake_un
    if not fake_guidance:
        out["pred_fake"] = out.pop("pred_fake_cond")
        del out["pred_fake_uncond"]
    gradient = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    some = torch.rand(shape) > 0.5
    t = out["critic_timestep"]
    scaled = flow * level(t, wrapper_shift) / level(t, shift)
    out |= {
        "kl_grad": gradient.float(),
        "loss": 0.5 * gradient.square().mean()[None],
        "grad_x": (gradient / gradient.numel()).float(),
        "loss_masked_first_block": 0.5 * gradient[:, first:].square().mean()[None],
        "loss_masked_random": 0.5 * gradient[some].square().mean()[None],
        "gradient_mask_random": some.to(torch.uint8),
        "critic_loss_exact": (flow - noise + x).square().mean()[None].float(),
        "critic_loss_upstream": (scaled - noise + x).square().mean()[None].float(),
    }
    meanings = {
        "loss_masked_first_block": f"gradient_mask False on the first {first} frames",
        "critic_loss_upstream": f"flow loss through shift-{wrapper_shift:g} then shift-{shift:g}",
    }
    hyper = {
        "real_guidance_scale": guidance, "fake_guidance_scale": fake_guidance,
        "timestep_shift": shift, "min_step": bounds[0], "max_step": bounds[1],
    }  # fmt: skip
    return out, {"hyper": hyper, "tensors": {k: {"meaning": v} for k, v in meanings.items()}}


@pytest.mark.parametrize(
    ("shape", "shift", "guidance", "fake_guidance", "first", "bounds"),
    [
        ((1, 9, 2, 3, 1), 5.0, 3.0, 0.0, 3, (20, 980)),
        ((3, 5, 4, 1, 7), 3.0, 1.5, 2.0, 2, (20, 980)),
        ((2, 2, 3, 2, 2), 8.0, 6.0, 0.5, 1, (100, 700)),
        ((4, 3, 1, 2, 5), 1.0, 0.0, 0.0, 1, (20, 25)),
    ],
)
def test_distribution_matching(
    save: Save, seed: int, shape: tuple[int, ...], shift: float, guidance: float,
    fake_guidance: float, first: int, bounds: tuple[float, float],
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    rec = save("dmd_losses_other", *dmd(shape, shift, guidance, fake_guidance, first, bounds))
    replay(rec)
    assert not rec.failures and not rec.unread()


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("kl_grad", 1e-3), ("loss", 1e-3), ("grad_x", 1e-4), ("loss_masked_first_block", 1e-3),
        ("loss_masked_random", 1e-3), ("critic_loss_upstream", 1e-3), ("critic_loss_exact", 1e-3),
    ],
)  # fmt: skip
def test_a_wrong_number_is_found(save: Save, name: str, by: float) -> None:
    torch.manual_seed(1)
    tensors, facts = dmd((2, 3, 2, 2, 3), 5.0, 3.0, 0.0, 1, (20, 980))
    tensors[name] = tensors[name] + by
    rec = save("dmd_losses_wrong", tensors, facts)
    replay(rec)
    assert [line.split(":")[0] for line in rec.failures] == [name]


@pytest.mark.parametrize("told", ["real_guidance_scale", "fake_guidance_scale"])
def test_a_wrong_weight_is_found(save: Save, told: str) -> None:
    torch.manual_seed(1)
    tensors, facts = dmd((2, 3, 2, 2, 3), 5.0, 3.0, 1.0, 1, (20, 980))
    hyper = facts["hyper"]
    assert isinstance(hyper, dict)
    hyper[told] += 1
    rec = save("dmd_losses_wrong", tensors, facts)
    replay(rec)
    assert rec.failures


def teacher(
    save: Save, model: WanTransformer, frames: int, chunk: int, shift: float, augmented: bool,
    spoil: float = 0.0,
) -> Recording:  # fmt: skip
    shape = (2, frames, 3, 6, 4)
    clean, noise, context = torch.randn(shape), torch.randn(shape), torch.randn(2, 4, 7)
    index = torch.randint(0, 1000, (2, frames // chunk)).repeat_interleave(chunk, 1)
    t = (1000 * table(shift))[index].float()
    sigma = table(shift)[index][..., None, None, None]
    noisy = ((1 - sigma) * clean + sigma * noise).float()
    out = {"clean": clean, "noise": noise, "context": context, "timestep": t, "noisy": noisy}
    past, past_t = clean, torch.zeros_like(t)
    if augmented:
        past_t = (1000 * table(shift))[900 + index // 10].float()
        raised = level(past_t, shift)
        past = ((1 - raised) * clean + raised * noise).float()
        out |= {"aug_t": past_t, "clean_aug": past}
    with torch.no_grad():
        both = torch.cat([past, noisy], dim=1).transpose(1, 2)
        rule = teacher_forcing(frames, chunk)
        flow = model(both, torch.cat([past_t, t], dim=1), model.condition(context), rule)
    flow = out["flow"] = flow[:, :, frames:].transpose(1, 2).clone()
    bell = torch.exp(-2 * ((1000 * table(shift) - 500) / 1000) ** 2)
    bell = bell - bell.min()
    weight = (bell / bell.mean())[index]
    error = (flow - noise + clean).double().square().mean(dim=(2, 3, 4))
    out |= {
        "weight": weight.float(),
        "loss": (weight * error).mean()[None].float() + spoil,
        "loss_unweighted": error.mean()[None].float(),
    }
    meaning = {"timestep": {"meaning": f"a value of the shift-{shift:g} table"}}
    return save("tf_loss_other", out, {"num_frame_per_block": chunk, "tensors": meaning})


@pytest.mark.parametrize(
    ("frames", "chunk", "shift", "augmented"),
    [(4, 1, 5.0, False), (6, 2, 3.0, True), (5, 5, 8.0, False)],
)
def test_teacher_forcing(
    save: Save, model: WanTransformer, seed: int, frames: int, chunk: int, shift: float,
    augmented: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    rec = teacher(save, model, frames, chunk, shift, augmented)
    replay(rec)
    assert not rec.failures and not rec.unread()


def test_a_wrong_loss_is_found(save: Save, model: WanTransformer) -> None:
    torch.manual_seed(1)
    rec = teacher(save, model, 4, 2, 5.0, False, spoil=1e-3)
    replay(rec)
    assert {line.split(":")[0] for line in rec.failures} == {"loss"}
