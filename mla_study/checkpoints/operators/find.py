"""Find the attention operators in a bag of tensors: which slice of which tensor is whose K."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mla_study.checkpoints.operators.blocks import (
    Attention,
    Block,
    Found,
    Heads,
    Kind,
    Layout,
    Part,
)
from mla_study.checkpoints.operators.config_facts import ConfigFacts
from mla_study.checkpoints.operators.fused import (
    FUSED_QKV,
    split_kv,
    split_latent,
    split_qkv,
    stored_inputs_first,
    whole,
    without_gates,
)
from mla_study.checkpoints.operators.heads import find_heads, find_norms
from mla_study.checkpoints.operators.layers import natural, number_layers
from mla_study.checkpoints.operators.roles import (
    EXCLUDED,
    NORMS,
    MapRule,
    Match,
    is_cross,
    match_norm,
    match_weight,
    template,
)
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError

__all__ = ["Attention", "Found", "Heads", "Part", "find_operators"]

_NO_ROLE = "no attention role in its name"
_SIDE = "of a second stream (text beside image, or image beside text): --map can name it"
_CODES = re.compile(r"\.(?:qweight|weight_packed|packed_weight|qzeros)$")
_SCALE = re.compile(
    r"(?:^|[._])(?:weight_scale_inv|weight_scale|scale_weight|scale_input|input_scale|scales)$"
)
_INTEGERS = re.compile(r"^(?:[IU]\d+|BOOL|F4|u?int\d+|bool)$")


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
        UserError: no attention was found (with what was found, and ``--map``), a ``--map`` that
            finds no tensor, an attention weight without elements, heads that do not divide the
            rows, or a number of layers that no model has.
    """
    for option, value in (("--heads", heads), ("--kv-heads", kv_heads), ("--layers", layers)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}, but it must be at least 1")
    found = Found()
    facts = ConfigFacts.of(checkpoint)
    if facts.ignored:
        found.notes.append(
            f"the config's {', '.join(facts.ignored)}: no positive whole number, ignored."
        )
    blocks = _group(checkpoint, maps, found)
    for block in sorted(blocks, key=lambda b: natural(b.path)):
        attention = _assemble(checkpoint, block, facts, heads or 0, kv_heads or 0, found)
        if attention is not None:
            found.attentions.append(attention)
    if not found.attentions:
        raise UserError(_nothing(checkpoint, found))
    _mark_decoders(found)
    _note_incomplete(blocks, found)
    number_layers(found, facts, layers, checkpoint.config_path or checkpoint.spec.path)
    return found


class _Grouping:
    """Tensors sorted into blocks by their names."""

    def __init__(self, checkpoint: Checkpoint, found: Found) -> None:
        self.tensors = checkpoint.tensors
        self.format = checkpoint.format
        self.found = found
        self.blocks: dict[str, Block] = {}
        self.outputs: list[tuple[str, Match]] = []

    def block(self, path: str) -> Block:
        return self.blocks.setdefault(path, Block(path))

    def add(self, name: str, match: Match, cross: bool = False) -> None:
        """Put a tensor into its block, or say why not."""
        reason = self._unfit(name, match)
        if reason is not None:
            self.found.left_out[name] = reason
        elif match.role in NORMS:
            self.block(match.block).norms[match.role] = name
        elif match.role == "o" and not match.block.startswith("mapped"):
            self.outputs.append((name, match))
        else:
            block = self.block(match.block)
            block.cross |= cross
            other = block.weights.setdefault(match.role, name)
            if other != name:
                self.found.left_out[name] = f"role {match.role} of its block is taken by {other}"

    def _unfit(self, name: str, match: Match) -> str | None:
        info = self.tensors[name]
        if match.side:
            return _SIDE
        if match.role in NORMS:
            return None if len(info.shape) == 1 else f"shape {list(info.shape)} is no vector"
        if len(info.shape) < 2 or any(size != 1 for size in info.shape[2:]):
            return f"shape {list(info.shape)} is no matrix"
        if self.format in ("safetensors", "torch") and _INTEGERS.match(info.dtype):
            return f"{info.dtype} codes of a quantised checkpoint: probe the unquantised one"
        return None

    def attach_outputs(self) -> None:
        """Give each output projection to the block whose q, k and v lie beside it."""
        for name, match in self.outputs:
            candidates = (match.block, f"{match.block}.self", f"{match.block}.attention")
            owner = next((c for c in candidates if c in self.blocks and self.blocks[c].weights), "")
            if not owner:
                self.found.left_out[name] = "no q, k and v beside it"
            elif self.blocks[owner].weights.setdefault("o", name) != name:
                other = self.blocks[owner].weights["o"]
                self.found.left_out[name] = f"role o of its block is taken by {other}"


