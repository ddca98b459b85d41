"""Replay of recorded flow arithmetic; shifts, steps and bounds are read from names and meanings."""

from __future__ import annotations

import re

from parity.recording import Recording

from mla_study.config import FlowConfig
from mla_study.rollout.sampler import (
    add_noise,
    bell_weight_at,
    bell_weights,
    flow_from_x0,
    flow_target,
    shifted_timesteps,
    sigma_table,
    timestep_table,
    warped_steps,
    x0_from_flow,
)


def told_number(text: str, pattern: str, default: float) -> float:
    """The number that a pattern finds in a meaning."""
    found = re.search(pattern, text)
    return float(found[1]) if found else default


def _tables(rec: Recording, name: str) -> bool:
    found = re.fullmatch(r"(sigmas|timesteps|train_weight|warped_steps)_shift([\d.]+)", name)
    if found:
        shift, size = float(found[2]), rec.tensors[name].numel()
        if found[1] == "sigmas":
            rec.same(name, sigma_table(shift, size))
        elif found[1] == "timesteps":
            rec.same(name, timestep_table(shift, size), most=1e-3)
        elif found[1] == "train_weight":
            rec.same(name, bell_weights(shift, size))
        else:
            told = re.search(r"-\[([\d, ]+)\]", rec.meaning(name))
            steps = [float(n) for n in told[1].split(",")] if told else FlowConfig().denoise_steps
            rec.same(name, warped_steps(steps, shift), most=1e-3)
        return True
    if found := re.fullmatch(r"cd(\d+)_(sigmas|timesteps)", name):
        shift = told_number(
            rec.meaning(f"cd{found[1]}_sigmas"), r"shift ([\d.]+)", FlowConfig().shift
        )
        table = sigma_table if found[2] == "sigmas" else timestep_table
        rec.same(name, table(shift, int(found[1])), most=1e-3 if found[2] == "timesteps" else 1e-4)
        return True
    return False


def _own_shift(rec: Recording) -> float:
    """The shift of what names no table: told by a meaning, or by the tensors made beside it."""
    told = [
        (rec.meaning("add_noise"), r"shift[- ]([\d.]+)"),
        (rec.meaning("dmd_shifted_clamped_t"), r"([\d.]+)u/"),
        *((name, r"flow_from_x0_table([\d.]+)$") for name in sorted(rec.tensors)),
    ]
    found = (re.search(pattern, text) for text, pattern in told)
    return next((float(match[1]) for match in found if match), FlowConfig().shift)


def flow_scheduler(rec: Recording) -> None:
    """Tables, and conversions between flow, x0 and noise by the nearest entry of a table."""
    shift = _own_shift(rec)
    for name in rec.tensors:
        late = rec["t"] >= told_number(rec.meaning(name), r"t ?>= ?([\d.]+)", 0.0)
        x_t, t, flow = rec["add_noise"], rec["t"], rec["flow"]
        if _tables(rec, name):
            continue
        if name == "add_noise":
            rec.same(name, add_noise(rec["x0"], rec["noise"], t, shift, "table"))
        elif found := re.fullmatch(r"x0_from_flow_table([\d.]+)", name):
            rec.same(name, x0_from_flow(x_t, flow, t, float(found[1]), "table"))
        elif found := re.fullmatch(r"flow_from_x0_table([\d.]+)", name):
            by = float(found[1])
            rec.same(name, flow_from_x0(x_t[late], rec["x0"][late], t[late], by, "table"))
        elif found := re.fullmatch(r"flow_roundtrip_([\d.]+)to([\d.]+)", name):
            x0 = x0_from_flow(x_t, flow, t, float(found[1]), "table")[late]
            rec.same(name, flow_from_x0(x_t[late], x0, t[late], float(found[2]), "table"))
        elif name == "train_target":
            rec.same(name, flow_target(rec["x0"], rec["noise"]))
        elif name == "train_weight_at_t":
            rec.same(name, bell_weight_at(t, shift))
        elif name == "dmd_shifted_clamped_t":
            text = rec.meaning(name)
            mine = shifted_timesteps(rec["dmd_uniform_t"], told_number(text, r"([\d.]+)u/", shift))
            if bounds := re.search(r"clamp \[([\d.]+), ?([\d.]+)\]", text):
                mine = mine.clamp(float(bounds[1]), float(bounds[2]))
            rec.same(name, mine, most=1e-3)
