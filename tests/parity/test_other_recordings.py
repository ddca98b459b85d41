"""Recordings of other windows, sizes and batches, made by masked passes that know no cache."""

from __future__ import annotations

import pytest
import torch
from parity.making import Save, replay
from parity.replays import replay_of
from torch import Tensor

from mla_study.config import WindowConfig
from mla_study.kernels.masks import Visibility, chunk_causal, teacher_forcing
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.sampler import (
    add_noise,
    bell_weight_at,
    flow_from_x0,
    warped_steps,
    x0_from_flow,
)


@pytest.mark.parametrize(
    ("name", "batch", "chunk", "local", "sink", "blocks", "shift"),
    [
        ("sf_rollout_evict_l5_s1_b2", 2, 2, 5, 1, 5, 5.0),
        ("sf_rollout_evict_l3_s2_b1", 1, 1, 3, 2, 6, 8.0),
        ("sf_rollout_evict_no_room_for_the_sink", 1, 3, 4, 2, 4, 5.0),
        ("sf_rollout_full_long", 1, 4, -1, 0, 3, 3.0),
        ("longlive_relative_rope_l6_s2_b2", 3, 2, 6, 2, 5, 5.0),
        ("longlive_relative_rope_l4_s0_b3", 1, 3, 4, 0, 4, 5.0),
    ],
)
def test_rollouts(
    model: WanTransformer, save: Save, name: str, batch: int, chunk: int, local: int, sink: int,
    blocks: int, shift: float,
) -> None:  # fmt: skip
    frames, positions = chunk * blocks, "relative" if "relative" in name else "absolute"
    kept = min(sink, local - chunk)
    window = None if local < 0 else WindowConfig.from_local_attn_size(local, kept, chunk)
    steps = warped_steps((1000, 600, 200), shift)
    noise = torch.randn(batch, 3, frames, 6, 10)
    eps = torch.randn(blocks, len(steps) - 1, batch, chunk, 3, 6, 10)
    context = torch.randn(batch, 4, 7)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    done = noise[:, :, :0]
    with torch.no_grad():
        conditioning = model.condition(context)
        for block in range(blocks):
            total = (block + 1) * chunk
            rule = teacher_forcing(total, chunk, window, positions)
            x = noise[:, :, total - chunk : total]
            for step in range(len(steps) + 1):
                clean = step == len(steps)
                t = torch.full((batch, chunk), 0.0 if clean else float(steps[step]))
                rest = torch.zeros(batch, total - chunk)
                both = torch.cat([done, x, done, x], dim=2)
                times = torch.cat([rest, torch.zeros_like(t), rest, t], dim=1)
                flow = model(both, times, conditioning, rule)[:, :, -chunk:]
                calls.append((x, t, flow))
                if clean:
                    done = torch.cat([done, x], dim=2)
                    continue
                x = x0_from_flow(x, flow, t)
                if step + 1 < len(steps):
                    later = torch.full_like(t, float(steps[step + 1]))
                    x = add_noise(x, eps[block, step].transpose(1, 2), later)
    x, t, flow = (torch.stack(part) for part in zip(*calls, strict=True))
    rec = save(
        name,
        {
            "noise": noise.transpose(1, 2), "context": context, "denoising_steps": steps,
            "latents": done.transpose(1, 2), "renoise_eps": eps, "call_t": t,
            "call_x": x.transpose(2, 3), "call_flow": flow.transpose(2, 3),
        },
        {
            "rollout": {
                "local_attn_size": local, "sink_size": sink, "num_frame_per_block": chunk,
                "frames": frames, "tokens_per_frame": 15, "context_noise": 0,
            }
        },
    )  # fmt: skip
    replay(rec)
    assert not rec.failures and not rec.unread()
    assert {"latents", "call_x", "call_flow"} <= set(rec.differences)


