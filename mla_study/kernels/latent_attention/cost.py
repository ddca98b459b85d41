"""What each form of latent attention costs: FLOPs, bytes, and seconds on a calibrated device.

Counts are a layer's and a pass's, with FLOP = 2 multiply-adds, projections of tokens to queries and
of the mean to the output left out (they are the same in every form). Derivation: README.md beside
this file. Pure arithmetic: nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mla_study.errors import UserError

Form = Literal["reconstruct", "absorbed", "absorbed_triton"]
ITEM = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Shape:
    """One attention: M queries against K cached tokens; heads of d_head = d_nope + d_rope channels.

    ``passes`` reads of the same cache follow each other (a chunk's denoising and clean passes).
    """

    queries: int
    keys: int
    batch: int = 1
    heads: int = 12
    d_c: int = 192
    d_rope: int = 32
    d_head: int = 128
    dtype: str = "bf16"
    passes: int = 1

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "batch", "heads", "d_c", "d_head", "passes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if not 0 <= self.d_rope <= self.d_head or self.d_rope % 2:
            raise UserError(
                f"d_rope is {self.d_rope}, but it must be even and no more than a head's "
                f"{self.d_head} channels"
            )
        if self.dtype not in ITEM:
            raise UserError(f"there is no dtype '{self.dtype}': give one of {', '.join(ITEM)}")

    @property
    def d_nope(self) -> int:
        """Content channels of a head."""
        return self.d_head - self.d_rope

    @property
    def item(self) -> int:
        """Bytes of a scalar."""
        return ITEM[self.dtype]


@dataclass(frozen=True)
class Phase:
    """A step that is bound by arithmetic or by memory: ``kind`` says whose rate counts.

    ``rows`` are the query rows that share one read of a key: few of them cannot fill the arithmetic
    units.
    """

    kind: Literal["gemm", "attention"]
    flops: float
    bytes: float
    rows: int


@dataclass(frozen=True)
class Cost:
    """Phases in order, and what a form holds beside the cache, in bytes."""

    phases: tuple[Phase, ...]
    transient: float
    held: float = 0.0

    @property
    def flops(self) -> float:
        """Of all phases."""
        return sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> float:
        """Read and written by all phases."""
        return sum(phase.bytes for phase in self.phases)


def dense_cost(shape: Shape) -> Cost:
    """Attention with every head's keys and values at hand: 4 H M K d_h FLOPs."""
    s = shape
    flops = 4.0 * s.batch * s.heads * s.queries * s.keys * s.d_head
    read = 2.0 * s.batch * s.heads * s.keys * s.d_head * s.item
    return Cost((Phase("attention", flops, read, s.queries),), 0.0)


def reconstruct_cost(shape: Shape, keep_expanded: bool = False) -> Cost:
    """Expanding the latent, 2 K d_c H (d_n + d_v), then attention as dense.

    Args:
        keep_expanded: hold the expanded keys and values of the cached tokens over all passes: only
            the query tokens' own are made anew in each, at the price of a dense cache (``held``).
    """
    s = shape
    made = s.heads * (s.d_nope + s.d_head)
    fresh = s.keys
    if keep_expanded:
        # a pass's share: all keys once, then the queries' own
        fresh = (s.keys + (s.passes - 1) * min(s.queries, s.keys)) / s.passes
    flops = 2.0 * s.batch * fresh * s.d_c * made
    moved = s.batch * fresh * (s.d_c + s.d_rope + made + s.heads * s.d_rope) * s.item
    expanded = s.batch * s.keys * s.heads * (2.0 * s.d_head) * s.item
    phases = (Phase("gemm", flops, moved, s.keys), *dense_cost(s).phases)
    return Cost(phases, 0.0 if keep_expanded else expanded, expanded if keep_expanded else 0.0)


def absorbed_cost(shape: Shape, value_is_key: bool = False) -> Cost:
    """2 H M K (2 d_c + d_r) of wide attention, and 2 M H d_c (d_n + d_v) around it.

    Args:
        value_is_key: [c | k_rope] is also the value, d_r channels too wide, which SDPA's fast
            kernels ask for.
    """
    s = shape
    wide = s.d_c + s.d_rope
    channels = 2.0 * wide if value_is_key else 2.0 * s.d_c + s.d_rope
    rows = s.queries * s.heads
    up = 2.0 * s.batch * rows * s.d_c * (s.d_nope + s.d_head)
    around = s.batch * rows * (s.d_nope + s.d_head + 2.0 * wide) * s.item
    attend = 2.0 * s.batch * rows * s.keys * channels
    read = s.batch * s.keys * wide * s.item
    return Cost(
        (Phase("gemm", up, around, rows), Phase("attention", attend, read, rows)),
        s.batch * rows * wide * s.item,
    )


def crossover(
    d_c: int, d_rope: int, d_head: int, value_is_key: bool = False, keys: int | None = None
) -> float:
    """Queries below which absorbed has fewer FLOPs than reconstruct; inf: always.

    With S = d_n + d_v and w = 2 d_c + d_r - 2 d_h it is K d_c S / (K w + d_c S), which for many
    keys is M* = d_c (d_n + d_v) / (2 d_c - d_n - d_v).

    Args:
        value_is_key: count the d_r channels that SDPA computes for nothing.
        keys: K; None: many.
    """
    both = d_c * (2 * d_head - d_rope)
    wider = 2 * d_c + (2 if value_is_key else 1) * d_rope - 2 * d_head
    below = wider if keys is None else wider + both / keys
    return both / below if below > 0 else float("inf")


@dataclass(frozen=True)
class Rates:
    """One form's part of a calibration.

    Attributes:
        attention: FLOP/s of the attention proper at full rate.
        rows_half: query rows at which it reaches half of that.
        overhead: seconds of a call that does next to nothing.
    """

    attention: float
    rows_half: float = 0.0
    overhead: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """Rates of one device and dtype, fitted to measured times (``mla-study calibrate``).

    Attributes:
        device: as :func:`~mla_study.kernels.latent_attention.calibrations.device_key` names it;
            ``derived`` means FLOPs alone.
        gemm: FLOP/s of projections. bandwidth: bytes/s.
        reconstruct, absorbed, absorbed_triton: rates of the forms; None where not measured.
        residual: root mean square of log(model / measured) over the ``points`` fitted times.
        value_is_key: SDPA computes the absorbed form there, see :func:`absorbed_cost`.
    """

    device: str
    dtype: str
    threads: int
    gemm: float
    bandwidth: float
    reconstruct: Rates
    absorbed: Rates
    absorbed_triton: Rates | None = None
    residual: float = 0.0
    points: int = 0
    value_is_key: bool = False

    def __post_init__(self) -> None:
        if not (self.gemm > 0 and self.bandwidth > 0 and self.threads >= 0):
            raise UserError(
                f"rates of {self.device}, {self.dtype}: gemm and bandwidth must be above 0"
            )

    def seconds(self, cost: Cost, form: Form) -> float:
        """Roofline of each phase, and the call's overhead; inf for a form without rates."""
        rates: Rates | None = getattr(self, form)
        if rates is None:
            return float("inf")
        total = rates.overhead
        for phase in cost.phases:
            rate = self.gemm
            if phase.kind == "attention":
                rate = rates.attention * phase.rows / (phase.rows + rates.rows_half)
            total += max(phase.flops / rate, phase.bytes / self.bandwidth)
        return total


_EVEN = Rates(1.0)
DERIVED = Calibration("derived", "any", 0, 1.0, float("inf"), _EVEN, _EVEN, _EVEN)
"""FLOPs alone: what decides where nothing was measured."""


def costs(
    shape: Shape, keep_expanded: bool = False, value_is_key: bool = False
) -> dict[Form, Cost]:
    """The cost of each form that computes the function exactly."""
    return {
        "reconstruct": reconstruct_cost(shape, keep_expanded),
        "absorbed": absorbed_cost(shape, value_is_key),
        "absorbed_triton": absorbed_cost(shape),
    }