def _group(checkpoint: Checkpoint, maps: Sequence[MapRule], found: Found) -> list[Block]:
    grouping = _Grouping(checkpoint, found)
    mapped: list[tuple[str, MapRule, Match]] = []
    used: set[int] = set()
    for name, info in checkpoint.tensors.items():
        for index, rule in enumerate(maps):
            match = rule.match(name)
            if match is not None:
                used.add(index)
                mapped.append((name, rule, match))
                break
        else:
            _by_family(grouping, name, len(info.shape))
    for index, rule in enumerate(maps):
        if index not in used:
            some = ", ".join(list(checkpoint.tensors)[:4])
            raise UserError(
                f"{checkpoint.spec.path}: --map {rule.text or rule.pattern.pattern!r} matches "
                f"none of its {len(checkpoint.tensors)} tensors ({some} ...): mend the pattern"
            )
    beside = set(grouping.blocks)
    for name, rule, match in mapped:
        parent = name.removesuffix(".weight").rpartition(".")[0]
        if rule.role == EXCLUDED:
            found.left_out[name] = "left out by --map"
        elif parent in beside and not rule.named:
            grouping.add(name, Match(rule.role, parent), rule.cross)
        else:
            grouping.add(name, match, rule.cross)
    grouping.attach_outputs()
    return [block for block in grouping.blocks.values() if block.weights]


def _by_family(grouping: _Grouping, name: str, axes: int) -> None:
    match = match_norm(name)
    if match is not None:
        if name.endswith((".weight", ".scale")) and axes:
            grouping.add(name, match)
        return
    match = match_weight(name) if not name.endswith("bias") else None
    if match is not None and axes != 1:
        grouping.add(name, match)
    elif _CODES.search(name):
        grouping.found.left_out[name] = (
            "packed codes of a quantised checkpoint: probe the unquantised one"
        )
    elif axes >= 2 and not _SCALE.search(name):
        grouping.found.left_out[name] = _NO_ROLE


def _assemble(
    checkpoint: Checkpoint,
    block: Block,
    facts: ConfigFacts,
    heads: int,
    kv_heads: int,
    found: Found,
) -> Attention | None:
    for name in block.weights.values():
        shape = checkpoint.tensors[name].shape
        if 0 in shape:
            raise UserError(
                f"{checkpoint.spec.path}: tensor {name!r} has shape {list(shape)}, without any "
                "element: get an undamaged file"
            )
    facts = facts.of_block(block.path)
    roles = set(block.weights)
    layout: Layout = "separate"
    split: dict[str, Part] | str = {}
    if "kv_down" in roles and ("kv_up" in roles or {"k_up", "v_up"} <= roles):
        layout, split = "latent", split_latent(checkpoint, block.weights)
    elif roles & set(FUSED_QKV):
        layout = "fused qkv"
        split = split_qkv(checkpoint, block, facts, heads, kv_heads)
    elif "kv" in roles:
        layout, split = "fused kv", split_kv(checkpoint, block)
    if isinstance(split, str):
        return _leave_out(block, found, split)
    parts = dict(split)
    if layout != "latent":
        inputs_first = stored_inputs_first(checkpoint, block)
        for role in ("q", "k", "v", "o"):
            if role in roles:
                parts.setdefault(role, whole(checkpoint, block.weights[role], inputs_first))
        if not {"k", "v"} <= set(parts):
            have = ", ".join(sorted(roles))
            return _leave_out(block, found, f"its block has {have} only: k and v are needed")
        k, v = parts["k"], parts["v"]
        if k.n != v.n:
            inputs = f"k has {k.n} inputs and v has {v.n}"
            if k.m == v.n:
                return _leave_out(block, found, f"{inputs}: of a feed-forward layer")
            block.remarks.append(f"{inputs}: no joint operator")
        parts = {role: parts[role] for role in ("q", "k", "v", "o") if role in parts}
        norm = block.norms.get("q_norm")
        dim = checkpoint.tensors[norm].shape[0] if norm is not None else 0
        parts = without_gates(parts, dim, block.remarks)
    kind: Kind = "cross" if block.cross or is_cross(block.path) else "self"
    if layout != "latent" and "q" in parts and parts["q"].n != parts["k"].n:
        kind = "cross"
    norms = find_norms(checkpoint, block, parts, facts)
    known = None
    if layout != "latent":
        known = find_heads(checkpoint, block, parts, facts, heads, kv_heads)
    return Attention(block.path, -1, kind, layout, parts, norms, known, tuple(block.remarks))


