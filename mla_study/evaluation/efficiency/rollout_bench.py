"""Speed, latency and memory of the rollout's variants, measured in turns in one process.

What is timed: one pass of the model (``step``), one chunk of the steady state (``chunk``: all
passes, noise, sampler), and a clip from an empty cache (``clip``: 81 video frames). The VAE and the
text encoder are not part of it. Weights are random: neither speed nor memory depends on them.
Variants of one process throw each other's weights and caches out of the processor's caches, and
latents come from a pool in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from mla_study.config import WindowConfig
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.ceilings import Ceilings, ceilings
from mla_study.evaluation.efficiency.model_cost import frame_tokens
from mla_study.evaluation.efficiency.step_memory import LiveBytes, peak_of
from mla_study.evaluation.efficiency.variants import (
    Running,
    Scale,
    Variant,
    Weights,
    places,
    refusal,
)
from mla_study.evaluation.timing import (
    Spread,
    Times,
    clock_of,
    free_device_memory,
    interleaved,
    out_of_memory,
)
from mla_study.model.storage import DTYPES

Kind = Literal["step", "chunk"]
CLIP_FRAMES = 81
NOT_COUNTED = "VAE and text encoder not counted"
RANDOM = "random weights: speed and memory do not depend on them"
UNITS = {
    "seconds": "s, median", "low": "s, first quartile", "high": "s, third quartile",
    "fps": "video frames/s", "latent_fps": "latent frames/s", "flops": "FLOP of the call",
    "rate": "FLOP/s", "share": "of the matmul ceiling", "limit_fps": "video frames/s",
    "weights": "byte", "cache": "byte", "transient": "byte", "peak": "byte",
    "first_s": "s, first chunk from an empty cache", "clip_s": "s, 81 video frames",
}  # fmt: skip


def told(tops: Ceilings) -> str:
    """The ceilings as a line."""
    return (
        f"ceilings: matmul {tops.matmul.median / 1e12:.3g} TFLOP/s, dense attention "
        f"{tops.sdpa.median / 1e12:.3g} TFLOP/s, copy {tops.copy.median / 1e9:.3g} GB/s"
    )


@dataclass
class Field:
    """Variants that are ready to run, and why others are not."""

    scale: Scale
    running: dict[str, Running] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        variants: Sequence[Variant],
        scale: Scale,
        on_variant: Callable[[str], object] = lambda name: None,
    ) -> Field:
        """Check each variant on a small model and build it; a wrong one is left out."""
        made, weights = cls(scale), Weights(scale)
        for variant in variants:
            on_variant(variant.name)
            try:
                reason = refusal(variant, scale)
                if reason is None:
                    made.running[variant.name] = Running(variant, scale, weights)
                    continue
            except UserError as error:
                reason = f"refused: {error}"
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not out_of_memory(error):
                    raise
                reason = "OOM"
                free_device_memory()
            made.refused[variant.name] = reason
        return made

    def times(
        self, kind: Kind, repeats: int, on_turn: Callable[[int], object] = lambda done: None
    ) -> Times:
        """Seconds of a step or a chunk of every variant, in turns."""
        calls = {n: r.step if kind == "step" else r.chunk for n, r in self.running.items()}
        on_gpu = self.scale.where.type == "cuda"
        # every place of the ring once: its graph is recorded then
        recorded = [r.variant for r in self.running.values() if r.variant.how.graph]
        ahead = max((places(variant.window) for variant in recorded), default=1)
        warm_up = 1 if not on_gpu else 3 if kind == "step" else ahead + 2
        return interleaved(calls, repeats, warm_up, clock_of(self.scale.where), on_turn)

    def clips(
        self,
        names: Sequence[str],
        repeats: int,
        on_turn: Callable[[int], object] = lambda done: None,
    ) -> tuple[dict[str, Spread], dict[str, Spread]]:
        """Seconds of the first chunk, and of :data:`CLIP_FRAMES` from an empty cache."""
        calls: dict[str, Callable[[], object]] = {}
        for name in names:
            running = self.running[name]
            calls[f"{name} first"] = lambda running=running: (running.restart(), running.chunk())
            calls[f"{name} rest"] = lambda running=running: [
                running.chunk() for _ in range(clip_chunks(running) - 1)
            ]
        times = interleaved(calls, repeats, 0, clock_of(self.scale.where), on_turn)
        first, whole = {}, {}
        for name in names:
            if f"{name} first" in times.seconds and f"{name} rest" in times.seconds:
                a, b = times.seconds[f"{name} first"], times.seconds[f"{name} rest"]
                first[name] = Spread.of(a)
                whole[name] = Spread.of([x + y for x, y in zip(a, b, strict=True)])
        return first, whole


def clip_chunks(running: Running) -> int:
    """Chunks that hold the clip: the first latent frame is one video frame, others are four."""
    stride = running.scale.config.codec_stride[0]
    latent = 1 + -(-(CLIP_FRAMES - 1) // stride)
    return -(-latent // running.variant.window.chunk)


def transient(running: Running) -> int:
    """Bytes that a pass needs at its peak beside weights and cache.

    Of a GPU what its allocator counted; on the CPU the peak of live tensors.
    """
    device = running.scale.where
    if device.type == "cuda":
        return peak_of(running.step, device)
    with LiveBytes() as live:
        running.step()
    return live.peak


def table(
    variants: Sequence[Variant],
    made: Field,
    times: Mapping[Kind, Times],
    tops: Ceilings,
    clips: tuple[Mapping[str, Spread], Mapping[str, Spread]] = ({}, {}),
    memory: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """A row a variant and kind, see :data:`UNITS`; a variant without a number says why."""
    rows: list[dict[str, Any]] = []
    for variant in variants:
        for kind, taken in times.items():
            row = describe(variant, made.scale) | {"kind": kind}
            name = variant.name
            status = made.refused.get(name) or taken.errors.get(name) or "ok"
            row["status"] = status
            if status == "ok":
                row |= speed(variant, made.scale, kind, taken.spread(name), tops)
                running = made.running[name]
                held = (memory or {}).get(name, float("nan"))
                weights, cache = running.weight_bytes, running.rollout.cache.nbytes
                row |= {"weights": weights, "cache": cache, "transient": held,
                        "peak": weights + cache + held}  # fmt: skip
                if kind == "chunk" and name in clips[1]:
                    row |= {"first_s": clips[0][name].median, "clip_s": clips[1][name].median}
            rows.append(row)
    found = pd.DataFrame(rows)
    return found.reindex(columns=[*found.columns, *(c for c in UNITS if c not in found)])


def describe(variant: Variant, scale: Scale) -> dict[str, Any]:
    """What a variant is, as columns."""
    return {
        "variant": variant.name,
        "layout": "latent" if variant.latent else "dense",
        "form": variant.resolved(scale),
        "d_c": 0 if not variant.latent else variant.d_c or scale.latent.d_c,
        "window": window_text(variant.window),
        "keys": variant.window.key_frames * frame_tokens(scale.config),
        "clean_pass": variant.clean_pass,
        "storage": variant.storage or scale.dtype,
        "dtype": scale.dtype,
        "how": variant.how.text(),
        "batch": variant.batch,
    }


def window_text(window: WindowConfig) -> str:
    """Such as ``1+6+3``: sink, history, chunk."""
    return f"{window.sink}+{window.history}+{window.chunk}"


def speed(
    variant: Variant, scale: Scale, kind: Kind, spread: Spread, tops: Ceilings
) -> dict[str, Any]:
    """Seconds, frames a second, FLOP/s and the ceiling's frames a second, as columns."""
    cost = variant.cost(scale, 1 if kind == "step" else None)
    rate = cost.flops / spread.median
    row: dict[str, Any] = {
        "seconds": spread.median, "low": spread.low, "high": spread.high, "flops": cost.flops,
        "rate": rate, "share": rate / tops.matmul.median,
    }  # fmt: skip
    if kind == "chunk":
        frames = variant.frames(scale)
        row |= {
            "fps": frames / spread.median,
            "latent_fps": variant.batch * variant.window.chunk / spread.median,
            "limit_fps": frames * tops.matmul.median / cost.flops,
        }
    return row


