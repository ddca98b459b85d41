"""Spectra of row stacks such as [K; V] in every gauge, from as few Gram matrices as will do.

m rows (outputs), n columns (inputs) of a projection. A gauge is a choice of scale that leaves the
model's function alone but moves the joint spectrum:

- ``raw``: the weights as stored;
- ``balanced``: every projection divided by its Frobenius norm;
- ``folded``: ``diag(g) W sqrt(m) / ||W||_F`` for projections behind an RMSNorm over channels, what
  that norm makes of unit-variance inputs; with a covariance C of the real inputs the measured RMS
  ``||W C^(1/2)||_F / sqrt(m)`` takes the place of ``||W||_F / sqrt(m)``. Where one norm serves
  each head, m and ||W||_F are those of the head.

``weighted-raw`` and so on are the same gauges of ``W C^(1/2)``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from mla_study.checkpoints.operators.find import Attention, Part
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError
from mla_study.probes.names import public_name
from mla_study.probes.spectrum import (
    combine_grams,
    gram,
    gram_singular_values,
    needs_svd,
    singular_values,
)

GAUGES = ("raw", "balanced", "folded")
STACKS = {"q": "q", "k": "k", "v": "v", "o": "o", "kv": "kv", "qkv": "qkv"}
(_dsyrk,) = scipy.linalg.get_blas_funcs(("syrk",), dtype=np.float64)
_READ_VALUES = (
    1 << 22
)  # values a read: one request for a 1536 x 1536 projection, five for 5120 x 5120
_LARGEST = 1e150  # whose squares still add up in float64
Task = tuple[str, str]  # operator, gauge


@dataclass
class Spectrum:
    """Singular values of one operator [m, n] in one gauge, descending, float64.

    ``head`` is -1 for operators of the whole block; ``inner`` is the latent rank where the operator
    is stored as factors; ``method`` is gram, svdvals or factors.
    """

    operator: str
    head: int
    gauge: str
    sigma: np.ndarray
    m: int
    n: int
    method: str
    inner: int | None = None

    @property
    def full_rank(self) -> int:
        """min(m, n): n of ``energy_at_n/8``."""
        return min(self.m, self.n)


class Weights:
    """The parts of one block, each read once, checked to be finite, and hashed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.name = public_name(checkpoint.spec.path)
        self.digests: dict[str, str] = {}
        self._held: dict[tuple[str, tuple[tuple[int, int], ...]], Callable[[], np.ndarray]] = {}
        self._whole: dict[str, np.ndarray] = {}

    def values(self, part: Part) -> np.ndarray:
        """The part [m, n], float32 or float64 as decoded; no byte of it is read twice.

        Raises:
            UserError: NaN, Inf, or values whose squares leave float64's range.
        """
        key = (part.tensor, part.rows)
        if key not in self._held:
            values = self._read(part)
            self._check(f"tensor {part.tensor!r}", values)
            self.record(part, values)
            self._held[key] = _compact(values)
        return self._held[key]()

    def record(self, part: Part, *values: np.ndarray) -> None:
        """Remember the sha256 of what was read for a part."""
        digest = hashlib.sha256()
        for array in values:
            digest.update(np.ascontiguousarray(array).data)
        self.digests[f"{part.tensor}{list(part.rows)}"] = digest.hexdigest()

    def _read(self, part: Part) -> np.ndarray:
        if part.transposed:
            if part.tensor not in self._whole:
                self._whole[part.tensor] = self.checkpoint.read(part.tensor)
            whole = self._whole[part.tensor].reshape(part.n, -1)
            return np.concatenate([whole[:, start:stop].T for start, stop in part.rows])
        step = max(1, _READ_VALUES // part.n)
        pieces = [
            (low, min(low + step, stop))
            for start, stop in part.rows
            for low in range(start, stop, step)
        ]
        out: np.ndarray | None = None
        at = 0
        for start, stop in pieces:
            rows = self.checkpoint.read(part.tensor, start, stop).reshape(stop - start, part.n)
            if len(pieces) == 1:
                return rows
            if out is None:
                out = np.empty((part.m, part.n), dtype=rows.dtype)
            out[at : at + len(rows)] = rows
            at += len(rows)
        assert out is not None
        return out

    def gain(self, name: str, rows: int) -> np.ndarray:
        """A norm's gain, float64 [rows]; one gain a head is repeated over the heads.

        Raises:
            UserError: NaN or Inf.
        """
        values = self.checkpoint.read(name).reshape(-1).astype(np.float64)
        self._check(f"norm gain {name!r}", values)
        self.digests[name] = hashlib.sha256(values.data).hexdigest()
        return np.tile(values, rows // len(values))

    def check_factors(self, part: Part, *values: np.ndarray) -> None:
        """The same checks for a part that is stored as factors."""
        for array in values:
            self._check(f"adapter of {part.tensor!r}", array)
        self.record(part, *values)

    def _check(self, what: str, values: np.ndarray) -> None:
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        if bad:
            found = f"{bad} of {values.size} values are NaN or Inf"
        elif values.dtype == np.float64 and values.size and np.abs(values).max() > _LARGEST:
            found = f"values exceed {_LARGEST:g}"
        else:
            return
        raise UserError(f"{self.name}: {what}: {found}: probe an undamaged checkpoint")


def _compact(values: np.ndarray) -> Callable[[], np.ndarray]:
    """Hold float32 values that came from 16 bits in 16 bits; the call gives them back exactly."""
    if values.dtype == np.float32 and values.size:
        for probe in (values[:1], values):
            bits = np.ascontiguousarray(probe).view(np.uint32)
            if (bits & 0xFFFF).any():
                break
        else:
            high = (bits >> 16).astype(np.uint16)
            return lambda: (high.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            for probe in (values[:1], values):
                half = probe.astype(np.float16)
                if not np.array_equal(half, probe):
                    break
            else:
                return lambda: half.astype(np.float32)
    return lambda: values


class Stacks:
    """Spectra of row stacks; one Gram a projection serves all stacks and gauges.

    Args:
        weights: reader of the block's parts.
        attention: the block.
        exact_tail: take every spectrum from ``svdvals``.
        root: [n, c] with root root^T = C, the covariance of the block's inputs; the spectra are
            then those of W C^(1/2), for the parts that :meth:`sees`.
        measured: stacks with a root, whose ||W C^(1/2)||_F the folded gauge takes.
    """

    def __init__(
        self,
        weights: Weights,
        attention: Attention,
        exact_tail: bool = False,
        root: np.ndarray | None = None,
        measured: Stacks | None = None,
    ) -> None:
        self.weights = weights
        self.attention = attention
        self.exact_tail = exact_tail
        self.root = root
        self.measured = measured
        self._gains: dict[str, np.ndarray] = {}
        self._squares: dict[str, np.ndarray] = {}
        self._products: dict[str, np.ndarray] = {}
        self._grams: dict[tuple[str, bool], np.ndarray] = {}
        self._uses: Counter[tuple[str, bool]] = Counter()

    def sees(self, role: str) -> bool:
        """Whether the root is that of this part's inputs: k and v's, and q's in self-attention."""
        if self.root is None or role not in self.attention.parts:
            return False
        same = role in ("k", "v") or (role == "q" and self.attention.kind == "self")
        return same and self.attention.parts[role].n == self.root.shape[0]

    def normed(self, role: str) -> bool:
        """Whether a norm over channels follows the projection."""
        return f"{role}_norm" in self.attention.norms and role in self.attention.parts

    def gauges(self, operator: str) -> list[str]:
        """The gauges that tell something about an operator."""
        roles = STACKS[operator]
        possible = ["raw"]
        if len(roles) > 1:
            possible.append("balanced")
        if any(self.normed(role) for role in roles):
            possible.append("folded")
        return possible

    def run(self, operators: Sequence[str], gauges: Sequence[str] = GAUGES) -> list[Spectrum]:
        """Spectra of the operators in those of the gauges that they have, in this order."""
        tasks = [(op, g) for op in operators for g in self.gauges(op) if g in gauges]
        tall = [task for task in tasks if self._m(task[0]) >= self._width(task[0])]
        done: dict[Task, Spectrum] = {}
        if not self.exact_tail:
            self._uses = Counter(key for task in tall for key in self._needs(task))
        # Grams die early in this order: no more than those of one joint operator and their sum
        for task in sorted(tall, key=self._phase):
            done[task] = self._tall(*task)
        self._grams.clear()
        for op in dict.fromkeys(op for op, g in tasks if (op, g) not in done):
            done.update({(op, s.gauge): s for s in self._wide(op, gauges)})
        return [self._named(done[task]) for task in tasks]

    def _named(self, spectrum: Spectrum) -> Spectrum:
        if self.root is None:
            return spectrum
        spectrum.gauge = f"weighted-{spectrum.gauge}"
        # directions without any input: C has a rank below n
        missing = spectrum.full_rank - len(spectrum.sigma)
        spectrum.sigma = np.pad(spectrum.sigma, (0, max(missing, 0)))
        return spectrum

    def _m(self, op: str) -> int:
        return sum(self.attention.parts[role].m for role in STACKS[op])

    def _n(self, op: str) -> int:
        return self.attention.parts[STACKS[op][0]].n

    def _width(self, op: str) -> int:
        return self._n(op) if self.root is None else self.root.shape[1]

    def _needs(self, task: Task) -> list[tuple[str, bool]]:
        op, gauge = task
        return [(role, gauge == "folded" and self.normed(role)) for role in STACKS[op]]

    def _phase(self, task: Task) -> int:
        op, gauge = task
        joint, normed = len(STACKS[op]) > 1, any(self.normed(role) for role in STACKS[op])
        if gauge == "folded":
            return 2 if joint else 3
        return 0 if joint else (1 if normed else 4)

    def _values(self, role: str) -> np.ndarray:
        values = self.weights.values(self.attention.parts[role])
        if self.root is None:
            return values
        if role not in self._products:
            self._products[role] = values.astype(np.float64) @ self.root
        return self._products[role]

    def row_squares(self, role: str) -> np.ndarray:
        """Squared 2-norms of a projection's rows, float64 [m]."""
        if role not in self._squares:
            values = self._values(role)
            self._squares[role] = np.einsum("ij,ij->i", values, values, dtype=np.float64)
        return self._squares[role]

    def folded_scale(self, role: str) -> np.ndarray:
        """Row scale g_i sqrt(size) / ||W_group||_F of the folded gauge, float64 [m].

        A group is the rows that one norm averages over, ``size`` many: all, or those of a head.
        """
        name = self.attention.norms[f"{role}_norm"]
        size = self.weights.checkpoint.tensors[name].shape[0]
        if role not in self._gains:
            self._gains[role] = self.weights.gain(name, self.attention.parts[role].m)
        source = self.measured if self.measured is not None and self.measured.sees(role) else self
        squares = source.row_squares(role).reshape(-1, size).sum(axis=1)
        factor = np.sqrt(size / np.where(squares > 0, squares, float(size)))
        return self._gains[role] * np.repeat(factor, size)

    def _scale(self, role: str, gauge: str) -> np.ndarray:
        m = self.attention.parts[role].m
        if gauge == "folded" and self.normed(role):
            return self.folded_scale(role)
        return np.full(m, self._balance(role) if gauge == "balanced" else 1.0)

    def _balance(self, role: str) -> float:
        total = float(self.row_squares(role).sum())
        return total**-0.5 if total > 0 else 1.0

    def _take(self, role: str, folded: bool) -> tuple[np.ndarray, bool]:
        """Column Gram of a projection, and whether this was its last use."""
        key = (role, folded)
        if key not in self._grams:
            values = self._values(role)
            scale = self.folded_scale(role) if folded else None
            self._grams[key] = gram([values], values.shape[1], scale)
        self._uses[key] -= 1
        last = self._uses[key] <= 0
        return (self._grams.pop(key) if last else self._grams[key]), last

    def _tall(self, op: str, gauge: str) -> Spectrum:
        """m >= n: the Gram of a stack is the sum of those of its parts."""
        if not self.exact_tail:
            total, weight, mine = np.empty(0), 1.0, False
            for index, (role, folded) in enumerate(self._needs((op, gauge))):
                part, last = self._take(role, folded)
                scale = self._balance(role) ** 2 if gauge == "balanced" else 1.0
                if index == 0:
                    total, weight, mine = part, scale, last
                elif mine and weight == scale == 1.0:
                    np.add(total, part, out=total)
                else:
                    total, weight, mine = combine_grams(total, part, weight, scale), 1.0, True
                del part
            if _in_range(total):
                sigma = gram_singular_values(total, min(self._m(op), self._width(op)), mine)
                if not needs_svd(sigma):
                    return self._spectrum(op, gauge, sigma, "gram")
            del total
        return self._by_svd(op, gauge)

    def _wide(self, op: str, gauges: Sequence[str]) -> list[Spectrum]:
        """m < n: one Gram of the rows, W W^T, scaled on both sides for each gauge."""
        square: np.ndarray | None = None
        if not self.exact_tail:
            stack = np.concatenate([self._values(r).astype(np.float64) for r in STACKS[op]])
            square = _dsyrk(1.0, stack.T, trans=1, lower=1)
            del stack
        found: list[Spectrum] = []
        for gauge in (g for g in self.gauges(op) if g in gauges):
            if square is not None:
                scale = np.concatenate([self._scale(role, gauge) for role in STACKS[op]])
                scaled = np.asfortranarray(square * scale[:, None] * scale)
                if _in_range(scaled):
                    sigma = gram_singular_values(scaled, self._m(op), overwrite=True)
                    if not needs_svd(sigma):
                        found.append(self._spectrum(op, gauge, sigma, "gram"))
                        continue
            found.append(self._by_svd(op, gauge))
        return found

    def _by_svd(self, op: str, gauge: str) -> Spectrum:
        roles = STACKS[op]
        if len(roles) > 1:  # a float64 copy of a whole stack: the Grams are made again after it
            self._grams.clear()
        scale = np.concatenate([self._scale(role, gauge) for role in roles])
        sigma, method = singular_values([self._values(r) for r in roles], scale, exact_tail=True)
        return self._spectrum(op, gauge, sigma, method)

    def _spectrum(self, op: str, gauge: str, sigma: np.ndarray, method: str) -> Spectrum:
        return Spectrum(op, -1, gauge, sigma, self._m(op), self._n(op), method)


def _in_range(square: np.ndarray) -> bool:
    """Whether squares kept their precision: a Gram that left float64's range says nothing of W."""
    return 1e-250 < float(square.diagonal().max()) < 1e250
