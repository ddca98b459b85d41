"""Replays of recordings by the prefix of their names; every size comes from the recording."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from parity.recording import Recording
from parity.rollout_replay import rollout
from parity.scheduler_replay import flow_scheduler
from parity.training_replay import dmd_losses, tf_loss
from torch import Tensor

from mla_study.config import WindowConfig
from mla_study.kernels.masks import Visibility, bidirectional, chunk_causal, teacher_forcing
from mla_study.model.layers import timestep_embedding
from mla_study.model.rope import RotaryEmbedding, axis_pairs, inverse_frequencies


def wan_rope(rec: Recording) -> None:
    """Angles of the table, and rotated queries with and without an offset and padding."""
    for name in rec.tensors:
        if found := re.fullmatch(r"freqs(\d+)_(re|im)", name):
            pairs = axis_pairs(int(found[1]))
            speeds = torch.cat([inverse_frequencies(n, 10000.0) for n in pairs])
            angles = rec["freqs_rows"].double()[:, None] * speeds
            rec.same(name, angles.cos() if found[2] == "re" else angles.sin(), most=1e-9)
        elif found := re.fullmatch(r"invfreq(\d+)_([thw])", name):
            pairs = axis_pairs(int(found[1]))["thw".index(found[2])]
            rec.same(name, inverse_frequencies(pairs, 10000.0), most=1e-12)
        elif found := re.fullmatch(r"rope(\d*|_pad)(?:_start(\d+))?", name):
            query = rec[f"q{found[1]}"]
            frames, height, width = _grid(rec, f"q{found[1]}")
            start = int(found[2] or 0)
            table = RotaryEmbedding(query.shape[-1]).table(
                range(start, start + frames), height, width
            )
            rec.same(name, table.apply(query))


def _grid(rec: Recording, name: str) -> list[int]:
    if "grid" in rec.facts:
        return list(rec.facts["grid"])
    texts = [rec.meaning(name), *(rec.meaning(other) for other in rec.tensors)]
    found = [m for text in texts if (m := re.search(r"grid \((\d+), ?(\d+), ?(\d+)\)", text))]
    assert found, "the recording does not say its grid"
    return [int(n) for n in found[0].groups()]


def wan_timestep_embedding(rec: Recording) -> None:
    """Sinusoids in float64, against float64, float32 and timesteps that went through bfloat16."""
    for name in rec.tensors:
        if found := re.fullmatch(r"emb(\d+)_(\w+)", name):
            t = rec["t"].bfloat16().double() if found[2] == "from_bf16_t" else rec["t"]
            exact = rec.tensors[name].dtype == torch.float64
            rec.same(name, timestep_embedding(t, int(found[1])), most=1e-9 if exact else 1e-4)


def sf_block_causal(rec: Recording) -> None:
    """The masked pass of training, and the bidirectional teacher."""
    model, config = rec.model, rec.config
    conditioning = model.condition(rec["context"])
    rec.grid(rec.tensors["x"])
    for name in rec.tensors:
        kind = re.fullmatch(
            r"out_(?:(?P<full>bidirectional)|nfpb(?P<chunk>\d+)|first(?P<first>\d+)_then(?P<then>\d+))"
            r"(?:_local(?P<local>\d+))?(?P<tblock>_tblock)?",
            name,
        )
        if kind is None:
            continue
        key = name.removeprefix("out_").removesuffix("_tblock")
        usual = rec.tensors["x"].shape[2]
        frames = rec.tensors[f"framemask_{key}"].shape[0] if f"framemask_{key}" in rec else usual
        own = f"x{frames}" if kind["first"] or usual != frames else "x"
        own = own if own in rec else "x"
        x = rec[own]
        chunk = int(kind["chunk"] or kind["then"] or frames)
        if kind["full"]:
            rule, t = bidirectional(frames), rec["t_scalar"]
        else:
            window = WindowConfig(0, int(kind["local"]) - chunk, chunk) if kind["local"] else None
            first = int(kind["first"]) if kind["first"] else None
            rule = chunk_causal(frames, chunk, window, first=first)
            wanted = f"t{own[1:]}" if own != "x" else "t_per_frame"
            t = _timesteps(rec, frames, f"t_per_block{chunk}" if kind["tblock"] else wanted)
        _mask(rec, f"framemask_{key}", rule)
        assert x.shape[1] == config.in_channels
        rec.same(name, model(x, t, conditioning, rule))


def sf_teacher_forcing(rec: Recording) -> None:
    """Clean and noisy copies in one pass; upstream's mask knows no window."""
    model = rec.model
    conditioning = model.condition(rec["context"])
    both = torch.cat([rec["clean_x"], rec["x"]], dim=2)
    frames = rec["x"].shape[2]
    for name in rec.tensors:
        kind = re.fullmatch(r"out_nfpb(\d+)(?:_local\d+)?(_aug)?", name)
        if kind is None:
            continue
        chunk = int(kind[1])
        rule = teacher_forcing(frames, chunk)
        _mask(rec, f"framemask_nfpb{chunk}", rule)
        t = _timesteps(rec, frames, f"t_per_block{chunk}")
        clean = rec["aug_t"] if kind[2] else torch.zeros_like(t)
        out = model(both, torch.cat([clean, t], dim=1), conditioning, rule)
        rec.same(name, out[:, :, frames:])


def _timesteps(rec: Recording, frames: int, wanted: str) -> Tensor:
    """The timesteps of that name, else those of every frame, of so many frames."""
    for name in (wanted, "t_per_frame", f"t{frames}", "t"):
        if name in rec and rec.tensors[name].shape[-1] == frames:
            return rec[name]
    raise AssertionError(f"no timesteps for {frames} frames")


def _mask(rec: Recording, name: str, rule: Visibility) -> None:
    if name in rec:
        rec.equal(name, rule.dense().tolist(), rec[name].bool().tolist())


REPLAYS: dict[str, Callable[[Recording], None]] = {
    "wan_rope": wan_rope,
    "wan_timestep_embedding": wan_timestep_embedding,
    "sf_block_causal": sf_block_causal,
    "sf_teacher_forcing": sf_teacher_forcing,
    "sf_rollout_full": rollout,
    "sf_rollout_evict": rollout,
    "longlive_relative_rope": rollout,
    "flow_scheduler": flow_scheduler,
    "tf_loss": tf_loss,
    "dmd_loss": dmd_losses,
}


def replay_of(name: str) -> Callable[[Recording], None] | None:
    """The replay whose prefix begins the name."""
    return next((REPLAYS[p] for p in REPLAYS if name.startswith(p)), None)
