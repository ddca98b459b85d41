"""Replay of a recorded few-step rollout through our cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from parity.recording import CPU, Recording, frames_first
from torch import Tensor

from mla_study.config import FlowConfig, WindowConfig
from mla_study.model.cache import RollingCache
from mla_study.rollout.sampler import add_noise, x0_from_flow


@dataclass(frozen=True)
class Call:
    """One call of the generator: its number, block, step and timesteps [B, chunk]."""

    number: int
    block: int
    step: int
    clean: bool
    t: Tensor
    frames: tuple[int, ...]


def _shift_of(steps: Tensor) -> float:
    """The shift whose table holds all the steps; the usual one where none does.

    Whole numbers may be steps that were never shifted, and tell nothing.
    """
    t, usual = steps.double(), FlowConfig().shift
    if torch.equal(t, t.round()):
        return usual
    for shift in (usual, *(float(n) for n in range(2, 17))):
        index = 1000 * t / (1000 * shift - (shift - 1) * t)
        if (index - index.round()).abs().max() < 0.01:
            return shift
    return usual


class Rollout:
    """The loop of the recording: a few noisy passes a block, then a clean one."""

    def __init__(self, rec: Recording) -> None:
        told = rec.facts["rollout"]
        self.rec = rec
        self.chunk, self.frames = told["num_frame_per_block"], told["frames"]
        self.noise = frames_first(rec["noise"])
        self.batch = self.noise.shape[0]
        self.height, self.width = rec.grid(self.noise)
        self.tokens = self.height * self.width
        self.relative = rec.name.startswith("longlive_relative_rope")
        self.steps = rec["denoising_steps"]
        self.shift = float(told.get("timestep_shift", _shift_of(self.steps)))
        self.context_noise = float(told.get("context_noise", 0))
        local = told["local_attn_size"]
        if local < 0:
            window = WindowConfig(0, max(self.frames - self.chunk, 0), self.chunk)
        else:
            # upstream lets a chunk overwrite the end of a sink that leaves it no room
            sink = min(told["sink_size"], local - self.chunk)
            window = WindowConfig.from_local_attn_size(local, sink, self.chunk)
        self.conditioning = rec.model.condition(rec["context"])
        self.cache = RollingCache(rec.config, window, self.batch, self.tokens)
        assert self.frames == self.noise.shape[2] and self.frames % self.chunk == 0

    def calls(self) -> Iterator[Call]:
        """All calls in order; the cache is ready for each."""
        self.cache.reset()
        passes = len(self.steps) + 1
        for block in range(self.frames // self.chunk):
            ids = tuple(range(block * self.chunk, (block + 1) * self.chunk))
            for step in range(passes):
                clean = step == passes - 1
                level = self.context_noise if clean else float(self.steps[step])
                t = torch.full((self.batch, self.chunk), level)
                yield Call(block * passes + step, block, step, clean, t, ids)

    def flow(self, call: Call, x: Tensor) -> Tensor:
        """The model's prediction, written to and read from the cache."""
        held = self.cache.begin(call.frames)
        mode = "relative" if self.relative else "absolute"
        pieces = self.rec.model.step_pieces(call.frames, held, mode, self.height, self.width, CPU)
        memory = self.cache.layers()
        return self.rec.model(x, call.t, self.conditioning, pieces=pieces, memory=memory)

    def x0(self, call: Call, x: Tensor, flow: Tensor) -> Tensor:
        """Upstream's conversion, by the table."""
        return x0_from_flow(x, flow, call.t, self.shift, "table")

    def renoised(self, call: Call, x0: Tensor) -> Tensor:
        """Input of the next step, from the recorded noise."""
        eps = frames_first(self.rec["renoise_eps"][call.block, call.step])
        t = torch.full_like(call.t, float(self.steps[call.step + 1]))
        return add_noise(x0, eps, t, self.shift, "table")


def rollout(rec: Recording) -> None:
    """Every call from its recorded input, then the whole loop on its own, then the caches."""
    run = Rollout(rec)
    _recorded_calls(rec, run)
    rec.same("latents", frames_first(_own_loop(run)))
    _caches(rec, run)


def _recorded_calls(rec: Recording, run: Rollout) -> None:
    after = rec.facts.get("cache_frames_after_each_block", [])
    for call in run.calls():
        n = call.number
        x = frames_first(rec["call_x"][n])
        rec.same("call_t", call.t, rec["call_t"][n], most=1e-3)
        flow = run.flow(call, x)
        rec.same("call_flow", frames_first(flow), rec["call_flow"][n])
        x0 = run.x0(call, x, flow)
        if "call_x0" in rec:
            rec.same("call_x0", frames_first(x0), rec["call_x0"][n])
        if call.step + 1 < len(run.steps):
            rec.same("call_x", frames_first(run.renoised(call, x0)), rec["call_x"][n + 1])
        elif not call.clean:
            rec.same("call_x", frames_first(x0), rec["call_x"][n + 1])
        counts = {
            "call_start_token": call.frames[0],
            "call_local_end": len(run.cache.frames),
            "call_global_end": call.frames[-1] + 1,
        }
        for name in set(counts) & set(rec.tensors):
            rec.equal(name, counts[name] * run.tokens, int(rec[name][n]))
        if call.clean and call.block < len(after):
            held = sorted(run.cache.frames)
            rec.equal("cache_frames_after_each_block", held, after[call.block])


def _own_loop(run: Rollout) -> Tensor:
    blocks: list[Tensor] = []
    x = run.noise
    for call in run.calls():
        if call.step == 0:
            x = run.noise[:, :, list(call.frames)]
        flow = run.flow(call, x)
        if call.clean:
            continue
        x = run.x0(call, x, flow)
        if call.step + 1 < len(run.steps):
            x = run.renoised(call, x)
        else:
            blocks.append(x)
    return torch.cat(blocks, dim=2)


def _caches(rec: Recording, run: Rollout) -> None:
    order = sorted(range(len(run.cache.frames)), key=lambda slot: run.cache.frames[slot])
    ids = [run.cache.frames[slot] for slot in order]
    turn = rec.model.rope.table(ids, run.height, run.width)
    for name in rec.tensors:
        if found := re.fullmatch(r"final_cache_([kv])(\d+)", name):
            key, value = run.cache.read(int(found[2]))
            mine = (key if found[1] == "k" else value)[:, order].flatten(1, 2)
            if found[1] == "k" and not run.relative:
                mine = turn.apply(mine)
            rec.same(name, mine, rec[name][:, : mine.shape[1]])
        elif found := re.fullmatch(r"crossattn_([kv])(\d+)", name):
            ((key, value),) = run.conditioning.keys[int(found[2])]
            mine = (key if found[1] == "k" else value).transpose(1, 2)
            rec.same(name, mine[:, : rec[name].shape[1]])