def line(row: Mapping[str, Any]) -> str:
    """A row as text."""
    head = f"{row['kind']:<6}{row['variant']:<44}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    spent = f"{row['seconds']:>8.4g} s [{row['low']:.4g}, {row['high']:.4g}]"
    rate = f"{row['rate'] / 1e12:.3g} TFLOP/s ({row['share']:.0%} of matmul)"
    fps = f"  {row['fps']:.3g} FPS of at most {row['limit_fps']:.3g}" if row["fps"] > 0 else ""
    first = ""
    if row["clip_s"] > 0:
        first = f"  first chunk {row['first_s']:.3g} s, {CLIP_FRAMES} frames {row['clip_s']:.3g} s"
    peak = f"  peak {row['peak'] / 1e6:.4g} MB" if row["peak"] > 0 else ""
    return f"{head}{spent}  {rate}{fps}{first}{peak}"


def measure(
    variants: Sequence[Variant],
    scale: Scale,
    kinds: Sequence[Kind],
    repeats: int,
    clip_repeats: int = 0,
    clip_names: Sequence[str] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[pd.DataFrame, dict[Kind, Times], Ceilings]:
    """Check, build and time all variants.

    Args:
        clip_repeats: turns of whole clips; 0 leaves them out.
        clip_names: variants that make clips; None: all.

    Returns:
        The table, the seconds behind it by kind, and the ceilings.
    """
    made = Field.of(variants, scale, lambda name: say(f"checking {name}"))
    for name, reason in made.refused.items():
        say(f"{name}: {reason}")
    tops = ceilings(scale.where, DTYPES[scale.dtype])
    say(told(tops))
    times: dict[Kind, Times] = {}
    for kind in kinds:
        say(f"{kind}: {len(made.running)} variants, {repeats} turns")
        times[kind] = made.times(kind, repeats)
    memory = {
        name: transient(running)
        for name, running in made.running.items()
        # what a graph needs at its peak is its own pool, which no pass allocates again
        if not running.variant.how.graph
        and all(name not in taken.errors for taken in times.values())
    }
    clips: tuple[Mapping[str, Spread], Mapping[str, Spread]] = ({}, {})
    if clip_repeats:
        wrong = {name for taken in times.values() for name in taken.errors}
        names = [n for n in clip_names or made.running if n in made.running and n not in wrong]
        say(f"clips: {len(names)} variants, {clip_repeats} turns")
        clips = made.clips(names, clip_repeats)
    return table(variants, made, times, tops, clips, memory), times, tops
