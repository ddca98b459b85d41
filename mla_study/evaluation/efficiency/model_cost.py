"""FLOPs and bytes of the whole transformer, from a config alone: what a chunk of a rollout costs.

Matrix products and attention are counted (FLOP = 2 multiply-adds), as ``torch``'s FLOP counter
does; norms, modulation, rotations, the sampler, the VAE and the text encoder are not. The steady
state is meant: the window is full. Attention proper comes from
:mod:`mla_study.kernels.latent_attention.cost`.

Example::

    chunk_cost(wan_1_3b(latent=True), form="reconstruct").flops  # 124.3e12

Letters: B batch, M tokens of a chunk, K key tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mla_study.config import ModelConfig, WindowConfig
from mla_study.errors import UserError
from mla_study.kernels.latent_attention.cost import (
    ITEM,
    Calibration,
    Cost,
    Form,
    Phase,
    Shape,
    absorbed_cost,
    dense_cost,
    reconstruct_cost,
)

Variant = Literal["dense", "reconstruct", "absorbed"]
CLEAN_PASSES = 1  # a pass at t = 0 leaves the chunk's entries in the cache
IMAGE_TOKENS = 257  # of CLIP, attended by I2V models beside the text

WINDOWS: Mapping[str, WindowConfig] = {
    "21 frames": WindowConfig(0, 18, 3),
    "1 + 6 + chunk": WindowConfig(1, 6, 3),
    "1 + 6 with chunk": WindowConfig(1, 3, 3),
}
"""Windows of the efficiency study: everything (the chunk within the 21), and the two readings of
the paper's sink 1 and window 6, the chunk beside them and within them."""


@dataclass(frozen=True)
class ModelCost:
    """One pass over a chunk, part by part, and how many passes a chunk takes.

    Attributes:
        block: part of one block -> its cost; all ``layers`` are alike.
        ends: parts that a pass runs once.
    """

    block: Mapping[str, Cost]
    ends: Mapping[str, Cost]
    layers: int
    passes: int

    @property
    def parts(self) -> dict[str, float]:
        """Part -> FLOPs of all layers and passes."""
        inside = {name: self.layers * cost.flops for name, cost in self.block.items()}
        outside = {name: cost.flops for name, cost in self.ends.items()}
        return {name: self.passes * flops for name, flops in {**inside, **outside}.items()}

    @property
    def flops(self) -> float:
        """Of all passes."""
        return sum(self.parts.values())

    @property
    def bytes(self) -> float:
        """Read and written in all passes: weights once a pass, inputs and outputs of each part."""
        block = sum(cost.bytes for cost in self.block.values())
        return self.passes * (self.layers * block + sum(cost.bytes for cost in self.ends.values()))

    def seconds(self, calibration: Calibration, variant: Variant) -> float:
        """Modelled seconds of all passes: a roofline a phase, one call's overhead a block.

        Dense attention runs at the rate of reconstructed, which is the same kernel; absorbed at
        that of the fused kernel where there is one.
        """
        form: Form = "reconstruct"
        if variant == "absorbed":
            form = "absorbed" if calibration.absorbed_triton is None else "absorbed_triton"
        block = _joined(self.block)
        spent = self.layers * calibration.seconds(block, form)
        return self.passes * (spent + calibration.seconds(_joined(self.ends), form))


def passes_of(config: ModelConfig) -> int:
    """Passes a chunk: the denoising steps and the clean one (5 for Wan)."""
    return len(config.flow.denoise_steps) + CLEAN_PASSES


