"""One self-attention layer of a rollout's step: latent against dense at the same window.

A step projects M new tokens, writes them to the ring, and attends to all K keys of the window, the
M among them. Dense is measured twice: with unrotated keys cached, as window-relative positions
need, and with rotated keys cached, as absolute positions allow; a ratio below 1 against the second
is a gain over the best dense layer there is. Random weights: speed does not depend on values.

Example::

    mla-study bench attention --shapes 1560x15600 --width quarter --no-write
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import pandas as pd
import torch
from torch import Tensor

from mla_study.config import LatentConfig, ModelConfig, wan_1_3b
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.ceilings import Ceilings, ceilings
from mla_study.evaluation.goals import Goal, Row
from mla_study.evaluation.timing import Spread, Times, clock_of, interleaved
from mla_study.kernels.latent_attention.cost import (
    Cost,
    Shape,
    absorbed_cost,
    dense_cost,
    reconstruct_cost,
)
from mla_study.model.attention import (
    DenseSelfAttention,
    Entry,
    LatentSelfAttention,
    Piece,
    SelfAttention,
)
from mla_study.model.rope import RotaryEmbedding, Rotation
from mla_study.model.storage import DTYPES, NAMES

Width = Literal["full", "quarter"]
DENSE, DENSE_ROTATED = "dense, unrotated keys", "dense, rotated keys"
BASES = (DENSE_ROTATED, DENSE)
ROWS, COLUMNS = 30, 52  # tokens of a frame at 480x832
BUDGET = 40.0  # seconds of turns at a shape; three turns are made in any case
TOLERANCE = {"fp32": 2e-5, "fp16": 4e-3, "bf16": 4e-2}  # of a whole layer, against float64


def layer_config(width: Width, latent: bool) -> ModelConfig:
    """One layer of Wan 1.3B, or of a quarter of its width with three of its heads; d_c = d / 8."""
    config = replace(wan_1_3b(), name=f"{width} width", layers=1)
    if width == "quarter":
        config = replace(config, width=384, heads=3, ffn_width=2240)
    if not latent:
        return config
    return replace(config, latent=LatentConfig(d_c=config.width // 8, d_q=config.width // 2))


@dataclass
class Ring:
    """Entries of K tokens of which a step writes the last M, in place."""

    entry: Entry
    queries: int

    def extend(self, entry: Entry) -> Entry:
        """Write the step's tokens; all K."""
        for held, made in zip(self.entry, entry, strict=True):
            held[:, -self.queries :] = made
        return self.entry


class _Unturned(Rotation):
    """Keys that were rotated before they were cached."""

    def apply(self, x: Tensor) -> Tensor:
        return x


class _RotatedKeys(DenseSelfAttention):
    """Dense attention that caches keys after rotation, as absolute positions allow."""

    turn: Rotation

    def entry(self, x: Tensor) -> Entry:
        key, value = super().entry(x)
        return self.turn.apply(key), value


@dataclass(frozen=True)
class Step:
    """A layer and what it needs for one step over x [1, M, d]."""

    layer: SelfAttention
    pieces: tuple[Piece, ...]
    inputs: tuple[Tensor, ...]
    rings: tuple[Ring, ...]

    def call(self) -> Callable[[], Tensor]:
        """Steps whose inputs and rings take turns, so that none stays in the processor's cache."""
        turn = 0

        def run() -> Tensor:
            nonlocal turn
            turn += 1
            ring = self.rings[turn % len(self.rings)]
            return self.layer(self.inputs[turn % len(self.inputs)], self.pieces, ring)

        return run


def _latent_layer(config: ModelConfig, latent: LatentConfig, form: str) -> LatentSelfAttention:
    layer = LatentSelfAttention(config, latent)
    layer.form = form
    return layer


