"""What one attention block is asked for: row stacks, per-head products, latent operators, adapters.

m rows (outputs), n columns (inputs), r inner rank of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_study.checkpoints.operators.find import Attention
from mla_study.checkpoints.reader import Checkpoint
from mla_study.probes.spectrum import factored_singular_values
from mla_study.probes.stacks import GAUGES, STACKS, Spectrum, Stacks, Weights
from mla_study.probes.subspaces import factored_row_space, row_space

OPERATORS = ("q", "k", "v", "o", "kv", "qkv", "qk", "ov", "composed")
DEFAULT_OPERATORS = ("kv", "k", "v", "composed")
HEAD_PAIRS = {"qk": ("q", "k"), "ov": ("o", "v")}


@dataclass(frozen=True)
class Request:
    """What to measure on each block.

    ``exact_tail`` takes all spectra from ``svdvals``; ``subspace`` asks for the row space too (see
    :func:`subspace_of`): of that dimension, or of the natural one where it is -1.
    """

    operators: tuple[str, ...] = DEFAULT_OPERATORS
    gauges: tuple[str, ...] = GAUGES
    exact_tail: bool = False
    subspace: int = 0


def measure_attention(
    weights: Weights,
    attention: Attention,
    request: Request,
    root: np.ndarray | None = None,
) -> list[Spectrum]:
    """Spectra of all requested operators of a block; :func:`unavailable` says which cannot be made.

    Args:
        weights: reader of the block's tensors; remembers sha256 of what it read.
        attention: the block.
        request: operators, gauges, and whether the tail is wanted from ``svdvals``.
        root: float64 [n, c] with root root^T = C, the second moment of the block's inputs: adds the
            weighted gauges, and the folded one takes the measured RMS.

    Raises:
        UserError: NaN or Inf in a tensor (named).
    """
    made = [op for op in request.operators if _why_not(weights.checkpoint, attention, op) is None]
    if attention.latent:
        return _composed(weights, attention, root) if "composed" in made else []
    stacks = [op for op in made if op in STACKS]
    if is_adapter(weights.checkpoint, attention):
        return [spectrum for op in stacks for spectrum in _adapter(weights, attention, op, request)]
    weighted = None
    found: list[Spectrum] = []
    if root is not None:
        weighted = Stacks(weights, attention, request.exact_tail, root)
        seen = [op for op in stacks if all(weighted.sees(role) for role in STACKS[op])]
        found = weighted.run(seen, request.gauges)
    plain = Stacks(weights, attention, request.exact_tail, measured=weighted)
    found = plain.run(stacks, request.gauges) + found
    for op in HEAD_PAIRS:
        if op in made:
            found += _per_head(plain, attention, op)
    return found


def unavailable(
    checkpoint: Checkpoint, attention: Attention, operators: tuple[str, ...]
) -> dict[str, str]:
    """For each operator that cannot be made of a block the reason, in words."""
    reasons = {op: _why_not(checkpoint, attention, op) for op in operators}
    return {op: reason for op, reason in reasons.items() if reason is not None}


def is_adapter(checkpoint: Checkpoint, attention: Attention) -> bool:
    """Whether the block's parts are the products of an unmerged low-rank adapter."""
    return any(checkpoint.factors(part.tensor) is not None for part in attention.parts.values())


def _why_not(checkpoint: Checkpoint, attention: Attention, op: str) -> str | None:
    parts = attention.parts
    if op == "composed" or attention.latent:
        if attention.latent:
            return None if op == "composed" else "latent attention has the composed operator only"
        return "the attention is not latent (MLA)"
    roles = STACKS.get(op) or HEAD_PAIRS[op]
    absent = [role for role in roles if role not in parts]
    if absent:
        return f"there is no {' and no '.join(absent)} projection"
    if op in STACKS:
        mixed = len({parts[role].n for role in roles}) > 1
        if mixed or (op == "qkv" and attention.kind == "cross"):
            return "q and k have different inputs"
        return None
    if is_adapter(checkpoint, attention):
        return "an adapter's product has no heads: merge it with --base"
    heads = attention.heads
    if heads is None:
        return "the number of heads is unknown: give --heads N (and --kv-heads N)"
    if op == "ov" and (parts["v"].m % heads.kv or parts["o"].n != heads.q * _v_dim(attention)):
        return (
            f"o has {parts['o'].n} columns, which do not fit {parts['v'].m} rows of v in "
            f"{heads.q}/{heads.kv} heads"
        )
    return None


