"""Spectra of one attention block, in every gauge, from as few Gram matrices as will do.

A gauge is a choice of scale that leaves the model's function alone but moves the joint spectrum:

- ``raw``: the weights as stored;
- ``balanced``: every projection divided by its Frobenius norm;
- ``folded``: ``diag(g) W sqrt(m) / ||W||_F`` for projections behind an RMSNorm over channels, what
  that norm makes of unit-variance inputs; with a covariance C of the real inputs the measured RMS
  ``||W C^(1/2)||_F / sqrt(m)`` takes the place of ``||W||_F / sqrt(m)``.

``weighted-raw`` and so on are the same gauges of ``W C^(1/2)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import blas

from mla_study.checkpoints.operators import Attention, Part
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError
from mla_study.probes.spectrum import (
    combine_grams,
    factored_singular_values,
    gram,
    gram_singular_values,
    needs_svd,
    singular_values,
)

OPERATORS = ("q", "k", "v", "o", "kv", "qkv", "qk", "ov", "composed")
DEFAULT_OPERATORS = ("kv", "k", "v", "composed")
GAUGES = ("raw", "balanced", "folded")
STACKS = {"q": "q", "k": "k", "v": "v", "o": "o", "kv": "kv", "qkv": "qkv"}
_PANEL = 512


@dataclass(frozen=True)
class Request:
    """What to measure on each block; ``subspace`` asks for the row space too (see ``subspace_of``):
    of that dimension, or of the natural one where it is -1."""

    operators: tuple[str, ...] = DEFAULT_OPERATORS
    gauges: tuple[str, ...] = GAUGES
    exact_tail: bool = False
    subspace: int = 0


@dataclass
class Spectrum:
    """Singular values of one operator in one gauge: [m, n] of rank at most ``rank``."""

    operator: str
    head: int
    gauge: str
    sigma: np.ndarray
    m: int
    n: int
    method: str
    inner: int | None = None  # latent rank where the operator is stored as factors


@dataclass
class Weights:
    """Reads the parts of one block, checks that they are finite, and remembers what was read."""

    checkpoint: Checkpoint
    digests: dict[str, str] = field(default_factory=dict)

    def panels(self, part: Part) -> Iterator[np.ndarray]:
        """Row panels [rows, n] of a part, float32 or float64, hashed on the way."""
        digest = hashlib.sha256()
        for panel in self._panels(part):
            digest.update(np.ascontiguousarray(panel).data)
            yield panel
        self.digests[f"{part.tensor}{list(part.rows)}"] = digest.hexdigest()

    def _panels(self, part: Part) -> Iterator[np.ndarray]:
        if part.transposed:
            whole = self.checkpoint.read(part.tensor)
            for start, stop in part.rows:
                yield np.ascontiguousarray(whole.reshape(part.n, -1)[:, start:stop].T)
            return
        for start, stop in part.rows:
            for low in range(start, stop, _PANEL):
                rows = self.checkpoint.read(part.tensor, low, min(low + _PANEL, stop))
                yield rows.reshape(rows.shape[0], -1)

    def dense(self, part: Part) -> np.ndarray:
        """The whole part [m, n] in float64, finite."""
        out = np.empty((part.m, part.n))
        low = 0
        for panel in self.panels(part):
            out[low : low + len(panel)] = panel
            low += len(panel)
        if not np.isfinite(out).all():
            self.refuse(part)
        return out

    def gain(self, name: str, rows: int) -> np.ndarray:
        """A norm's gain [rows]; one gain a head is repeated over the heads."""
        values = self.checkpoint.read(name).reshape(-1).astype(np.float64)
        self.digests[name] = hashlib.sha256(values.data).hexdigest()
        if not np.isfinite(values).all():
            raise UserError(f"{self.checkpoint.spec.path}: norm gain {name!r} holds NaN or Inf")
        return np.tile(values, rows // len(values))

    def refuse(self, part: Part) -> None:
        """Name what is wrong with a tensor whose Gram is not finite."""
        values = self.checkpoint.read(part.tensor)
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        what = f"{bad} of {values.size} values are NaN or Inf" if bad else "values exceed 1e150"
        raise UserError(
            f"{self.checkpoint.spec.path}: tensor {part.tensor!r}: {what}: "
            "probe an undamaged checkpoint"
        )


def measure_attention(
    checkpoint: Checkpoint,
    attention: Attention,
    request: Request,
    cov_sqrt: np.ndarray | None = None,
) -> tuple[list[Spectrum], dict[str, str]]:
    """Spectra of all requested operators of a block, and sha256 of the values that were read.

    Args:
        checkpoint: where the block's tensors lie.
        attention: the block.
        request: operators, gauges, and whether the tail is wanted from ``svdvals``.
        cov_sqrt: C^(1/2) [n, n] of the block's inputs, adds the weighted gauges.

    Raises:
        UserError: NaN or Inf in a tensor (named).
    """
    weights = Weights(checkpoint)
    found: list[Spectrum] = []
    if attention.latent:
        if "composed" in request.operators:
            found += _composed(weights, attention, cov_sqrt)
        return found, weights.digests
    stacks = [
        op
        for op in request.operators
        if op in STACKS and set(STACKS[op]) <= set(attention.parts) and _same_input(attention, op)
    ]
    if any(checkpoint.factors(p.tensor) is not None for p in attention.parts.values()):
        for op in stacks:
            found += _adapter(weights, attention, op)
        return found, weights.digests
    plain = _Stacks(weights, attention, request)
    if cov_sqrt is not None:
        weighted = _Stacks(weights, attention, request, cov_sqrt)
        found += weighted.run([op for op in stacks if op != "o"])
        plain.squares = weighted.squares  # the measured RMS is what the norm divides by
    found = plain.run(stacks) + found
    for op in ("qk", "ov"):
        if op in request.operators:
            found += _per_head(weights, attention, op)
    return found, weights.digests


def _same_input(attention: Attention, operator: str) -> bool:
    parts = [attention.parts[role] for role in STACKS[operator]]
    return len({p.n for p in parts}) == 1 and not (operator == "qkv" and attention.kind == "cross")


class _Stacks:
    """Row stacks such as [K; V]: one Gram a projection serves all stacks and gauges."""

    def __init__(
        self,
        weights: Weights,
        attention: Attention,
        request: Request,
        cov_sqrt: np.ndarray | None = None,
    ) -> None:
        self.weights = weights
        self.attention = attention
        self.request = request
        self.cov_sqrt = cov_sqrt
        self.prefix = "" if cov_sqrt is None else "weighted-"
        self.gains: dict[str, np.ndarray] = {}
        for role in ("q", "k"):
            norm = attention.norms.get(f"{role}_norm")
            if norm is not None and role in attention.parts and "folded" in request.gauges:
                self.gains[role] = weights.gain(norm, attention.parts[role].m)
        self.dense: dict[str, np.ndarray] = {}
        self.grams: dict[tuple[str, bool], np.ndarray] = {}
        self.squares: dict[str, np.ndarray] = {}  # per role: squared norms of the norm's groups

    def run(self, stacks: Sequence[str]) -> list[Spectrum]:
        if self.cov_sqrt is not None:
            size = self.cov_sqrt.shape[0]
            stacks = [op for op in stacks if self._n(op) == size]
        wide = [op for op in stacks if self._m(op) < self._n(op)]
        tall = [op for op in stacks if op not in wide]
        found: list[Spectrum] = []
        for op in tall:
            found += [self._tall(op, gauge) for gauge in self._gauges(op)]
        self.grams.clear()
        for op in wide:
            found += [self._wide(op, gauge) for gauge in self._gauges(op)]
        return found

    def _m(self, op: str) -> int:
        return sum(self.attention.parts[role].m for role in STACKS[op])

    def _n(self, op: str) -> int:
        return self.attention.parts[STACKS[op][0]].n

    def _gauges(self, op: str) -> list[str]:
        roles = STACKS[op]
        possible = ["raw"]
        if len(roles) > 1:
            possible.append("balanced")
        if any(role in self.gains for role in roles):
            possible.append("folded")
        return [g for g in possible if g in self.request.gauges]

    def _blocks(self, role: str) -> Iterator[np.ndarray]:
        part = self.attention.parts[role]
        if self.cov_sqrt is None:
            yield from self.weights.panels(part)
        else:
            yield self._dense(role)

    def _dense(self, role: str) -> np.ndarray:
        if role not in self.dense:
            values = self.weights.dense(self.attention.parts[role])
            self.dense[role] = values if self.cov_sqrt is None else values @ self.cov_sqrt
        return self.dense[role]

    def _gram(self, role: str, gained: bool) -> np.ndarray:
        """Column Gram of a role, with the norm's gain and RMS folded in where asked."""
        if (role, gained) not in self.grams:
            part = self.attention.parts[role]
            blocks: Sequence[np.ndarray] | Iterator[np.ndarray] = self._blocks(role)
            if role in self.gains:  # read once, used for both Grams
                blocks = list(blocks)
                self._measure_groups(role, blocks)
                self.grams[role, True] = gram(blocks, part.n, self._folded_scale(role))
            self.grams[role, False] = gram(blocks, part.n)
            if not np.isfinite(self.grams[role, False].diagonal()).all():
                self.weights.refuse(part)
        return self.grams[role, gained]

    def _measure_groups(self, role: str, blocks: Sequence[np.ndarray]) -> None:
        """Squared Frobenius norm of the rows that one norm averages over, for each such group."""
        if role not in self.squares:
            part = self.attention.parts[role]
            size = self.weights.checkpoint.tensors[self.attention.norms[f"{role}_norm"]].shape[0]
            rows = [np.einsum("ij,ij->i", p, p, dtype=np.float64) for p in blocks]
            self.squares[role] = np.concatenate(rows).reshape(part.m // size, size).sum(axis=1)

    def _folded_scale(self, role: str) -> np.ndarray:
        """Row scale g_i sqrt(size) / ||W_group||_F of the folded gauge."""
        if role not in self.squares:
            self._measure_groups(role, [self._dense(role)])
        squares = self.squares[role]
        size = len(self.gains[role]) // len(squares)
        factor = np.sqrt(size / np.where(squares > 0, squares, 1.0))
        return self.gains[role] * np.repeat(factor, size)

    def _scale(self, role: str, gauge: str, norm: float) -> np.ndarray | float:
        if gauge == "balanced":
            return 1.0 / norm if norm > 0 else 1.0
        if gauge == "folded" and role in self.gains:
            return self._folded_scale(role)
        return 1.0

    def _tall(self, op: str, gauge: str) -> Spectrum:
        total: np.ndarray | None = None
        weight = 1.0
        for role in STACKS[op]:
            part = self._gram(role, gauge == "folded" and role in self.gains)
            trace = float(part.trace())
            scale = 1.0 / trace if gauge == "balanced" and trace > 0 else 1.0
            if total is None:
                total, weight = part, scale
            else:
                total, weight = combine_grams(total, part, weight, scale), 1.0
        assert total is not None
        own = any(total is kept for kept in self.grams.values())
        if own and weight != 1.0:
            total, own = total * weight, False
        m, n = self._m(op), self._n(op)
        # a Gram whose squares left float64's range says nothing about W itself
        peak = float(total.diagonal().max())
        usable = not self.request.exact_tail and 1e-250 < peak < 1e250
        if usable:
            sigma = gram_singular_values(total, min(m, n), overwrite=not own)
            if not needs_svd(sigma):
                return self._spectrum(op, gauge, sigma, "gram")
        del total
        return self._by_svd(op, gauge)

    def _wide(self, op: str, gauge: str) -> Spectrum:
        """m < n: one Gram of the rows, W W^T, scaled on both sides."""
        roles = STACKS[op]
        key = (op, False)
        if key not in self.grams:
            stack = np.concatenate([self._dense(role) for role in roles])
            made = blas.dsyrk(1.0, stack.T, trans=1, lower=1)
            self.grams[key] = made
        square = self.grams[key]
        scale = self._row_scale(op, gauge)
        if not self.request.exact_tail:
            scaled = square * scale[:, None] * scale[None, :]
            peak = float(scaled.diagonal().max())
            if 1e-250 < peak < 1e250:
                sigma = gram_singular_values(np.asfortranarray(scaled), self._m(op), overwrite=True)
                if not needs_svd(sigma):
                    return self._spectrum(op, gauge, sigma, "gram")
        return self._by_svd(op, gauge)

    def _row_scale(self, op: str, gauge: str) -> np.ndarray:
        pieces: list[np.ndarray] = []
        for role in STACKS[op]:
            m = self.attention.parts[role].m
            norm = float(np.linalg.norm(self._dense(role))) if gauge == "balanced" else 1.0
            pieces.append(np.broadcast_to(self._scale(role, gauge, norm), (m,)))
        return np.concatenate(pieces)

    def _by_svd(self, op: str, gauge: str) -> Spectrum:
        blocks = [self._dense(role) for role in STACKS[op]]
        sigma, method = singular_values(blocks, self._row_scale(op, gauge), exact_tail=True)
        if self.cov_sqrt is None and self._m(op) >= self._n(op):
            self.dense.clear()
        return self._spectrum(op, gauge, sigma, method)

    def _spectrum(self, op: str, gauge: str, sigma: np.ndarray, method: str) -> Spectrum:
        return Spectrum(op, -1, self.prefix + gauge, sigma, self._m(op), self._n(op), method)


def _latent_factors(weights: Weights, attention: Attention) -> tuple[np.ndarray, np.ndarray]:
    parts = attention.parts
    down = weights.dense(parts["kv_down"])
    ups = [weights.dense(parts[role]) for role in ("kv_up", "k_up", "v_up") if role in parts]
    up = np.concatenate(ups)
    if "kv_norm" in attention.norms:
        up = up * weights.gain(attention.norms["kv_norm"], up.shape[1])
    return up, down


def subspace_rank(attention: Attention) -> int:
    """Dimension of the row space that is compared: d_c of a latent block, min(m, n) / 8 of a dense."""
    parts = attention.parts
    if attention.latent:
        return min(parts["kv_down"].m, parts["kv_down"].n)
    return max(1, min(parts["k"].m + parts["v"].m, parts["k"].n) // 8)


def subspace_of(checkpoint: Checkpoint, attention: Attention, k: int) -> np.ndarray | None:
    """Basis [n, k] of the leading row space of [K; V] or of the composed operator.

    None where the operator has a rank below k, so that there is no such space.
    """
    from mla_study.probes.subspaces import factored_row_space, row_space

    weights = Weights(checkpoint)
    try:
        if attention.latent:
            return factored_row_space(*_latent_factors(weights, attention), k)
        return row_space([weights.dense(attention.parts[role]) for role in "kv"], k)
    except ValueError:
        return None


def _composed(
    weights: Weights, attention: Attention, cov_sqrt: np.ndarray | None
) -> list[Spectrum]:
    """[W_K_up; W_V_up] diag(g) W_kv_down of latent attention, g the gain of the latent norm."""
    up, down = _latent_factors(weights, attention)
    m, r, n = up.shape[0], up.shape[1], down.shape[1]
    found = [
        Spectrum("composed", -1, "raw", factored_singular_values(up, down), m, n, "factors", r)
    ]
    if cov_sqrt is not None and cov_sqrt.shape[0] == n:
        sigma = factored_singular_values(up, down @ cov_sqrt)
        found.append(Spectrum("composed", -1, "weighted-raw", sigma, m, n, "factors", r))
    return found


def _adapter(weights: Weights, attention: Attention, op: str) -> list[Spectrum]:
    """The product of an unmerged adapter; a joint operator is block diagonal in its up factors."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for role in STACKS[op]:
        part = attention.parts[role]
        factors = weights.checkpoint.factors(part.tensor)
        if factors is None:
            return []
        up, down = factors
        up = np.concatenate([up[start:stop] for start, stop in part.rows])
        if not (np.isfinite(up).all() and np.isfinite(down).all()):
            weights.refuse(part)
        weights.digests[f"{part.tensor}{list(part.rows)}"] = hashlib.sha256(
            np.ascontiguousarray(up).tobytes() + np.ascontiguousarray(down).tobytes()
        ).hexdigest()
        pairs.append((up, down))
    m, r, n = sum(len(u) for u, _ in pairs), sum(len(d) for _, d in pairs), pairs[0][1].shape[1]
    found: list[Spectrum] = []
    for gauge in ("raw", "balanced") if len(pairs) > 1 else ("raw",):
        big = np.zeros((m, r))
        row = column = 0
        for up, down in pairs:
            norm = float(np.linalg.norm(factored_singular_values(up, down)))
            scale = 1.0 / norm if gauge == "balanced" and norm > 0 else 1.0
            big[row : row + len(up), column : column + len(down)] = up * scale
            row, column = row + len(up), column + len(down)
        sigma = factored_singular_values(big, np.concatenate([d for _, d in pairs]))
        found.append(Spectrum(op, -1, gauge, sigma, m, n, "factors", min(r, m, n)))
    return found


def _per_head(weights: Weights, attention: Attention, op: str) -> list[Spectrum]:
    """W_Q^T W_K (score, at zero relative position) or W_O W_V (output) of every head."""
    heads, parts = attention.heads, attention.parts
    wanted = ("q", "k") if op == "qk" else ("o", "v")
    if heads is None or not set(wanted) <= set(parts):
        return []
    first, second = (weights.dense(parts[role]) for role in wanted)
    gauge = "raw"
    if op == "qk":
        stacks = _Stacks(weights, attention, Request(("q", "k")))
        for role, values in (("q", first), ("k", second)):
            if role in stacks.gains:
                values *= stacks._folded_scale(role)[:, None]
                gauge = "folded"
    elif first.shape[1] != heads.q * heads.dim:
        return []
    found: list[Spectrum] = []
    for h in range(heads.q):
        mine = slice(h * heads.dim, (h + 1) * heads.dim)
        shared = h // (heads.q // heads.kv)
        right = second[shared * heads.dim : (shared + 1) * heads.dim]
        left = first[mine].T if op == "qk" else first[:, mine]
        sigma = factored_singular_values(left, right)
        found.append(
            Spectrum(op, h, gauge, sigma, left.shape[0], right.shape[1], "factors", heads.dim)
        )
    return found