def make_step(
    variant: str, width: Width, queries: int, keys: int, device: torch.device, dtype: torch.dtype,
    turns: int = 2,
) -> Step:  # fmt: skip
    """A step of a variant: one of :data:`BASES`, or a form of latent attention (or ``auto``)."""
    latent = variant not in BASES
    config = layer_config(width, latent)
    torch.manual_seed(0)
    if config.latent is not None:
        layer: SelfAttention = _latent_layer(config, config.latent, variant)
        sizes = ((config.latent.d_c,), (config.latent.d_rope,))
        kept = config.latent.rope_pairs
    else:
        head = (config.heads, config.head_dim)
        layer = _RotatedKeys(config) if variant == DENSE_ROTATED else DenseSelfAttention(config)
        sizes, kept = (head, head), None
    layer = layer.to(device, dtype).eval()
    frames = torch.arange(-(-keys // (ROWS * COLUMNS)), device=device)
    table = RotaryEmbedding(config.head_dim, kept=kept).table(frames, ROWS, COLUMNS)
    all_keys, mine = Rotation(table.cis[:keys]), Rotation(table.cis[keys - queries : keys])
    if isinstance(layer, _RotatedKeys):
        layer.turn = mine
        all_keys = _Unturned(all_keys.cis)
    make = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make).to(device, dtype)

    first, second = sizes
    return Step(
        layer,
        (Piece(None, None, mine, all_keys),),
        tuple(normal(1, queries, config.width) for _ in range(turns)),
        tuple(
            Ring((normal(1, keys, *first), normal(1, keys, *second)), queries) for _ in range(turns)
        ),
    )


@torch.no_grad()
def check(variant: str, width: Width, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a variant gets no number: its error against the equations in float64; None if right.

    On 33 queries and 257 keys, with the same rounded weights, inputs and entries.
    """
    step = make_step(variant, width, 33, 257, device, dtype, 1)
    oracle = DENSE if variant in BASES else "reference"
    exact = make_step(oracle, width, 33, 257, device, torch.float64, 1)
    exact.layer.load_state_dict(step.layer.state_dict())
    first, second = (part.double() for part in step.rings[0].entry)
    rotation = exact.pieces[0].key_rotation
    if variant == DENSE_ROTATED:  # entries of the two layouts that mean the same
        step.rings[0].entry[0].copy_(rotation.apply(first))
    ring = Ring((first.clone(), second.clone()), 33)
    truth = exact.layer(step.inputs[0].double(), exact.pieces, ring)
    mine = step.layer(step.inputs[0], step.pieces, step.rings[0]).double()
    error = float((mine - truth).norm() / truth.norm())
    most = TOLERANCE[NAMES[dtype]]
    return None if error < most else f"error {error:.2g} exceeds {most:g}"


def variants_on(device: torch.device) -> tuple[str, ...]:
    """Both dense layers, and every form that the device may have."""
    fused = ("absorbed_triton",) if device.type == "cuda" else ()
    return (*BASES, "reconstruct", "absorbed", *fused, "auto")


@dataclass(frozen=True)
class Compared:
    """The variants of one shape: their times, and what of each is counted."""

    width: Width
    queries: int
    keys: int
    dtype: str
    device: torch.device
    times: Times
    wrong: dict[str, str]

    def rows(self, limits: Ceilings) -> list[dict[str, Any]]:
        """A row a variant: seconds, ratios to both dense layers, FLOPs, share of the ceiling."""
        made: list[dict[str, Any]] = []
        kind = {"width": self.width, "queries": self.queries, "keys": self.keys}
        for name in variants_on(self.device):
            row: dict[str, Any] = {**kind, "dtype": self.dtype, "variant": name}
            row["form"] = self.form(name)
            if name in self.wrong or name in self.times.errors:
                row["problem"] = self.wrong.get(name) or self.times.errors[name]
                made.append(row)
                continue
            row["problem"] = ""
            row |= _spread("seconds", self.times.spread(name))
            for column, base in (("to_dense", DENSE), ("to_dense_rotated", DENSE_ROTATED)):
                if base in self.times.seconds:
                    row |= _spread(column, self.times.ratio(name, base))
            cost, dense = self.cost(name), self.cost(DENSE)
            flops = cost.flops + self.projections(name)
            row["flops"] = flops
            row["tflops_per_s"] = flops / row["seconds"] / 1e12
            row["of_matmul_ceiling"] = flops / row["seconds"] / limits.matmul.median
            bound = self.bound(cost, self.projections(name), limits)
            row["bound_seconds"] = bound
            row["bound_to_dense"] = bound / self.bound(dense, self.projections(DENSE), limits)
            made.append(row)
        return made

    def form(self, variant: str) -> str:
        """The form of latent attention that runs."""
        if variant != "auto":
            return "" if variant in BASES else variant
        dtype = DTYPES[self.dtype]
        layer = make_step("auto", self.width, 1, 1, self.device, dtype, 1).layer
        size = (1, self.queries, self.shape.heads, self.shape.d_nope)
        query = torch.empty(size, device=self.device, dtype=dtype)
        return cast(LatentSelfAttention, layer).form_for(query, self.keys)

    @property
    def shape(self) -> Shape:
        """Of the latent layer."""
        config = layer_config(self.width, True)
        assert config.latent is not None
        return Shape(
            self.queries, self.keys, 1, config.heads, config.latent.d_c, config.latent.d_rope,
            config.head_dim, self.dtype,
        )  # fmt: skip

    def cost(self, variant: str) -> Cost:
        """Attention without the projections of new tokens."""
        if variant in BASES:
            return dense_cost(self.shape)
        rebuilt = self.form(variant) == "reconstruct"
        return (reconstruct_cost if rebuilt else absorbed_cost)(self.shape)

    def projections(self, variant: str) -> float:
        """FLOPs of the new tokens' projections, output included."""
        config = layer_config(self.width, variant not in BASES)
        d, latent = config.width, config.latent
        if latent is None:
            return 2.0 * self.queries * 4 * d * d
        heads = config.heads * config.head_dim
        down = d * (latent.d_c + latent.d_rope + latent.d_q)
        return 2.0 * self.queries * (down + latent.d_q * heads + d * d)

    @staticmethod
    def bound(cost: Cost, more: float, limits: Ceilings) -> float:
        """max(FLOPs at the measured ceilings, bytes at the copy's rate), summed over the phases."""
        seconds = more / limits.matmul.median
        for phase in cost.phases:
            rate = limits.sdpa if phase.kind == "attention" else limits.matmul
            seconds += max(phase.flops / rate.median, phase.bytes / limits.copy.median)
        return seconds


def _spread(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


@torch.no_grad()
def compare(
    width: Width,
    queries: int,
    keys: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 7,
) -> Compared:
    """Interleaved steps of both dense layers and of every latent form at one shape.

    Raises:
        UserError: more queries than keys.
    """
    if queries > keys:
        raise UserError(
            f"{queries} queries and {keys} keys: the queries are among the keys, so there must be "
            "at least as many of these"
        )
    variants = variants_on(device)
    wrong = {v: why for v in variants if (why := check(v, width, device, dtype)) is not None}
    calls = {
        variant: make_step(variant, width, queries, keys, device, dtype).call()
        for variant in variants
        if variant not in wrong
    }
    clock = clock_of(device)
    turn = sum(spent for (spent,) in interleaved(calls, 1, 0, clock).seconds.values())
    repeats = max(min(repeats, 3), min(repeats, int(BUDGET / max(turn, 1e-9))))
    times = interleaved(calls, repeats, 0, clock)
    return Compared(width, queries, keys, NAMES[dtype], device, times, wrong)


def bench_attention(
    shapes: Sequence[tuple[int, int]],
    widths: Sequence[Width],
    dtypes: Sequence[str],
    device: torch.device,
    repeats: int,
    on_rows: Callable[[Sequence[Row]], object],
) -> tuple[list[Row], pd.DataFrame]:
    """All combinations; goals as rows, told as they come, and one tidy table."""
    rows: list[Row] = []
    table: list[dict[str, Any]] = []
    for dtype in dtypes:
        limits = ceilings(device, DTYPES[dtype])
        top = [
            Row.of("ceiling, matrix product", limits.matmul.scaled(1e-12), "TF/s", dtype),
            Row.of("ceiling, SDPA", limits.sdpa.scaled(1e-12), "TF/s", dtype),
            Row.of("ceiling, copy", limits.copy.scaled(1e-9), "GB/s", dtype),
        ]
        on_rows(top)
        rows += top
        for width in widths:
            for queries, keys in shapes:
                found = compare(width, queries, keys, device, DTYPES[dtype], repeats)
                made = goal_rows(found)
                on_rows(made)
                rows += made
                table += found.rows(limits)
    return rows, pd.DataFrame(table)


def goal_rows(found: Compared) -> list[Row]:
    """The ratios that have goals, and those shown beside them."""
    setting = f"{found.width} width, M {found.queries}, K {found.keys}, {found.dtype}"
    few, many = found.queries <= 16, found.queries >= 1560
    noise = found.times.noise
    pace = Goal("<=", 1.0) if many else None
    one = Goal("<", 0.7) if found.queries == 1 else None
    asked = (
        (f"layer, auto ({found.form('auto')}) / dense", "auto", DENSE, pace),
        ("layer, auto / dense of rotated keys", "auto", DENSE_ROTATED, None),
        ("layer, absorbed / dense", "absorbed", DENSE, one),
        ("layer, absorbed / dense of rotated keys", "absorbed", DENSE_ROTATED, one),
        (
            "layer, absorbed / reconstruct",
            "absorbed",
            "reconstruct",
            Goal("<", 0.3) if few else None,
        ),
    )
    rows = [
        Row.of(name, found.times.ratio(a, b), "ratio", setting, goal)
        for name, a, b, goal in asked
        if {a, b} <= set(found.times.seconds)
    ]
    rows.append(Row.of("noise, dense / itself", noise, "ratio", setting))
    problems = {**found.wrong, **found.times.errors}
    for variant, why in problems.items():
        rows.append(Row(f"layer, {variant}: {why}", float("nan"), "", setting))
    return rows
