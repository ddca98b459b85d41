"""Faster passes on a GPU: compiled blocks, one CUDA graph a place in the ring, fp8 projections.

All three change how a pass is computed and not what it means (fp8 rounds). They apply once the
window is full, when shapes no longer change; the first chunks run as they are. The slots that a
chunk takes then cycle through a few places (three at sink 1, history 6, chunk 3), and each place
has a graph of its own: everything else that varies (latents, timesteps, rotations, prompt) is
copied into fixed buffers before a replay.

Shapes: B batch, C channels, f frames of a chunk, height x width of the latent.

Example::

    rollout = Rollout(model, ["a red disc"], predict=accelerate(model, Acceleration(graph=True)))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.model.attention import Entry, LatentSelfAttention, LayerMemory, Piece
from mla_study.model.cache import LayerView
from mla_study.model.fp8 import require_fp8, to_fp8
from mla_study.model.rope import Rotation
from mla_study.model.transformer import Block, Conditioning, WanTransformer


@runtime_checkable
class Predict(Protocol):
    """One pass, as the model itself makes it: its flow."""

    def __call__(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, *, pieces: Sequence[Piece],
        memory: Sequence[LayerMemory],
    ) -> Tensor: ...  # fmt: skip


Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Records the work of a call: gives what replays it, and the tensor that a replay fills."""


@dataclass(frozen=True)
class Acceleration:
    """What to switch on; ``backend`` is torch.compile's."""

    compile: bool = False
    graph: bool = False
    fp8: bool = False
    backend: str = "inductor"

    @property
    def any(self) -> bool:
        """Whether anything is."""
        return self.compile or self.graph or self.fp8

    def text(self) -> str:
        """Such as ``compile + graph``."""
        chosen = ("compile", self.compile), ("graph", self.graph), ("fp8", self.fp8)
        return " + ".join(name for name, on in chosen if on) or "eager"


def accelerate(model: WanTransformer, how: Acceleration, capture: Capture | None = None) -> Predict:
    """The model's pass, accelerated; for one rollout, without gradients.

    Args:
        model: changed in place by ``fp8`` (projections replaced) and ``compile`` (blocks compiled).
        capture: records a graph; None takes CUDA's.

    Raises:
        UserError: this device cannot do what is asked.
    """
    device = model.patch_embedding.weight.device
    if how.graph and capture is None and device.type != "cuda":
        raise UserError("graphs record the work of a GPU, and this model is on the CPU: leave out "
                        "--graph, or give --device cuda")  # fmt: skip
    if how.fp8:
        require_fp8(device)
        to_fp8(model)
    if (how.graph or how.compile) and any(a.keep_expanded for a in latent_attentions(model)):
        raise UserError(
            "a recorded or compiled pass cannot hold expanded keys from pass to pass: turn "
            "keep_expanded off, or leave out --graph and --compile"
        )
    steady: Predict = compiled(model, how.backend) if how.compile else model
    if how.graph:
        steady = Graphs(steady, capture or CudaCapture())
    if steady is model:
        return model

    def predict(
        x: Tensor, t: Tensor, conditioning: Conditioning, *, pieces: Sequence[Piece],
        memory: Sequence[LayerMemory],
    ) -> Tensor:  # fmt: skip
        if full(memory):
            return steady(x, t, conditioning, pieces=pieces, memory=memory)
        # a window that still grows would compile anew for each of its sizes
        with torch.compiler.set_stance("force_eager") if how.compile else nullcontext():
            return model(x, t, conditioning, pieces=pieces, memory=memory)

    return predict


def latent_attentions(model: WanTransformer) -> list[LatentSelfAttention]:
    """The self-attentions of a latent model; none of a dense one."""
    blocks = cast("list[Block]", list(model.blocks))
    return [b.self_attn for b in blocks if isinstance(b.self_attn, LatentSelfAttention)]


def _views(memory: Sequence[LayerMemory]) -> list[LayerView]:
    views = [view for view in memory if isinstance(view, LayerView)]
    if len(views) != len(memory) or not views:
        raise ValueError("an accelerated pass needs the layers of a RollingCache")
    return views


def full(memory: Sequence[LayerMemory]) -> bool:
    """Whether every slot of the ring is in use: shapes stay as they are from here on."""
    cache = _views(memory)[0].cache
    return len(cache.frames) == cache.window.key_frames


# compile


@functools.cache
def _opaque() -> type[Any]:
    """A view of a layer's cache that the compiler steps around: slots differ from place to place.

    Made on demand, since importing the compiler takes seconds.
    """

    class Opaque:
        def __init__(self, view: LayerMemory) -> None:
            self.view = view

        @property
        def frames(self) -> Sequence[int]:
            return self.view.frames

        def step(self) -> Opaque:
            return self

        @torch.compiler.disable
        def extend(self, entry: Entry) -> Entry:
            return self.view.step().extend(entry)

    return Opaque


