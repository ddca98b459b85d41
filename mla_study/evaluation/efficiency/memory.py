"""Closed form of memory against batch (Fig. 7): weights, and what each request adds.

    memory(batch) = weights + runtime + batch * (cache + activations + transient)

- cache: what :class:`~mla_study.model.cache.RollingCache` allocates, to the byte.
- activations: all else that a request holds, as ``ACTIVATION_WIDTHS`` copies of the chunk's tokens
  [M, d]. The one fitted number: on the dense row of the paper's Fig. 7 (6.26 GB less 6.04 GB of
  cache), 0.22 GB at 1.3B. The prompt's cross-attention keys (:func:`text_bytes`, 0.094 GB) and the
  feed-forward layer's hidden tokens (0.084 GB) are the better part of it.
- transient: what one layer holds beside its cache while it attends. Reconstruction makes k_nope and
  v of all heads, H (d_nope + d_h) = 2688 channels a key at 1.3B; ``channels="all"`` adds the copies
  of the rotary key (3072), ``head_group`` makes some heads at a time.

GB are 1e9 bytes. All of it is of class ``modelled``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mla_study.config import ModelConfig, WindowConfig
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.model_cost import chunk_cost, frame_tokens, variant_of
from mla_study.kernels.latent_attention.cost import ITEM
from mla_study.model.cache import layout_of
from mla_study.model.quantize import SCALE_DTYPE
from mla_study.model.storage import DTYPES, SCHEMES, Storage
from mla_study.model.transformer import meta_model

Channels = Literal["made", "all"]
GB = 1e9
ACTIVATION_WIDTHS = 15.3
RUNTIME = 0.75 * GB
"""Assumed for the device's context and libraries, beside weights and requests."""
CAPACITIES: Mapping[str, float] = {"24 GB": 24.0, "80 GB": 80.0, "141 GB": 141.0, "180 GB": 180.0}


@dataclass(frozen=True)
class Slope:
    """What one more request adds, in bytes."""

    cache: float
    activations: float
    transient: float

    @property
    def total(self) -> float:
        """The sum: the slope of memory against batch."""
        return self.cache + self.activations + self.transient


@functools.lru_cache(maxsize=64)
def parameters(config: ModelConfig) -> int:
    """Parameters of the transformer, counted on the meta device; all blocks are alike."""
    one, two = (
        sum(p.numel() for p in meta_model(replace(config, layers=n)).parameters()) for n in (1, 2)
    )
    return one + (config.layers - 1) * (two - one)


def weight_bytes(config: ModelConfig, dtype: str = "bf16") -> int:
    """Bytes of the transformer's weights.

    Raises:
        UserError: an unknown dtype.
    """
    if dtype not in ITEM:
        raise UserError(f"there is no dtype '{dtype}': give one of {', '.join(ITEM)}")
    return parameters(config) * ITEM[dtype]


def cache_bytes(
    config: ModelConfig,
    frames: int,
    storage: Storage = "bf16",
    size: tuple[int, int] | None = None,
) -> int:
    """Bytes of a request's cache of ``frames`` latent frames in all layers, scales included.

    The rolling cache holds the chunk as well: ``window.key_frames``.
    """
    tokens, scalars = frame_tokens(config, size), layout_of(config).scalars
    frame = tokens * scalars * (1 if storage in SCHEMES else DTYPES[storage].itemsize)
    if storage in SCHEMES:
        # a scale a channel and frame, or one a token for each of the two tensors
        scales = scalars if SCHEMES[storage] == "channel" else 2 * tokens
        frame += scales * SCALE_DTYPE.itemsize
    return config.layers * frames * frame


def text_bytes(config: ModelConfig, dtype: str = "bf16") -> int:
    """Bytes of a prompt's cross-attention keys and values in all blocks: 0.094 GB at 1.3B."""
    return 2 * config.layers * config.text_len * config.width * ITEM[dtype]


def activation_bytes(
    config: ModelConfig,
    chunk: int,
    dtype: str = "bf16",
    size: tuple[int, int] | None = None,
) -> float:
    """Bytes that a request holds beside cache and transient (fitted, see the module's head)."""
    return ACTIVATION_WIDTHS * chunk * frame_tokens(config, size) * config.width * ITEM[dtype]


def transient_bytes(
    config: ModelConfig,
    window: WindowConfig,
    form: str | None = None,
    *,
    dtype: str = "bf16",
    size: tuple[int, int] | None = None,
    channels: Channels = "made",
    head_group: int | None = None,
) -> float:
    """Bytes that a request needs while one layer attends, over all keys of the window.

    Args:
        channels: ``made`` counts k_nope and v, ``all`` also every head's copy of the rotary key.
        head_group: heads reconstructed at a time.
    """
    variant = variant_of(config, form)
    cost = chunk_cost(config, window, variant, dtype=dtype, size=size, passes=1)
    whole = cost.block["self-attention"].transient
    if variant != "reconstruct" or config.latent is None:
        return whole
    if head_group is not None and head_group < 1:
        raise UserError(f"a group of {head_group} heads is none: give at least 1")
    share = 1.0 if head_group is None else min(head_group, config.heads) / config.heads
    made = (config.latent.d_nope + config.head_dim) / (2 * config.head_dim)
    return whole * share * (made if channels == "made" else 1.0)


def slope(
    config: ModelConfig,
    window: WindowConfig | None = None,
    form: str | None = None,
    *,
    storage: Storage = "bf16",
    dtype: str = "bf16",
    size: tuple[int, int] | None = None,
    channels: Channels = "made",
    head_group: int | None = None,
) -> Slope:
    """What one more request adds (Fig. 7's slope), for a window that is full."""
    window = window or config.window
    return Slope(
        cache_bytes(config, window.key_frames, storage, size),
        activation_bytes(config, window.chunk, dtype, size),
        transient_bytes(
            config, window, form, dtype=dtype, size=size, channels=channels, head_group=head_group
        ),
    )


def max_batch(config: ModelConfig, each: Slope, memory: float, dtype: str = "bf16") -> int:
    """Requests that fit into ``memory`` bytes beside weights and runtime; 0 where none does."""
    left = memory - weight_bytes(config, dtype) - RUNTIME
    return max(0, int(left // each.total))


def with_latent_dim(config: ModelConfig, d_c: int) -> ModelConfig:
    """A latent model with another d_c (the rows of Fig. 7 and Table 5a).

    Raises:
        UserError: the model is dense, or d_c does not fit it.
    """
    if config.latent is None:
        raise UserError(f"{config.name} is dense: it has no latent dimension to choose")
    return replace(config, latent=replace(config.latent, d_c=d_c))
