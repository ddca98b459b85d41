"""Faster passes on a GPU: compiled blocks, one CUDA graph a place in the ring, fp8 projections.

All three change how a pass is computed and not what it means (fp8 rounds). They apply once the
window is full, when shapes no longer change; the first chunks run as they are. The slots that a
chunk takes then cycle through a few places (three at sink 1, history 6, chunk 3), and each place
has a graph of its own: everything else that varies (latents, timesteps, rotations, prompt) is
copied into fixed buffers before a replay.

Shapes: B batch, C channels, f frames of a chunk, M tokens, N outputs, K inputs.

Example::

    rollout = Rollout(model, ["a red disc"], predict=accelerate(model, Acceleration(graph=True)))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mla_study.errors import UserError
from mla_study.model.attention import Entry, LayerMemory, Piece
from mla_study.model.cache import LayerView
from mla_study.model.rope import Rotation
from mla_study.model.transformer import Conditioning, WanTransformer

Predict = Callable[
    [Tensor, Tensor, Conditioning, Sequence[Piece], Sequence[LayerMemory]],
    Tensor,
]
"""(latents, timesteps, conditioning, pieces, memory) -> flow: one pass of the model."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Records the work of a call: gives what replays it, and the tensor that a replay fills."""

FP8 = torch.float8_e4m3fn
FP8_LAYERS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "self_attn.q_down",
    "self_attn.kv_down", "self_attn.q_up", "self_attn.q_rope", "cross_attn.q", "cross_attn.o",
    "ffn.0", "ffn.2",
)  # fmt: skip
"""Projections that fp8 takes over. k_up and v_up are read by the attention kernels as matrices, the
shared rotary key stays exact, and the text's keys are made once a prompt."""


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

    def eager(
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        pieces: Sequence[Piece],
        memory: Sequence[LayerMemory],
    ) -> Tensor:
        return model(x, t, conditioning, pieces=pieces, memory=memory)

    steady: Predict = compiled(model, how.backend) if how.compile else eager
    if how.graph:
        steady = Graphs(steady, capture or CudaCapture())
    if steady is eager:
        return eager

    def predict(
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        pieces: Sequence[Piece],
        memory: Sequence[LayerMemory],
    ) -> Tensor:
        if full(memory):
            return steady(x, t, conditioning, pieces, memory)
        if not how.compile:
            return eager(x, t, conditioning, pieces, memory)
        # a window that still grows would compile anew for each of its sizes
        with torch.compiler.set_stance("force_eager"):
            return eager(x, t, conditioning, pieces, memory)

    return predict


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
    """The pass with compiled blocks; all blocks share one compilation, in parts about the cache."""
    import torch._dynamo.config as limits

    # several models of one process share the code of a block, and each needs an entry of its own
    limits.recompile_limit = max(limits.recompile_limit, 64)
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    opaque = _opaque()
    held: dict[int, tuple[Sequence[LayerMemory], list[Any]]] = {}

    def predict(
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        pieces: Sequence[Piece],
        memory: Sequence[LayerMemory],
    ) -> Tensor:
        if id(memory) not in held:
            held.clear()
            held[id(memory)] = memory, [opaque(view) for view in memory]
        return model(x, t, conditioning, pieces=pieces, memory=held[id(memory)][1])

    return predict


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
                lambda: self._predict(fixed.x, fixed.t, fixed.conditioning, fixed.pieces, memory)
            )
        replay, out = self._places[place]
        replay()
        return out.clone()


# fp8


class Fp8Linear(nn.Module):
    """x W^T + b in e4m3, a scale a token and a scale an output, summed in float32.

    Weights are rounded once, activations at each call by their largest magnitude.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        data, scale = quantize_rows(weight)
        self.register_buffer("weight", data)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """Project."""
        data, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        # row-wise scales ask for bf16 out on a GPU
        out = torch._scaled_mm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            data, cast(Tensor, self.weight).T, scale, cast(Tensor, self.scale),
            out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda,
        )  # fmt: skip
        out = out.to(x.dtype) if self.bias is None else out.to(x.dtype) + self.bias
        return out.unflatten(0, x.shape[:-1])


def quantize_rows(x: Float[Tensor, "M K"]) -> tuple[Tensor, Float[Tensor, "M one"]]:
    """Rows in e4m3, and the float32 scale [M, 1] that takes each back."""
    top = torch.finfo(FP8).max
    scale = (x.abs().amax(1, keepdim=True).float() / top).clamp_min(1e-12)
    return (x.float() / scale).clamp(-top, top).to(FP8), scale


def to_fp8(model: WanTransformer) -> list[str]:
    """Replace the projections of :data:`FP8_LAYERS` in every block, in place; their names.

    A projection whose sizes are no multiples of 16 stays, for the matrix units ask for those.
    """
    done: list[str] = []
    for name, module in list(model.blocks.named_modules()):
        if not isinstance(module, nn.Linear) or name.partition(".")[2] not in FP8_LAYERS:
            continue
        if module.in_features % 16 or module.out_features % 16:
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(model.blocks.get_submodule(owner), leaf, Fp8Linear(module))
        done.append(name)
    return done


def require_fp8(device: torch.device) -> None:
    """UserError where the device has no fp8 matrix units."""
    if device.type != "cuda":
        raise UserError("fp8 needs a GPU with fp8 matrix units (compute capability 8.9 or later), "
                        f"and this model is on {device.type}: leave out --fp8")  # fmt: skip
    found = torch.cuda.get_device_capability(device)
    if found < (8, 9):
        raise UserError(
            f"fp8 needs compute capability 8.9 or later, and {torch.cuda.get_device_name(device)} "
            f"has {found[0]}.{found[1]}: leave out --fp8"
        )
