"""Replay of recorded training losses; shifts, weights and masks are read from the recording."""

from __future__ import annotations

import torch
from parity.recording import Recording, frames_first
from parity.scheduler_replay import told_number
from torch import Tensor

from mla_study.config import FlowConfig, WindowConfig
from mla_study.kernels.masks import teacher_forcing
from mla_study.rollout.sampler import add_noise
from mla_study.training.flow import flow_matching_loss, loss_weights, weighted_loss
from mla_study.training.objectives.distribution_matching import (
    MixedTables,
    critic_loss,
    generator_loss,
    gradient_window,
    kl_gradient,
)
from mla_study.training.objectives.teacher_forcing import teacher_forcing_flow


def tf_loss(rec: Recording) -> None:
    """The masked pass over clean and noisy copies, its weights and its loss."""
    clean, noise = frames_first(rec["clean"]), frames_first(rec["noise"])
    t, chunk, frames = rec["timestep"], rec.facts["num_frame_per_block"], rec["clean"].shape[1]
    rec.grid(clean)
    shift = _table_shift(rec, rec.meaning("timestep"), clean, noise)
    rec.same("noisy", frames_first(add_noise(clean, noise, t, shift, "table")))
    context, clean_t = _augmented(rec, clean, noise, shift)
    flow = teacher_forcing_flow(
        rec.model, frames_first(rec["noisy"]), context, t,
        rec.model.condition(rec["context"]), teacher_forcing(frames, chunk), clean_t,
    )  # fmt: skip
    rec.same("flow", frames_first(flow))
    rec.same("weight", loss_weights(t, shift, "bell"))
    for theirs in (flow, frames_first(rec["flow"])):
        made = weighted_loss(theirs, clean, noise, t, shift, "bell")
        rec.same("loss", _scalar(made, rec["loss"]))
        if "loss_unweighted" in rec:
            plain = flow_matching_loss(theirs, clean, noise)
            rec.same("loss_unweighted", _scalar(plain, rec["loss_unweighted"]))


def _augmented(
    rec: Recording, clean: Tensor, noise: Tensor, shift: float
) -> tuple[Tensor, Tensor | None]:
    """The context and its timesteps, which noise augmentation raises above 0."""
    name = next((n for n in ("aug_t", "timestep_clean_aug") if n in rec), None)
    if name is None:
        return clean, None
    context = add_noise(clean, noise, rec[name], shift, "table")
    for copy in ("clean_aug", "clean_latent_aug"):
        if copy in rec:
            rec.same(copy, frames_first(context))
    return context, rec[name]


def dmd_losses(rec: Recording) -> None:
    """Gradient of the two scores, the generator's losses and gradient, and the critic's."""
    told = rec.facts.get("hyper", {})
    x, noise = frames_first(rec["x"]), frames_first(rec["noise"])
    table = _table_shift(rec, "", x, noise)
    rec.same("noisy", frames_first(add_noise(x, noise, rec["timestep"], table, "table")))
    gradient = kl_gradient(
        x, _guided_fake(rec, float(told.get("fake_guidance_scale", 0.0))),
        frames_first(rec["pred_real_cond"]), frames_first(rec["pred_real_uncond"]),
        float(told.get("real_guidance_scale", told.get("guidance_scale", 3.0))),
        normalise=bool(told.get("normalization", True)),
    )  # fmt: skip
    rec.same("kl_grad", frames_first(gradient))
    with torch.enable_grad():
        moved = x.clone().requires_grad_()
        loss = generator_loss(moved, gradient)
        loss.backward()
    rec.same("loss", _scalar(loss.detach(), rec["loss"]))
    assert moved.grad is not None
    # an element's gradient is 1 / n of kl_grad, and so is what it may miss
    rec.same("grad_x", frames_first(moved.grad), most=1e-4 / x.numel())
    for name in rec.tensors:
        if name.startswith("loss_masked"):
            mine = generator_loss(x, gradient, _mask(rec, name))
            rec.same(name, _scalar(mine, rec[name]))
    _critic(rec, x, noise, table)


def _critic(rec: Recording, x: Tensor, noise: Tensor, table: float) -> None:
    flow, x_t = frames_first(rec["critic_flow"]), frames_first(rec["critic_noisy"])
    t = rec["critic_timestep"]
    x, noise = (
        frames_first(rec[f"critic_{name}"]) if f"critic_{name}" in rec else same
        for name, same in (("x", x), ("noise", noise))
    )
    rec.same("critic_noisy", frames_first(add_noise(x, noise, t, table, "table")))
    exact = critic_loss(flow, x, noise, x_t, t)
    rec.same("critic_loss_exact", _scalar(exact, rec["critic_loss_exact"]))
    name = "critic_loss_upstream"
    if name in rec:
        told = rec.facts.get("hyper", {}).get("score_timestep_shift")
        score = told or told_number(rec.meaning(name), r"shift-([\d.]+) then", MixedTables().score)
        tables = MixedTables(float(score), table)
        rec.same(name, _scalar(critic_loss(flow, x, noise, x_t, t, tables), rec[name]))


def _guided_fake(rec: Recording, weight: float) -> Tensor:
    """The fake score's x0; some recordings hold its two halves."""
    cond = frames_first(rec["pred_fake" if "pred_fake" in rec else "pred_fake_cond"])
    if not weight or "pred_fake_uncond" not in rec:
        return cond
    return cond + weight * (cond - frames_first(rec["pred_fake_uncond"]))


def _mask(rec: Recording, loss: str) -> Tensor:
    """The mask of a loss: a tensor of the recording, else the frames that its meaning tells."""
    suffix = loss.removeprefix("loss_masked")
    for name in (f"gradient_mask{suffix}", f"mask{suffix}", "gradient_mask", "mask"):
        if name in rec:
            mask = rec[name].bool()
            if mask.ndim == 5:
                return frames_first(mask)
            return mask.reshape(-1, 1, mask.shape[-1], 1, 1)
    told = [
        told_number(rec.meaning(loss), r"first (\d+) frame", -1.0),
        *(
            facts.get("num_frame_per_block", -1)
            for facts in (rec.facts.get("hyper", {}), rec.facts)
        ),
        WindowConfig().chunk,
    ]
    return gradient_window(rec["x"].shape[1], next(int(n) for n in told if n >= 0))


def _table_shift(rec: Recording, text: str, x0: Tensor, noise: Tensor) -> float:
    """The shift of the table that noised; where sources disagree, the one that fits."""
    hyper = rec.facts.get("hyper", rec.facts)
    told = [
        told_number(text, r"shift[- ]([\d.]*\d)", 0.0),
        told_number(rec.meaning("critic_loss_upstream"), r"then shift-([\d.]*\d)", 0.0),
        float(hyper.get("timestep_shift", 0.0)),
        FlowConfig().shift,
    ]
    t, theirs = rec["timestep"], frames_first(rec["noisy"])
    gaps = {s: (add_noise(x0, noise, t, s, "table") - theirs).abs().max() for s in told if s}
    return min(gaps, key=lambda s: float(gaps[s]))


def _scalar(mine: Tensor, theirs: Tensor) -> Tensor:
    return mine.reshape(theirs.shape)
