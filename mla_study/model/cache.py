"""Key/value caches of the chunk-causal rollout: a preallocated ring with sink and window.

One class carries both layouts. An entry of a token is a pair of tensors: keys and values of all heads
(dense), or the shared latent and the shared rotary key (latent); keys are stored unrotated. Frames
are the unit of storage and of eviction; every slot knows the id of the frame it holds, so the order
of the slots does not matter: positions belong to frames, and attention does not care for order.

Shapes: B batch, F frames of capacity, T tokens a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from mla_study.config import ModelConfig, WindowConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import window_frames
from mla_study.model.quantize import Quantized, Scheme, dequantize, quantize

Storage = Literal["bf16", "fp16", "fp32", "fp64", "int8-channel", "int8-token"]
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds of a token in a layer: the trailing shapes of its two tensors."""

    first: tuple[int, ...]
    second: tuple[int, ...]

    @property
    def scalars(self) -> int:
        """Scalars a token and a layer: 3072 for dense Wan 1.3B, 224 for VideoMLA."""
        return prod(self.first) + prod(self.second)


def layout_of(config: ModelConfig) -> CacheLayout:
    """The layout that a model's self-attention caches."""
    if config.latent is None:
        head = (config.heads, config.head_dim)
        return CacheLayout(head, head)
    return CacheLayout((config.latent.d_c,), (config.latent.d_rope,))