def frame_tokens(config: ModelConfig, size: tuple[int, int] | None = None) -> int:
    """Tokens of a latent frame of (height, width), by default the model's own (1560 for Wan)."""
    rows, columns = size or config.latent_size
    return (rows // config.patch[1]) * (columns // config.patch[2])


def video_frames(config: ModelConfig, window: WindowConfig) -> int:
    """Video frames of a chunk in the steady state (12 for Wan)."""
    return window.chunk * config.codec_stride[0]


def variant_of(config: ModelConfig, form: str | None = None) -> Variant:
    """What a config's self-attention runs as; latent models reconstruct unless told otherwise.

    Raises:
        UserError: a form that does not fit the model.
    """
    known: dict[str, Variant] = {name: name for name in get_args(Variant)}
    variant = known.get(form or ("dense" if config.latent is None else "reconstruct"))
    if variant is None:
        raise UserError(f"there is no form '{form}': give one of {', '.join(known)}")
    if (variant == "dense") != (config.latent is None):
        kind = "dense" if config.latent is None else "latent"
        raise UserError(f"{config.name} has {kind} self-attention, which does not run as {variant}")
    return variant


def chunk_cost(
    config: ModelConfig,
    window: WindowConfig | None = None,
    form: str | None = None,
    *,
    batch: int = 1,
    dtype: str = "bf16",
    size: tuple[int, int] | None = None,
    passes: int | None = None,
    value_is_key: bool = False,
) -> ModelCost:
    """The cost of a chunk in the steady state of a rollout.

    Args:
        window: by default the config's own.
        form: dense, reconstruct or absorbed, see :func:`variant_of`.
        size: (height, width) of the latent, by default the config's own.
        passes: by default :func:`passes_of`; 1 for a single step.
        value_is_key: absorbed as SDPA computes it, see
            :func:`~mla_study.kernels.latent_attention.cost.absorbed_cost`.

    Raises:
        UserError: an unknown form or dtype, or a batch below 1.
    """
    window = window or config.window
    variant = variant_of(config, form)
    if dtype not in ITEM:
        raise UserError(f"there is no dtype '{dtype}': give one of {', '.join(ITEM)}")
    tokens = frame_tokens(config, size)
    count = passes_of(config) if passes is None else passes
    shape = _shape(config, window.chunk * tokens, window.key_frames * tokens, batch, dtype, count)
    make = _Linear(batch * shape.queries, ITEM[dtype])
    d = config.width
    cross = [config.text_len] + [IMAGE_TOKENS] * (config.model_type == "i2v")
    block = {
        "projections": _projections(config, make),
        "self-attention": _attention(variant, shape, value_is_key),
        "cross-attention": Cost(
            (
                *make(d, d, 2).phases,
                *(
                    phase
                    for keys in cross
                    for phase in dense_cost(
                        _shape(config, shape.queries, keys, batch, dtype, count)
                    ).phases
                ),
            ),
            0.0,
        ),
        "ffn": _joined({"up": make(d, config.ffn_width), "down": make(config.ffn_width, d)}),
    }
    per_patch = math.prod(config.patch)
    once = _Linear(batch, ITEM[dtype])
    ends = {
        "patch": make(config.in_channels * per_patch, d),
        "time": _joined({"in": once(config.freq_dim, d), "mid": once(d, d), "out": once(d, 6 * d)}),
        "head": make(d, config.out_channels * per_patch),
    }
    return ModelCost(block, ends, config.layers, count)


def prompt_cost(config: ModelConfig, batch: int = 1, dtype: str = "bf16") -> Cost:
    """What a prompt costs once: the text embedding and every block's cross-attention keys."""
    make = _Linear(batch * config.text_len, ITEM[dtype])
    d = config.width
    keys = make(d, d, 2 * config.layers)
    return _joined({"in": make(config.text_dim, d), "mid": make(d, d), "keys": keys})


def fps_bound(config: ModelConfig, window: WindowConfig, cost: ModelCost, rate: float) -> float:
    """Video frames a second, were every FLOP of a batch-1 chunk done at ``rate`` FLOP/s."""
    return video_frames(config, window) * rate / cost.flops


@dataclass(frozen=True)
class _Linear:
    """Linear layers over ``rows`` tokens: FLOPs, and bytes of weight, input and output."""

    rows: int
    item: int

    def __call__(self, into: int, out: int, count: int = 1) -> Cost:
        moved = (into * out + self.rows * (into + out)) * self.item
        phase = Phase("gemm", 2.0 * self.rows * into * out, float(moved), self.rows)
        return Cost((phase,) * count, 0.0)


def _shape(
    config: ModelConfig, queries: int, keys: int, batch: int, dtype: str, passes: int
) -> Shape:
    latent = config.latent
    d_c, d_rope = (1, 0) if latent is None else (latent.d_c, latent.d_rope)
    return Shape(queries, keys, batch, config.heads, d_c, d_rope, config.head_dim, dtype, passes)


def _projections(config: ModelConfig, make: _Linear) -> Cost:
    d, latent = config.width, config.latent
    if latent is None:
        return make(d, d, 4)
    return _joined(
        {
            "kv_down": make(d, latent.d_c),
            "k_rope": make(d, latent.d_rope) if latent.d_rope else Cost((), 0.0),
            "q_down": make(d, latent.d_q),
            "q_up": make(latent.d_q, config.heads * latent.d_nope),
            "q_rope": make(latent.d_q, config.heads * latent.d_rope),
            "o": make(d, d),
        }
    )


def _attention(variant: Variant, shape: Shape, value_is_key: bool) -> Cost:
    if variant == "dense":
        return dense_cost(shape)
    if variant == "reconstruct":
        return reconstruct_cost(shape)
    return absorbed_cost(shape, value_is_key)


def _joined(costs: Mapping[str, Cost]) -> Cost:
    phases = tuple(phase for cost in costs.values() for phase in cost.phases)
    return Cost(phases, max((cost.transient for cost in costs.values()), default=0.0))
