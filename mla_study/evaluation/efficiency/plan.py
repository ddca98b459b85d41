"""How many streams GPUs serve, by layout: from the cost model and a device's rates.

Everything is of class ``modelled``. A stream is in real time while a chunk of the whole batch takes
no longer than the video that it holds lasts. The VAE and the text encoder are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mla_study.config import ModelConfig, WindowConfig
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.devices import Device
from mla_study.evaluation.efficiency.memory import (
    GB,
    RUNTIME,
    activation_bytes,
    max_batch,
    slope,
    weight_bytes,
)
from mla_study.evaluation.efficiency.model_cost import (
    WINDOWS,
    chunk_cost,
    fps_bound,
    passes_of,
    video_frames,
)
from mla_study.model.storage import Storage


@dataclass(frozen=True)
class Layout:
    """A way to serve: which attention, over which window, kept how."""

    name: str
    form: str
    window: WindowConfig
    storage: Storage = "bf16"
    head_group: int | None = None


@dataclass(frozen=True)
class Served:
    """What a layout gives on one GPU, and on all.

    Attributes:
        slope_gb: memory of one more stream. fits: streams that memory holds.
        tflop_chunk: FLOPs of a chunk in 1e12. bound_fps: video frames a second at the ceiling.
        fps: of one stream alone. latency_s: seconds until its first chunk is there (a full window
            is assumed, which is too long for the first ones).
        real_time: streams a GPU serves in real time, by time and memory.
        fps_all: frames a second of all of them together.
        gpus_needed: for the viewers; None where a GPU serves none.
        viewers_served: of those, by the GPUs given.
        clip_gpu_s: GPU seconds of one viewer's video, served with the others.
    """

    name: str
    form: str
    storage: str
    window: tuple[int, int, int]
    slope_gb: float
    fits: int
    tflop_chunk: float
    bound_fps: float | None
    fps: float
    latency_s: float
    real_time: int
    fps_all: float
    gpus_needed: int | None
    viewers_served: int
    clip_gpu_s: float


@dataclass(frozen=True)
class Plan:
    """Rows, and every assumption behind them."""

    rows: tuple[Served, ...]
    assumptions: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "class": "modelled",
            "layouts": [asdict(row) for row in self.rows],
            "assumptions": list(self.assumptions),
        }


def layouts(window: WindowConfig) -> tuple[Layout, ...]:
    """Dense over 21 frames and over ``window``; latent over it in both forms, and in int8."""
    return (
        Layout("dense, 21 frames", "dense", WINDOWS["21 frames"]),
        Layout("dense, window", "dense", window),
        Layout("latent, reconstruct", "reconstruct", window),
        Layout("latent, absorbed", "absorbed", window),
        Layout("latent, int8, head by head", "reconstruct", window, "int8-token", 1),
    )


def plan(
    config: ModelConfig,
    device: Device,
    *,
    gpus: int,
    viewers: int,
    seconds: float,
    window: WindowConfig | None = None,
    served: Sequence[Layout] = (),
) -> Plan:
    """The plan for ``viewers`` streams of ``seconds`` each.

    Args:
        config: of the latent model; the dense one is the same with dense self-attention.
        served: layouts, by default :func:`layouts`.

    Raises:
        UserError: GPUs, viewers or seconds below 1 (seconds: not above 0).
    """
    for name, value in (("gpus", gpus), ("viewers", viewers)):
        if value < 1:
            raise UserError(f"--{name} is {value}, but it must be at least 1")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"--seconds is {seconds:g}, but it must be above 0")
    window = window or config.window
    rows = [
        _served(config, device, layout, gpus, viewers, seconds)
        for layout in served or layouts(window)
    ]
    return Plan(tuple(rows), _assumptions(config, device, window, seconds))


def real_time_streams(
    config: ModelConfig, layout: Layout, device: Device, most: int
) -> tuple[int, float]:
    """The largest batch up to ``most`` that keeps pace, and the seconds of its chunk; (0, inf)."""
    lasts = video_frames(config, layout.window) / config.fps
    low, high, spent = 0, most, math.inf
    while low < high:
        middle = (low + high + 1) // 2
        now = _seconds(config, layout, device, middle)
        if now <= lasts:
            low, spent = middle, now
        else:
            high = middle - 1
    return low, spent


def _served(
    config: ModelConfig, device: Device, layout: Layout, gpus: int, viewers: int, seconds: float
) -> Served:
    mine = replace(config, latent=None) if layout.form == "dense" else config
    dtype = device.rates.dtype
    each = slope(
        mine, layout.window, layout.form,
        storage=layout.storage, dtype=dtype, head_group=layout.head_group,
    )  # fmt: skip
    fits = max_batch(mine, each, device.memory * GB, dtype)
    cost = chunk_cost(mine, layout.window, layout.form, dtype=dtype)
    alone = _seconds(mine, layout, device, 1)
    frames = video_frames(mine, layout.window)
    streams, spent = real_time_streams(mine, layout, device, fits)
    chunks = math.ceil(seconds * mine.fps / frames)
    return Served(
        name=layout.name,
        form=layout.form,
        storage=layout.storage,
        window=(layout.window.sink, layout.window.history, layout.window.chunk),
        slope_gb=each.total / GB,
        fits=fits,
        tflop_chunk=cost.flops / 1e12,
        bound_fps=None
        if device.ceiling is None
        else fps_bound(mine, layout.window, cost, device.ceiling),
        fps=frames / alone,
        latency_s=alone,
        real_time=streams,
        fps_all=streams * frames / spent if streams else 0.0,
        gpus_needed=math.ceil(viewers / streams) if streams else None,
        viewers_served=min(viewers, gpus * streams),
        clip_gpu_s=chunks * (spent / streams if streams else alone),
    )


def _seconds(config: ModelConfig, layout: Layout, device: Device, batch: int) -> float:
    rates = device.rates
    # SDPA needs values as wide as its keys, the fused kernel does not
    wide = rates.value_is_key and rates.absorbed_triton is None
    cost = chunk_cost(
        config, layout.window, layout.form, batch=batch, dtype=rates.dtype, value_is_key=wide
    )
    return cost.seconds(rates, "absorbed" if layout.form == "absorbed" else "reconstruct")


def _assumptions(
    config: ModelConfig, device: Device, window: WindowConfig, seconds: float
) -> tuple[str, ...]:
    frames = video_frames(config, window)
    rows, columns = (
        s * c for s, c in zip(config.latent_size, config.codec_stride[1:], strict=True)
    )
    dtype, steps = device.rates.dtype, len(config.flow.denoise_steps)
    return (
        *device.facts,
        f"model: {config.name}, {dtype} weights of "
        f"{weight_bytes(replace(config, latent=None), dtype) / GB:.2f} GB (dense) and "
        f"{weight_bytes(config, dtype) / GB:.2f} GB (latent), {RUNTIME / GB:g} GB for the runtime",
        f"video: {columns}x{rows} at {config.fps:g} fps, {seconds:g} s each; a chunk of {frames} "
        f"frames must take at most {frames / config.fps:g} s",
        f"window: sink {window.sink}, history {window.history}, chunk {window.chunk} latent "
        "frames, all of them in the cache, and full",
        f"passes: {steps} denoising steps and {passes_of(config) - steps} clean pass a chunk",
        "counted: matrix products and attention; norms, rotations, the sampler and unpacking int8 "
        "only as far as the achieved share holds them",
        "not counted: VAE, text encoder, network; streams of a GPU run as one batch in step",
        f"activations: {activation_bytes(config, window.chunk, dtype) / GB:.3g} GB a stream, "
        "fitted on the dense row of the paper's Fig. 7",
    )
