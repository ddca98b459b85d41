"""Find the attention operators in a bag of tensors: which slice of which tensor is whose K.

Shapes: a weight is [m, n], m outputs (rows), n inputs (columns). Fused projections are row ranges of
one tensor; the latent attention of MLA is a pair of factors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from mla_study.checkpoints.config_facts import ConfigFacts
from mla_study.checkpoints.reader import Checkpoint
from mla_study.checkpoints.roles import MapRule, Match, is_cross, match_norm, match_weight, numbers
from mla_study.errors import UserError

Kind = Literal["self", "cross"]
Layout = Literal["separate", "fused qkv", "fused kv", "latent"]
_INTERLEAVED = re.compile(r"query_key_value(\.weight)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A projection: row ranges of one stored tensor, seen as [m, n]; transposed if stored [n, m]."""

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
    """All operators of a checkpoint, what was left out and why, and what a config misses."""

    attentions: list[Attention] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # tensor -> reason
    expected_layers: int | None = None
    missing_layers: list[int] = field(default_factory=list)
    natural_layers: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass
class _Block:
    block: str
    weights: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)


def find_operators(
    checkpoint: Checkpoint,
    *,
    maps: Sequence[MapRule] = (),
    heads: int | None = None,
    kv_heads: int | None = None,
    layers: int | None = None,
) -> Found:
    """Group the tensors of a checkpoint into attention blocks.

    Args:
        checkpoint: an open checkpoint.
        maps: user rules that go before the table of name families.
        heads: query heads, where neither config nor qk-norm says it.
        kv_heads: key/value heads under grouped-query attention (default: from shapes).
        layers: number of blocks that should be there (default: from the config).

    Raises:
        UserError: no attention was found (with what was found, and ``--map``), or heads that do not
            divide the rows.
    """
    found = Found()
    blocks, cross_mapped = _group(checkpoint, maps, found)
    facts = ConfigFacts.of(checkpoint)
    for block in sorted(blocks.values(), key=lambda b: _natural(b.block)):
        given = Heads(heads, kv_heads or 0, 0) if heads else None
        attention = _assemble(checkpoint, block, facts, given, found)
        if attention is not None:
            cross = attention.kind == "cross" or block.block in cross_mapped
            found.attentions.append(replace(attention, kind="cross" if cross else "self"))
    if not found.attentions:
        raise UserError(_nothing(checkpoint, found))
    _number_layers(found)
    found.expected_layers = layers or facts.layers
    if found.expected_layers is not None:
        _find_missing(found, facts)
    return found


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    parts = re.split(r"(\d+)", text)
    return tuple((1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts)


def _group(
    checkpoint: Checkpoint, maps: Sequence[MapRule], found: Found
) -> tuple[dict[str, _Block], set[str]]:
    blocks: dict[str, _Block] = {}
    outputs: list[tuple[str, Match]] = []
    crosses: set[str] = set()
    for name, info in checkpoint.tensors.items():
        rule = next((r for r in maps if r.match(name)), None)
        match = rule.match(name) if rule else None
        wide = [s for s in info.shape if s != 1] if len(info.shape) > 2 else list(info.shape)
        if match is None and len(info.shape) == 1:
            match = match_norm(name)
            if match is not None and name.endswith((".weight", ".scale")):
                blocks.setdefault(match.block, _Block(match.block)).norms[match.role] = name
            continue
        if match is None:
            match = (
                match_weight(name) if not name.endswith(("bias", "scale", "scale_weight")) else None
            )
        if match is None:
            if len(info.shape) >= 2:
                found.left_out[name] = "no attention role in its name"
            continue
        if rule is not None and rule.cross:
            crosses.add(match.block)
        if len(info.shape) < 2 or (len(wide) > 2 or any(s != 1 for s in info.shape[2:])):
            if match.role.endswith("norm") and len(info.shape) == 1:
                blocks.setdefault(match.block, _Block(match.block)).norms[match.role] = name
            else:
                found.left_out[name] = f"shape {list(info.shape)} is no matrix"
            continue
        if match.role == "o":
            outputs.append((name, match))
            continue
        block = blocks.setdefault(match.block, _Block(match.block))
        if match.role in block.weights:
            other = block.weights[match.role]
            found.left_out[name] = f"role {match.role} of {match.block} is taken by {other}"
            continue
        block.weights[match.role] = name
    for name, match in outputs:
        candidates = (match.block, f"{match.block}.self", f"{match.block}.attention")
        owner = next((c for c in candidates if c in blocks and blocks[c].weights), None)
        if owner is None:
            found.left_out[name] = "an output projection without q, k, v beside it"
        elif "o" not in blocks[owner].weights:
            blocks[owner].weights["o"] = name
    return {b: block for b, block in blocks.items() if block.weights}, crosses


def _matrix_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.tensors[name].shape
    return shape[0], int(np.prod(shape[1:]))


def _whole(checkpoint: Checkpoint, name: str) -> Part:
    m, n = _matrix_shape(checkpoint, name)
    return Part(name, ((0, m),), n)


def _assemble(
    checkpoint: Checkpoint,
    block: _Block,
    facts: ConfigFacts,
    given: Heads | None,
    found: Found,
) -> Attention | None:
    weights = block.weights
    for name in weights.values():
        if 0 in checkpoint.tensors[name].shape:
            raise UserError(
                f"{checkpoint.spec.path}: tensor {name!r} has shape "
                f"{list(checkpoint.tensors[name].shape)}, without any element: the file is damaged"
            )
    remarks: list[str] = []
    parts: dict[str, Part] = {}
    layout: Layout = "separate"
    if "kv_down" in weights and ("kv_up" in weights or {"k_up", "v_up"} <= set(weights)):
        layout = "latent"
        parts = {role: _whole(checkpoint, name) for role, name in weights.items()}
        if not _latent_fits(parts, block, found):
            return None
    else:
        for role in ("q", "k", "v", "o"):
            if role in weights:
                parts[role] = _whole(checkpoint, weights[role])
        if "qkv" in weights:
            layout = "fused qkv"
            fused = _split_qkv(checkpoint, block, facts, given, remarks, found)
            if fused is None:
                return None
            parts.update(fused)
        elif "kv" in weights:
            layout = "fused kv"
            whole = _whole(checkpoint, weights["kv"])
            if whole.m % 2:
                found.left_out[weights["kv"]] = f"{whole.m} rows do not halve into k and v"
                return None
            parts["k"], parts["v"] = whole.sub(0, whole.m // 2), whole.sub(whole.m // 2, whole.m)
        if not {"k", "v"} <= set(parts):
            have = ", ".join(sorted(weights))
            for name in weights.values():
                found.left_out[name] = f"its block has {have} only: k and v are needed"
            return None
        if parts["k"].n != parts["v"].n:
            for role in ("k", "v"):
                found.left_out[weights.get(role, weights.get("kv", ""))] = (
                    f"k has {parts['k'].n} columns and v has {parts['v'].n}: no joint operator"
                )
            return None
    kind: Kind = "cross" if is_cross(block.block) else "self"
    if "q" in parts and "k" in parts and parts["q"].n != parts["k"].n:
        kind = "cross"
    norms = _norms(checkpoint, block, parts, remarks)
    heads = (
        _heads(checkpoint, block, parts, norms, facts, given) if not layout == "latent" else None
    )
    return Attention(block.block, -1, kind, layout, parts, norms, heads, tuple(remarks))


def _latent_fits(parts: dict[str, Part], block: _Block, found: Found) -> bool:
    ups = [parts[r] for r in ("kv_up", "k_up", "v_up") if r in parts]
    ranks = {p.n for p in ups}
    if len(ranks) != 1 or parts["kv_down"].m < ups[0].n:
        for name in block.weights.values():
            found.left_out[name] = (
                f"down projection has {parts['kv_down'].m} rows, up projections take "
                f"{sorted(ranks)}: not factors of one latent"
            )
        return False
    rank = ups[0].n
    # 'with_mqa': the rows behind the latent are the shared rotary key
    if parts["kv_down"].m > rank:
        parts.setdefault("k_rope", parts["kv_down"].sub(rank, parts["kv_down"].m))
        parts["kv_down"] = parts["kv_down"].sub(0, rank)
    return True


def _split_qkv(
    checkpoint: Checkpoint,
    block: _Block,
    facts: ConfigFacts,
    given: Heads | None,
    remarks: list[str],
    found: Found,
) -> dict[str, Part] | None:
    name = block.weights["qkv"]
    m, n = _matrix_shape(checkpoint, name)
    transposed = name.removesuffix(".weight").endswith("c_attn") and n == 3 * m
    if transposed:
        m, n = n, m
        remarks.append("c_attn is stored [inputs, outputs]: transposed")
    whole = Part(name, ((0, m),), n, transposed)
    result: dict[str, Part] = {}
    if "o" in block.weights:
        o_rows, o_columns = _matrix_shape(checkpoint, block.weights["o"])
        result["o"] = Part(block.weights["o"], ((0, o_rows),), o_columns, transposed)
    heads = given.q if given else facts.heads
    kv_heads = (given.kv if given else 0) or facts.kv_heads or heads
    if _INTERLEAVED.search(name) and m == 3 * n and facts.model_type not in ("chatglm",):
        if not heads:
            found.left_out[name] = "query_key_value interleaves heads: give --heads N"
            return None
        if n % heads:
            raise UserError(
                f"{checkpoint.spec.path}: {heads} heads do not divide {n} rows of {name!r}"
            )
        d = n // heads
        for index, role in enumerate("qkv"):
            rows = tuple((3 * h * d + index * d, 3 * h * d + (index + 1) * d) for h in range(heads))
            result[role] = Part(name, rows, n)
        remarks.append("rows interleaved by head")
        return result
    if heads and kv_heads and kv_heads != heads and m % (heads + 2 * kv_heads) == 0:
        q_rows = m // (heads + 2 * kv_heads) * heads
    elif m % 3 == 0 and (m == 3 * n or "o" not in result):
        q_rows = m // 3
    elif "o" in result and result["o"].n < m:
        q_rows = result["o"].n
    else:
        q_rows = n
    if m <= q_rows or (m - q_rows) % 2:
        found.left_out[name] = f"{m} rows do not split into q, k and v of {n} columns"
        return None
    k_rows = (m - q_rows) // 2
    result["q"] = whole.sub(0, q_rows)
    result["k"] = whole.sub(q_rows, q_rows + k_rows)
    result["v"] = whole.sub(q_rows + k_rows, m)
    return result


def _norms(
    checkpoint: Checkpoint, block: _Block, parts: Mapping[str, Part], remarks: list[str]
) -> dict[str, str]:
    """Gains that fit their projection: all channels at once, or one gain for every head."""
    targets = {"q_norm": "q", "k_norm": "k", "kv_norm": "kv_down"}
    kept: dict[str, str] = {}
    for role, name in block.norms.items():
        target = parts.get(targets.get(role, ""))
        if target is None:
            continue
        size = checkpoint.tensors[name].shape[0]
        if size and target.m % size == 0:
            kept[role] = name
        else:
            remarks.append(f"{name} has {size} gains for {target.m} rows: ignored")
    return kept


def _heads(
    checkpoint: Checkpoint,
    block: _Block,
    parts: Mapping[str, Part],
    norms: Mapping[str, str],
    facts: ConfigFacts,
    given: Heads | None,
) -> Heads | None:
    q, k = parts.get("q"), parts["k"]
    rows = q.m if q else k.m
    dim = 0
    if given:
        if rows % given.q:
            raise UserError(
                f"{checkpoint.spec.path}: {given.q} heads do not divide the {rows} rows of "
                f"{(q or k).tensor!r}: give another --heads"
            )
        dim = rows // given.q
        if given.kv and k.m // given.kv != dim:
            raise UserError(
                f"{checkpoint.spec.path}: --kv-heads {given.kv} makes heads of "
                f"{k.m / given.kv:g} rows in {k.tensor!r}, but queries have {dim}"
            )
    elif "k_norm" in norms and checkpoint.tensors[norms["k_norm"]].shape[0] < k.m:
        dim = checkpoint.tensors[norms["k_norm"]].shape[0]
    elif facts.head_dim and rows % facts.head_dim == 0:
        dim = facts.head_dim
    elif facts.heads and rows % facts.heads == 0:
        dim = rows // facts.heads
    if not dim or rows % dim or k.m % dim or (rows // dim) % (k.m // dim):
        if given:
            raise UserError(
                f"{checkpoint.spec.path}: heads of {dim} rows do not divide the {k.m} rows of "
                f"{k.tensor!r}: give another --heads"
            )
        return None
    return Heads(rows // dim, k.m // dim, dim)


def _number_layers(found: Found) -> None:
    """Give each block its own index where that is unique within its kind, else its ordinal."""
    result: list[Attention] = []
    for kind in ("self", "cross"):
        group = [a for a in found.attentions if a.kind == kind]
        paths = [numbers(a.block) for a in group]
        width = min((len(p) for p in paths), default=0)
        column = next((c for c in range(width) if len({p[c] for p in paths}) == len(paths)), None)
        if column is None and len(group) > 1:
            found.natural_layers = False
        for ordinal, (attention, path) in enumerate(zip(group, paths, strict=True)):
            layer = path[column] if column is not None else ordinal
            result.append(replace(attention, layer=layer))
    found.attentions = sorted(result, key=lambda a: (a.layer, a.kind == "cross"))


def _find_missing(found: Found, facts: ConfigFacts) -> None:
    expected = found.expected_layers or 0
    kinds: tuple[Kind, ...] = ("self", "cross") if facts.has_cross else ("self",)
    missing: set[int] = set()
    for kind in kinds:
        layers = {a.layer for a in found.attentions if a.kind == kind}
        if layers or kind == "self":
            missing |= set(range(expected)) - layers
    found.missing_layers = sorted(missing)


def _nothing(checkpoint: Checkpoint, found: Found) -> str:
    matrices = [n for n, t in checkpoint.tensors.items() if len(t.shape) >= 2]
    families = Counter(re.sub(r"\d+", "*", n) for n in matrices)
    shown = ", ".join(f"{name} ({count})" for name, count in families.most_common(6))
    reasons = Counter(r for r in found.left_out.values() if not r.startswith("no attention role"))
    why = f"; left out: {reasons.most_common(1)[0][0]}" if reasons else ""
    holds = (
        f"its {len(matrices)} matrices are {shown}"
        if matrices
        else f"it holds {len(checkpoint.tensors)} tensors and no matrix"
    )
    return (
        f"{checkpoint.spec.path}: no attention projections found, {holds}{why}; "
        "name them with --map 'REGEX -> role', for example --map 'attn\\.key -> k'"
    )
