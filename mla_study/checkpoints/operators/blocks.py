"""What an attention block is: which rows of which stored tensor are its K, and its heads.

Shapes: a weight is [m, n], m outputs (rows), n inputs (columns). Fused projections are row ranges
of one tensor; the latent attention of MLA is a pair of factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["self", "cross"]
Layout = Literal["separate", "fused qkv", "fused kv", "latent"]


@dataclass(frozen=True)
class Part:
    """A projection: row ranges of a stored tensor, seen as [m, n]; transposed if stored [n, m]."""

    tensor: str
    rows: tuple[tuple[int, int], ...]
    n: int
    transposed: bool = False

    @property
    def m(self) -> int:
        """Rows."""
        return sum(stop - start for start, stop in self.rows)

    def sub(self, start: int, stop: int) -> Part:
        """Rows [start, stop) of this part."""
        picked: list[tuple[int, int]] = []
        for low, high in self.rows:
            size = high - low
            a, b = max(start, 0), min(stop, size)
            if a < b:
                picked.append((low + a, low + b))
            start, stop = start - size, stop - size
        return Part(self.tensor, tuple(picked), self.n, self.transposed)

    def take(self, ranges: tuple[tuple[int, int], ...]) -> Part:
        """Several row ranges of this part, in this order."""
        rows = tuple(row for start, stop in ranges for row in self.sub(start, stop).rows)
        return Part(self.tensor, rows, self.n, self.transposed)


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and channels a head."""

    q: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Attention:
    """One attention block: its parts by role (q k v o, or the factors of latent attention)."""

    block: str
    layer: int
    kind: Kind
    layout: Layout
    parts: Mapping[str, Part]
    norms: Mapping[str, str]
    heads: Heads | None = None
    remarks: tuple[str, ...] = ()

    @property
    def latent(self) -> bool:
        """Whether keys and values come from a shared latent (MLA)."""
        return self.layout == "latent"


@dataclass
class Found:
    """All operators of a checkpoint, what was left out and why, and what a config misses.

    ``missing_layers`` holds the numbers of blocks that should be there, or their paths where a
    number alone would not tell which one (encoder and decoder in one file).
    """

    attentions: list[Attention] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # tensor -> reason
    expected_layers: int | None = None
    missing_layers: list[int | str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Block:
    """Tensors that share a block's path, by role, before they are understood."""

    path: str
    weights: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    cross: bool = False
    remarks: list[str] = field(default_factory=list)