def _leave_out(block: Block, found: Found, reason: str) -> None:
    for name in block.weights.values():
        found.left_out[name] = reason


def _mark_decoders(found: Found) -> None:
    """PyTorch's decoder layer calls its cross-attention ``multihead_attn``."""
    paths = {a.block for a in found.attentions}
    for at, attention in enumerate(found.attentions):
        head, _, last = attention.block.rpartition("multihead_attn")
        if not last and head != attention.block and f"{head}self_attn" in paths:
            found.attentions[at] = replace(attention, kind="cross")


def _note_incomplete(blocks: Sequence[Block], found: Found) -> None:
    """Say which blocks lack a projection that others of their stack have."""
    stacks: dict[tuple[str, str], set[str]] = {}
    for attention in found.attentions:
        key = template(attention.block), attention.layout
        stacks.setdefault(key, set()).update(attention.parts)
    lacking: dict[str, list[str]] = {}
    for attention in found.attentions:
        roles = stacks[template(attention.block), attention.layout] - set(attention.parts)
        for role in sorted(roles & {"q", "o"}):
            lacking.setdefault(role, []).append(attention.block)
    for role, paths in lacking.items():
        found.notes.append(f"{_some(paths)} without {role}, unlike others of the kind.")
    known = {a.block for a in found.attentions}
    templates = {path for path, _ in stacks}
    halves: dict[str, list[str]] = {}
    for block in blocks:
        if block.path not in known and template(block.path) in templates:
            halves.setdefault(", ".join(sorted(block.weights)), []).append(block.path)
    for have, paths in halves.items():
        found.notes.append(f"{_some(paths)} with {have} only, left out.")


def _some(paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return f"1 block ({paths[0]!r})"
    return f"{len(paths)} blocks ({paths[0]!r} ...)"


def _nothing(checkpoint: Checkpoint, found: Found) -> str:
    matrices = [n for n, t in checkpoint.tensors.items() if len(t.shape) >= 2]
    families = Counter(template(n) for n in matrices)
    shown = ", ".join(f"{name[:100]} ({count})" for name, count in families.most_common(6))
    reasons = Counter(r for r in found.left_out.values() if r != _NO_ROLE)
    why = f"; left out: {reasons.most_common(1)[0][0]}" if reasons else ""
    if len(matrices) == 1:
        holds = f"its only matrix is {matrices[0][:100]}"
    elif matrices:
        holds = f"its {len(matrices)} matrices are {shown}"
    else:
        count = len(checkpoint.tensors)
        holds = f"it holds {count} tensor{'s' if count != 1 else ''} and no matrix"
    return (
        f"{checkpoint.spec.path}: no attention projections found, {holds}{why}; "
        "name them with --map 'REGEX -> role', for example --map 'attn\\.key -> k'"
    )