def _v_dim(attention: Attention) -> int:
    assert attention.heads is not None
    return attention.parts["v"].m // attention.heads.kv


def _latent_factors(weights: Weights, attention: Attention) -> tuple[np.ndarray, np.ndarray]:
    parts = attention.parts
    down = weights.values(parts["kv_down"])
    ups = [weights.values(parts[role]) for role in ("kv_up", "k_up", "v_up") if role in parts]
    up = np.concatenate(ups)
    if "kv_norm" in attention.norms:
        up = up * weights.gain(attention.norms["kv_norm"], up.shape[1])
    return up, down


def subspace_rank(attention: Attention) -> int:
    """Dimension of the row space that is compared: d_c of a latent block, else min(m, n) / 8."""
    parts = attention.parts
    if attention.latent:
        return min(parts["kv_down"].m, parts["kv_down"].n)
    return max(1, min(parts["k"].m + parts["v"].m, parts["k"].n) // 8)


def subspace_of(weights: Weights, attention: Attention, k: int) -> np.ndarray | None:
    """Basis float64 [n, k] of the leading row space of [K; V] or of the composed operator, raw.

    None where the operator has a rank below k, so that there is no such space.
    """
    try:
        if attention.latent:
            return factored_row_space(*_latent_factors(weights, attention), k)
        return row_space([weights.values(attention.parts[role]) for role in "kv"], k)
    except ValueError:
        return None


def _composed(weights: Weights, attention: Attention, root: np.ndarray | None) -> list[Spectrum]:
    """[W_K_up; W_V_up] diag(g) W_kv_down of latent attention, g the gain of the latent norm."""
    up, down = _latent_factors(weights, attention)
    m, r, n = up.shape[0], up.shape[1], down.shape[1]
    downs = {"raw": down}
    if root is not None and root.shape[0] == n:
        downs["weighted-raw"] = down @ root
    found: list[Spectrum] = []
    for gauge, right in downs.items():
        sigma = factored_singular_values(up, right)
        sigma = np.pad(sigma, (0, min(m, r, n) - len(sigma)))
        found.append(Spectrum("composed", -1, gauge, sigma, m, n, "factors", r))
    return found


def _adapter(weights: Weights, attention: Attention, op: str, request: Request) -> list[Spectrum]:
    """The product of an unmerged adapter; a joint operator is block diagonal in its up factors."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for role in STACKS[op]:
        part = attention.parts[role]
        factors = weights.checkpoint.factors(part.tensor)
        assert factors is not None
        up, down = factors
        up = np.concatenate([up[start:stop] for start, stop in part.rows])
        weights.check_factors(part, up, down)
        pairs.append((up, down))
    m, r, n = sum(len(u) for u, _ in pairs), sum(len(d) for _, d in pairs), pairs[0][1].shape[1]
    found: list[Spectrum] = []
    possible = ("raw", "balanced") if len(pairs) > 1 else ("raw",)
    for gauge in (g for g in possible if g in request.gauges):
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


def _per_head(stacks: Stacks, attention: Attention, op: str) -> list[Spectrum]:
    """W_Q^T W_K (score, at zero relative position) or W_O W_V (output) of every query head.

    Behind a qk-norm the score takes the folded gains, whatever gauges are asked for.
    """
    heads, parts, weights = attention.heads, attention.parts, stacks.weights
    assert heads is not None
    first, second = (weights.values(parts[role]).astype(np.float64) for role in HEAD_PAIRS[op])
    gauge, dim = "raw", heads.dim
    if op == "ov":
        dim = _v_dim(attention)
    else:
        for role, values in (("q", first), ("k", second)):
            if stacks.normed(role):
                values *= stacks.folded_scale(role)[:, None]
                gauge = "folded"
    found: list[Spectrum] = []
    for h in range(heads.q):
        mine = slice(h * dim, (h + 1) * dim)
        shared = h // (heads.q // heads.kv)
        right = second[shared * dim : (shared + 1) * dim]
        left = first[mine].T if op == "qk" else first[:, mine]
        sigma = factored_singular_values(left, right)
        found.append(Spectrum(op, h, gauge, sigma, left.shape[0], right.shape[1], "factors", dim))
    return found
