"""Key/value caches of the chunk-causal rollout: a preallocated ring with sink and window.

One class carries both layouts. An entry of a token is a pair of tensors: keys and values of all
heads (dense), or the shared latent and the shared rotary key (latent); keys are stored unrotated.
Frames are the unit of storage and of eviction; every slot knows the id of the frame it holds, so
the order of the slots does not matter: positions belong to frames, and attention does not care for
order. The slots in use are always the first ones, so that reading them is a view.

Shapes: B batch, F frames of capacity, T tokens a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import get_args

import torch
from torch import Tensor

from mla_study.config import ModelConfig, WindowConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import window_frames
from mla_study.model.attention import Entry, LayerStep
from mla_study.model.storage import DTYPES, SCHEMES, Slots, Storage, rounded


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


class RollingCache:
    """The cache of all layers of one rollout (or of one batch of rollouts in step).

    Capacity is sink + history + chunk frames, so that the chunk that is being made lies in the ring
    too and nothing is copied. Under ``torch.no_grad`` entries are written in place. Where gradients
    are on, attention gets new tensors and the frames of the chunk keep their graph until they are
    evicted, written again without gradients, or :meth:`detach` is called; the ring then only
    receives detached copies.

    Attributes:
        frames: ids of the frames in the slots in use, in slot order.
        chunk: ids of the chunk that is being made, from :meth:`begin`.
    """

    def __init__(
        self,
        config: ModelConfig,
        window: WindowConfig,
        batch: int,
        tokens: int,
        storage: Storage = "fp32",
        device: torch.device | None = None,
    ) -> None:
        """Allocate.

        Args:
            window: its three numbers are the capacity.
            batch, tokens: samples, and tokens a latent frame.
            storage: what entries are kept in.

        Raises:
            UserError: no sample, no token, or an unknown storage.
        """
        if batch < 1 or tokens < 1:
            raise UserError(
                f"a cache needs at least one sample and one token a frame, not {batch} and {tokens}"
            )
        if storage not in get_args(Storage):
            known = ", ".join(get_args(Storage))
            raise UserError(f"there is no cache storage '{storage}': give one of {known}")
        self.config, self.window = config, window
        self.batch, self.tokens = batch, tokens
        self.storage: Storage = storage
        self.device = device if device is not None else torch.device("cpu")
        self.frames: list[int] = []
        self.chunk: tuple[int, ...] = ()
        layout = layout_of(config)
        size = (batch, window.key_frames, tokens)
        self._layers = [
            (
                Slots(*size, layout.first, self.storage, self.device),
                Slots(*size, layout.second, self.storage, self.device),
            )
            for _ in range(config.layers)
        ]
        self._graph: list[dict[int, Entry]] = [{} for _ in self._layers]
        self._runs: list[tuple[slice, slice]] = []
        self._held: list[list[Entry]] = [[] for _ in self._layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, scales included; what layers hold expanded besides is not counted."""
        return sum(t.nbytes for pair in self._layers for slots in pair for t in slots.tensors())

    @property
    def bytes_per_token_layer(self) -> float:
        """Allocated bytes a token and a layer."""
        held = self.batch * self.window.key_frames * self.tokens * self.config.layers
        return self.nbytes / held

    def reset(self) -> None:
        """Forget every frame; the memory stays."""
        self.frames.clear()
        self.chunk = ()
        self._forget()
        self.detach()

    def _forget(self) -> None:
        for held in self._held:
            held.clear()

    def detach(self) -> None:
        """Let go of the graphs of all entries; their values stay."""
        for held in self._graph:
            held.clear()

    def begin(self, frames: Sequence[int], gap: bool = False) -> list[int]:
        """Make room for a chunk; return the frame ids of all slots in use, the chunk's included.

        Frames outside sink and history go. Calling it again for the chunk in progress changes
        nothing, so that each denoising pass of a chunk writes over the one before.

        Args:
            frames: consecutive ids that follow the newest held, or the newest held themselves.
            gap: allow ids that leave some out after the newest held, as filling a cache anew with
                the sink and then the window's frames does.

        Raises:
            UserError: frames that are no continuation, or more than the window's chunk.
        """
        new = list(frames)
        if not new or new != list(range(new[0], new[0] + len(new))):
            raise UserError(f"a chunk needs consecutive frames, not {new}")
        if len(new) > self.window.chunk:
            raise UserError(
                f"a chunk of {len(new)} frames exceeds the window's {self.window.chunk}"
            )
        start, newest = new[0], max(self.frames, default=-1)
        again = sorted(f for f in self.frames if f >= start) == new
        follows = start == newest + 1 or not self.frames or (gap and start > newest)
        if not again and not follows:
            raise UserError(f"frames {new} do not continue a cache that ends at frame {newest}")
        wanted = {*self.visible_before(start), *new}
        if wanted != set(self.frames):
            self._make_room(wanted, new)
        if self.chunk != tuple(new):
            self._forget()
        self.chunk = tuple(new)
        self._runs = _runs([self.frames.index(frame) for frame in new])
        return list(self.frames)

    def _make_room(self, wanted: set[int], new: Sequence[int]) -> None:
        free = [slot for slot, frame in enumerate(self.frames) if frame not in wanted]
        for held in self._graph:
            for slot in free:
                held.pop(self.frames[slot], None)
        for frame in (f for f in new if f not in self.frames):
            if free:
                self.frames[free.pop(0)] = frame
            else:
                self.frames.append(frame)
        # a chunk shorter than what it evicts leaves holes: fill them from the end
        while free:
            last = len(self.frames) - 1
            if free[-1] == last:
                free.pop()
            else:
                hole = free.pop(0)
                self.frames[hole] = self.frames[last]
                for pair in self._layers:
                    for slots in pair:
                        slots.move(last, hole)
            self.frames.pop()

    def visible_before(self, start: int) -> tuple[int, ...]:
        """Ids of the cached frames that a chunk beginning at ``start`` sees."""
        held = set(self.frames)
        wanted = window_frames(start, self.window.sink, self.window.history)
        # after a gap the window may reach back to frames that were never cached
        return tuple(f for f in wanted if f in held)

    def layers(self) -> list[LayerView]:
        """One view a layer, for the model's ``memory``; good for every pass of this cache."""
        return [LayerView(self, index) for index in range(len(self._layers))]

    def read(self, layer: int, dtype: torch.dtype = torch.float32) -> Entry:
        """Entries [B, n, T, ...] of a layer's slots in use, in the order of :attr:`frames`."""
        used = slice(0, len(self.frames))
        first, second = self._layers[layer]
        return first.read(used, dtype), second.read(used, dtype)

    def state(self) -> dict[str, Tensor]:
        """All tensors (not copies), for saving; :meth:`restore` takes them back."""
        held: dict[str, Tensor] = {"frames": torch.tensor(self.frames, dtype=torch.int64)}
        for i, pair in enumerate(self._layers):
            for name, slots in zip(("first", "second"), pair, strict=True):
                held[f"{i}.{name}"] = slots.data
                if slots.scales is not None:
                    held[f"{i}.{name}.scales"] = slots.scales
        return held

    def restore(self, held: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            UserError: tensors that are missing, of another shape or dtype, or frames that do not
                fit this window; nothing is taken then.
        """
        mine = self.state()
        for name in sorted({*mine, *held}):
            if name not in held or name not in mine:
                side = "lacks" if name not in held else "has a foreign"
                raise UserError(f"the saved cache {side} {name}: it belongs to another model")
            theirs, ours = held[name], mine[name]
            same = theirs.dtype == ours.dtype and (name == "frames" or theirs.shape == ours.shape)
            if not same:
                raise UserError(
                    f"the saved cache has {name} of {theirs.dtype} {list(theirs.shape)}, but "
                    f"{ours.dtype} {list(ours.shape)} is needed: window, batch or size differ"
                )
        frames = [int(f) for f in held["frames"].flatten()]
        if len(frames) > self.window.key_frames or len(set(frames)) < len(frames):
            raise UserError(
                f"the saved cache holds frames {frames}, which do not fit a window of "
                f"{self.window.key_frames}"
            )
        for name, tensor in mine.items():
            if name != "frames":
                tensor.copy_(held[name])
        self.reset()
        self.frames = frames


def _runs(slots: Sequence[int]) -> list[tuple[slice, slice]]:
    """Neighbouring slots as (slice of slots, slice of the chunk), so that they copy at once."""
    runs: list[tuple[slice, slice]] = []
    for offset, slot in enumerate(slots):
        if runs and runs[-1][0].stop == slot:
            where, source = runs[-1]
            runs[-1] = (slice(where.start, slot + 1), slice(source.start, offset + 1))
        else:
            runs.append((slice(slot, slot + 1), slice(offset, offset + 1)))
    return runs


@dataclass(frozen=True)
class LayerView:
    """One layer of a cache, as the model sees it: writes the chunk in place and reads the slots."""

    cache: RollingCache
    index: int

    @property
    def frames(self) -> tuple[int, ...]:
        """Ids of the frames in progress."""
        return self.cache.chunk

    @property
    def slots(self) -> tuple[Slots, Slots]:
        """Storage of the two tensors."""
        return self.cache._layers[self.index]  # pyright: ignore[reportPrivateUsage]

    @property
    def runs(self) -> list[tuple[slice, slice]]:
        """Where the chunk lies."""
        return self.cache._runs  # pyright: ignore[reportPrivateUsage]

    @property
    def held(self) -> list[Entry]:
        """What the layer keeps while the past is the same; a pass with gradients empties it."""
        return self.cache._held[self.index]  # pyright: ignore[reportPrivateUsage]

    @property
    def fresh(self) -> tuple[slice, ...]:
        """Tokens of the chunk among those that :meth:`extend` returns."""
        each = self.cache.tokens
        return tuple(slice(w.start * each, w.stop * each) for w, _ in self.runs)

    @property
    def graph(self) -> dict[int, Entry]:
        """Entries [B, T, ...] of frames that still carry gradients."""
        return self.cache._graph[self.index]  # pyright: ignore[reportPrivateUsage]

    def step(self) -> LayerStep:
        """What one pass of the model writes to and reads from."""
        if not torch.is_grad_enabled():
            return self
        self.held.clear()
        return _GraphStep(self)

    def framed(self, values: Tensor, count: int) -> Tensor:
        """[B, count * T, ...] to [B, count, T, ...]; UserError where they do not fit the cache."""
        cache = self.cache
        if values.shape[:2] != (cache.batch, count * cache.tokens):
            raise UserError(
                f"a pass over {values.shape[0]} samples of {values.shape[1]} tokens does not fit a "
                f"cache of {cache.batch} samples with {count} frames of {cache.tokens} tokens begun"
            )
        return values.unflatten(1, (count, cache.tokens))

    def write(self, entry: Entry) -> None:
        """Put the chunk's entries [B, n, T, ...] into their slots."""
        for slots, values in zip(self.slots, entry, strict=True):
            for where, source in self.runs:
                slots.write(where, values[:, source])

    def extend(self, entry: Entry) -> Entry:
        """Write the chunk; entries of all slots in use [B, F * T, ...], in slot order."""
        count = len(self.frames)
        self.write((self.framed(entry[0], count), self.framed(entry[1], count)))
        for frame in self.frames if self.graph else ():
            self.graph.pop(frame, None)
        used = slice(0, len(self.cache.frames))
        first, second = self.slots
        dtype = entry[0].dtype
        return first.read(used, dtype).flatten(1, 2), second.read(used, dtype).flatten(1, 2)


class _GraphStep:
    """One pass where gradients are on: pure, so that a block can be recomputed in the backward.

    The past is copied when the pass begins; the first :meth:`extend` records the chunk in the
    cache, later ones (recomputation) only join.
    """

    def __init__(self, view: LayerView) -> None:
        self.view = view
        self.recorded = False
        cache = view.cache
        self.count = len(cache.chunk)
        self.past: list[Entry | int] = []  # an int: that frame of the chunk
        dtype = torch.float32 if cache.storage in SCHEMES else DTYPES[cache.storage]
        for slot, frame in enumerate(cache.frames):
            if frame in cache.chunk:
                self.past.append(cache.chunk.index(frame))
            elif frame in view.graph:
                self.past.append(view.graph[frame])
            else:
                first, second = (s.read(slice(slot, slot + 1), dtype)[:, 0] for s in view.slots)
                self.past.append((first.clone(), second.clone()))

    def extend(self, entry: Entry) -> Entry:
        """Entries of past and present in slot order, in new tensors."""
        view, storage = self.view, self.view.cache.storage
        framed = (view.framed(entry[0], self.count), view.framed(entry[1], self.count))
        mine = (rounded(framed[0], storage), rounded(framed[1], storage))
        if not self.recorded:
            self.recorded = True
            with torch.no_grad():
                view.write((framed[0].detach(), framed[1].detach()))
            if mine[0].requires_grad or mine[1].requires_grad:
                for offset, frame in enumerate(view.frames):
                    view.graph[frame] = (mine[0][:, offset], mine[1][:, offset])
        joined: list[Tensor] = []
        for which in (0, 1):
            dtype = entry[which].dtype
            parts = [
                mine[which][:, p] if isinstance(p, int) else p[which].to(dtype) for p in self.past
            ]
            joined.append(torch.cat(parts, dim=1))
        return joined[0], joined[1]