class _Slots:
    """Storage of one of a layer's two tensors, plain or int8 with scales."""

    def __init__(
        self, batch: int, frames: int, tokens: int, shape: tuple[int, ...], storage: Storage,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self.scheme: Scheme | None = None
        full = (batch, frames * tokens, *shape)
        if storage in ("int8-channel", "int8-token"):
            self.scheme = "channel" if storage == "int8-channel" else "token"
            self.data = torch.zeros(full, dtype=torch.int8, device=device)
            scales = (
                (batch, frames, 1, *shape)
                if self.scheme == "channel"
                else (batch, frames, tokens, *(1 for _ in shape))
            )
            self.scales = torch.zeros(scales, dtype=torch.float16, device=device)
        else:
            self.data = torch.zeros(full, dtype=DTYPES[storage], device=device)
            self.scales = None

    def write(self, slot: int, values: Tensor) -> None:
        """Put one frame [B, T, ...] into a slot."""
        where = slice(slot * self.tokens, (slot + 1) * self.tokens)
        if self.scheme is None or self.scales is None:
            self.data[:, where] = values.to(self.data.dtype)
            return
        packed = quantize(values, self.scheme)
        self.data[:, where] = packed.data
        self.scales[:, slot] = packed.scales

    def read(self, slots: int, dtype: torch.dtype) -> Tensor:
        """The first ``slots`` slots [B, slots * T, ...]; a view where nothing needs unpacking."""
        data = self.data[:, : slots * self.tokens]
        if self.scheme is None or self.scales is None:
            return data.to(dtype)
        framed = data.unflatten(1, (slots, self.tokens))
        return dequantize(Quantized(framed, self.scales[:, :slots]), dtype).flatten(1, 2)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass
class RollingCache:
    """The cache of all layers of one rollout (or of one batch of rollouts in step).

    ``frames`` are the ids of the frames in the slots, in slot order; capacity is sink + history +
    chunk frames, so that the chunk that is being made lies in the ring too and nothing is copied.
    """

    config: ModelConfig
    window: WindowConfig
    batch: int
    tokens: int
    storage: Storage = "fp32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    frames: list[int] = field(default_factory=list[int])
    _layers: list[tuple[_Slots, _Slots]] = field(default_factory=list[tuple[_Slots, _Slots]])

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1:
            raise UserError(
                f"a cache needs at least one sample and one token a frame, not {self.batch} "
                f"and {self.tokens}"
            )
        shapes = layout_of(self.config)
        size = (self.batch, self.window.key_frames, self.tokens)
        for _ in range(self.config.layers):
            self._layers.append(
                (
                    _Slots(*size, shapes.first, self.storage, self.device),
                    _Slots(*size, shapes.second, self.storage, self.device),
                )
            )

    @property
    def nbytes(self) -> int:
        """Bytes allocated, scales included."""
        return sum(slots.nbytes for layer in self._layers for slots in layer)

    @property
    def bytes_per_token_layer(self) -> float:
        """Allocated bytes a token and a layer."""
        held = self.batch * self.window.key_frames * self.tokens * self.config.layers
        return self.nbytes / held

    def reset(self) -> None:
        """Forget every frame; the memory stays."""
        self.frames.clear()

    def begin(self, frames: Sequence[int]) -> list[int]:
        """Make room for a chunk and return the frame ids of all slots in use, the chunk's included.

        Oldest frames outside the sink go first. Calling it again for the same chunk changes nothing,
        so that each denoising pass of a chunk writes over the one before.

        Raises:
            UserError: frames that are no continuation, or more than the window's chunk.
        """
        new = list(frames)
        if len(new) > self.window.chunk:
            raise UserError(f"a chunk of {len(new)} frames exceeds the window's {self.window.chunk}")
        if not set(new) <= set(self.frames):
            start = new[0]
            known = max(self.frames, default=-1)
            if new != list(range(start, start + len(new))) or (self.frames and start != known + 1):
                raise UserError(f"frames {new} do not continue a cache that ends at frame {known}")
            keep = set(self.visible_before(start))
            free = [i for i, f in enumerate(self.frames) if f not in keep]
            for frame in new:
                if free:
                    self.frames[free.pop(0)] = frame
                else:
                    self.frames.append(frame)
            stale = [self.frames[i] for i in free]
            assert not stale or len(new) < self.window.chunk, "eviction leaves no holes"
        self._chunk = [self.frames.index(frame) for frame in new]
        return list(self.frames)

    def visible_before(self, start: int) -> tuple[int, ...]:
        """Ids of the cached frames that a chunk beginning at ``start`` sees."""
        wanted = window_frames(start, self.window.sink, self.window.history)
        return tuple(f for f in wanted if f in set(self.frames))

    def layers(self) -> list[LayerView]:
        """One view a layer, for the model's ``memory``."""
        return [LayerView(self, index) for index in range(len(self._layers))]

    def state(self) -> dict[str, Tensor]:
        """All tensors, for saving; :meth:`restore` takes them back."""
        held: dict[str, Tensor] = {"frames": torch.tensor(self.frames, dtype=torch.int64)}
        for i, pair in enumerate(self._layers):
            for name, slots in zip(("first", "second"), pair, strict=True):
                held[f"{i}.{name}"] = slots.data
                if slots.scales is not None:
                    held[f"{i}.{name}.scales"] = slots.scales
        return held

    def restore(self, held: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave; UserError where it belongs to another cache."""
        mine = self.state()
        for name, tensor in mine.items():
            if name == "frames":
                continue
            if name not in held or held[name].shape != tensor.shape or held[name].dtype != tensor.dtype:
                raise UserError(f"the saved cache has no {name} of shape {list(tensor.shape)}")
            tensor.copy_(held[name])
        self.frames = [int(f) for f in held["frames"]]


@dataclass(frozen=True)
class LayerView:
    """One layer of a cache: writes the chunk's entries in place and returns past and present.

    Where gradients flow nothing is written into the ring: past and present are joined in a new
    tensor, and the caller commits a detached copy (``RollingCache`` under ``torch.no_grad``).
    """

    cache: RollingCache
    index: int

    def extend(self, entry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Entries of all slots in use, in slot order, the current chunk's among them."""
        cache = self.cache
        used = len(cache.frames)
        joined: list[Tensor] = []
        for slots, values in zip(cache._layers[self.index], entry, strict=True):
            framed = values.unflatten(1, (len(cache._chunk), cache.tokens))
            if torch.is_grad_enabled() and values.requires_grad:
                past = slots.read(used, values.dtype).unflatten(1, (used, cache.tokens)).detach()
                parts = list(past.unbind(1))
                for offset, slot in enumerate(cache._chunk):
                    parts[slot] = framed[:, offset]
                joined.append(torch.stack(parts, dim=1).flatten(1, 2))
                continue
            for offset, slot in enumerate(cache._chunk):
                slots.write(slot, framed[:, offset])
            joined.append(slots.read(used, values.dtype))
        return joined[0], joined[1]