def compiled(model: WanTransformer, backend: str = "inductor") -> Predict:
    """The pass with compiled blocks; all blocks share one compilation, in parts about the cache.

    The form of latent attention is chosen at the first pass, for the choice reads files.
    """
    import torch._dynamo.config as limits

    # several models of one process share the code of a block, and each needs an entry of its own
    limits.recompile_limit = max(limits.recompile_limit, 64)
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    opaque = _opaque()
    held: dict[int, tuple[Sequence[LayerMemory], list[Any]]] = {}

    def predict(
        x: Tensor, t: Tensor, conditioning: Conditioning, *, pieces: Sequence[Piece],
        memory: Sequence[LayerMemory],
    ) -> Tensor:  # fmt: skip
        if id(memory) not in held:
            _settle(model, x.shape[0], pieces)
            held.clear()
            held[id(memory)] = memory, [opaque(view) for view in memory]
        return model(x, t, conditioning, pieces=pieces, memory=held[id(memory)][1])

    return predict


def _settle(model: WanTransformer, batch: int, pieces: Sequence[Piece]) -> None:
    queries, keys = (
        turn.cis.shape[0] for turn in (pieces[0].query_rotation, pieces[0].key_rotation)
    )
    for attention in latent_attentions(model):
        shape = (batch, queries, attention.heads, attention.d_nope)
        attention.form = attention.form_for(attention.o.weight.new_empty(1).expand(shape), keys)


# graphs


class CudaCapture:
    """CUDA graphs in one memory pool: a replay's output must be copied before the next replay."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Warm up on a stream of its own (workspaces, compilation), then record."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = call()
        self._pool = graph.pool()
        return graph.replay, out


@dataclass
class _Buffers:
    """What a recorded pass reads: fixed tensors that each call's own are copied into."""

    x: Tensor
    t: Tensor
    conditioning: Conditioning
    pieces: list[Piece]
    told: Conditioning | None = None
    turned: Sequence[Piece] | None = None

    @classmethod
    def like(
        cls, x: Tensor, t: Tensor, conditioning: Conditioning, pieces: Sequence[Piece]
    ) -> _Buffers:
        """Of these shapes."""
        keys = tuple(tuple((k.clone(), v.clone()) for k, v in block) for block in conditioning.keys)
        fixed = [
            replace(
                piece,
                query_rotation=Rotation(piece.query_rotation.cis.clone()),
                key_rotation=Rotation(piece.key_rotation.cis.clone()),
            )
            for piece in pieces
        ]
        return cls(x.clone(), t.clone(), Conditioning(keys), fixed)

    def fill(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, pieces: Sequence[Piece]
    ) -> None:
        """Copy; prompt and rotations only where they are others than before."""
        self.x.copy_(x)
        self.t.copy_(t)
        if conditioning is not self.told:
            for mine, theirs in zip(self.conditioning.keys, conditioning.keys, strict=True):
                for held, given in zip(mine, theirs, strict=True):
                    held[0].copy_(given[0])
                    held[1].copy_(given[1])
            self.told = conditioning
        if pieces is not self.turned:
            for mine, theirs in zip(self.pieces, pieces, strict=True):
                mine.query_rotation.cis.copy_(theirs.query_rotation.cis)
                mine.key_rotation.cis.copy_(theirs.key_rotation.cis)
            self.turned = pieces


class Graphs:
    """A pass recorded once for each place that a chunk takes in the ring, replayed after that.

    Another cache, batch or latent size forgets the recordings. ``recorded`` counts those at hand.
    """

    def __init__(self, predict: Predict, capture: Capture) -> None:
        self._predict, self._capture = predict, capture
        self._memory: Sequence[LayerMemory] | None = None
        self._shape: object = None
        self._buffers: _Buffers | None = None
        self._places: dict[object, tuple[Callable[[], object], Tensor]] = {}

    @property
    def recorded(self) -> int:
        """Graphs at hand."""
        return len(self._places)

    def __call__(
        self,
        x: Float[Tensor, "B C f height width"],
        t: Tensor,
        conditioning: Conditioning,
        *,
        pieces: Sequence[Piece],
        memory: Sequence[LayerMemory],
    ) -> Tensor:
        """Replay the pass of this place, recording it first where it is new."""
        tables = [(p.queries, p.keys, p.query_rotation.cis.shape, p.key_rotation.cis.shape)
                  for p in pieces]  # fmt: skip
        shape = (x.shape, x.dtype, t.shape, tables)
        if memory is not self._memory or shape != self._shape or self._buffers is None:
            self._places.clear()
            self._memory, self._shape = memory, shape
            self._buffers = _Buffers.like(x, t, conditioning, pieces)
        fixed = self._buffers
        fixed.fill(x, t, conditioning, pieces)
        view = _views(memory)[0]
        # the slices that a recording holds: where the chunk is written, and how far is read
        place = (tuple((a.start, a.stop) for a, _ in view.runs), len(view.cache.frames))
        if place not in self._places:
            self._places[place] = self._capture(
                lambda: self._predict(
                    fixed.x, fixed.t, fixed.conditioning, pieces=fixed.pieces, memory=memory
                )
            )
        replay, out = self._places[place]
        replay()
        return out.clone()