def test_masked_passes(model: WanTransformer, save: Save) -> None:
    frames, context = 8, torch.randn(3, 5, 7)
    x, x7 = torch.randn(3, 3, frames, 2, 4), torch.randn(3, 3, 7, 2, 4)
    t, t7, t4 = torch.rand(3, 8) * 999, torch.rand(3, 7) * 999, torch.rand(3, 2) * 999
    blocks = t4.repeat_interleave(4, 1)
    tensors = {
        "x": x, "x7": x7, "context": context, "t_per_frame": t, "t7": t7, "t_per_block4": blocks
    }  # fmt: skip
    with torch.no_grad():
        conditioning = model.condition(context)

        def add(key: str, latents: Tensor, times: Tensor, rule: Visibility) -> None:
            tensors[f"out_{key}"] = model(latents, times, conditioning, rule)
            mask = torch.from_numpy(rule.dense()).to(torch.uint8)
            tensors[f"framemask_{key.removesuffix('_tblock')}"] = mask

        add("nfpb4", x, t, chunk_causal(8, 4))
        add("nfpb4_tblock", x, blocks, chunk_causal(8, 4))
        add("nfpb2_local6", x, t, chunk_causal(8, 2, WindowConfig(0, 4, 2)))
        add("first3_then2_local3", x7, t7, chunk_causal(7, 2, WindowConfig(0, 1, 2), first=3))
    rec = save("sf_block_causal_other", tensors, {"tokens_per_frame": 2})
    replay(rec)
    assert not rec.failures and not rec.unread()


def test_a_first_frame_pass_of_the_usual_length_has_its_own_timesteps(
    model: WanTransformer, save: Save
) -> None:
    x, own, context = torch.randn(1, 3, 5, 2, 2), torch.randn(1, 3, 5, 2, 2), torch.randn(1, 5, 7)
    t, own_t = torch.rand(1, 5) * 999, torch.rand(1, 5) * 999
    with torch.no_grad():
        conditioning = model.condition(context)
        out = model(x, t, conditioning, chunk_causal(5, 5))
        first = model(own, own_t, conditioning, chunk_causal(5, 2, first=1))
    rec = save(
        "sf_block_causal_same_length",
        {"x": x, "x5": own, "context": context, "t_per_frame": t, "t5": own_t, "out_nfpb5": out,
         "out_first1_then2": first},
        {},
    )  # fmt: skip
    replay(rec)
    assert not rec.failures and not rec.unread()


@pytest.mark.parametrize("shift", [3.0, 8.0])
def test_the_shift_of_a_scheduler_is_read_from_its_tensors(save: Save, shift: float) -> None:
    x0, noise, flow = torch.randn(3, 4, 2, 3, 3).unbind()
    t = torch.tensor([0.0, 20.0, 411.3, 1000.0])
    x_t = add_noise(x0, noise, t, shift, "table")
    rec = save(
        "flow_scheduler_other",
        {
            "x0": x0, "noise": noise, "flow": flow, "t": t, "add_noise": x_t,
            "train_weight_at_t": bell_weight_at(t, shift),
            f"flow_from_x0_table{shift:g}": flow_from_x0(x_t, x0, t, shift, "table"),
        },
        {},
    )  # fmt: skip
    replay(rec)
    assert not rec.failures and "add_noise" in rec.differences


def test_a_wrong_recording_fails(model: WanTransformer, save: Save) -> None:
    x, context = torch.randn(1, 3, 2, 2, 2), torch.randn(1, 5, 7)
    t = torch.full((1, 2), 500.0)
    with torch.no_grad():
        out = model(x, t, model.condition(context), chunk_causal(2, 1))
    out[0, 0, 1, 0, 0] += 1e-3
    wrong = torch.ones(2, 2, dtype=torch.uint8)
    rec = save(
        "sf_block_causal",
        {"x": x, "context": context, "t_per_frame": t, "out_nfpb1": out, "framemask_nfpb1": wrong},
        {},
    )
    replay(rec)
    assert [line.split(":")[0] for line in rec.failures] == ["framemask_nfpb1", "out_nfpb1"]


def test_an_unknown_prefix_has_no_replay() -> None:
    assert replay_of("tfloss") is None
    assert replay_of("sf_rollout_evict_l9_s3_b4") is not None
