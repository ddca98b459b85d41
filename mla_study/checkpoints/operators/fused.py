"""Take fused projections apart: which rows of one qkv, kv or latent tensor are whose.

The orders in use: all queries, then all keys, then all values (plain); the q, k and v of one head,
or group of heads, after the other (by head); row by row in turn (by channel).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from mla_study.checkpoints.operators.blocks import Block, Part
from mla_study.checkpoints.operators.config_facts import ConfigFacts
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError

FUSED_QKV = ("qkv", "qkv_by_head", "qkv_by_channel", "qkv_mlp")
_CODEGEN_PARTS = 4  # CodeGen keeps the order of the four devices that it was trained on


def whole(checkpoint: Checkpoint, name: str, transposed: bool = False) -> Part:
    """A stored matrix [m, n] (axes of size 1 behind them do not count) as a part."""
    shape = checkpoint.tensors[name].shape
    m, n = shape[0], prod(shape[1:])
    return Part(name, ((0, n),), m, True) if transposed else Part(name, ((0, m),), n)


def stored_inputs_first(checkpoint: Checkpoint, block: Block) -> bool:
    """Whether a block is of GPT-2's Conv1D, which stores [inputs, outputs]."""
    name = block.weights.get("qkv", "")
    if not name.removesuffix(".weight").endswith("c_attn"):
        return False
    shape = checkpoint.tensors[name].shape
    return len(shape) == 2 and shape[1] in (2 * shape[0], 3 * shape[0])


def split_qkv(
    checkpoint: Checkpoint, block: Block, facts: ConfigFacts, heads: int, kv_heads: int
) -> dict[str, Part] | str:
    """Parts q, k and v (k and v of a cross-attention's c_attn), or why they cannot be told apart.

    Args:
        checkpoint: where the tensors lie.
        block: the block; what was assumed is added to its remarks.
        facts: what the config says for it.
        heads: ``--heads``, 0 where it was not given.
        kv_heads: ``--kv-heads``, 0 where it was not given.

    Raises:
        UserError: heads that were given and do not divide the rows.
    """
    role = next(r for r in FUSED_QKV if r in block.weights)
    name = block.weights[role]
    inputs_first = stored_inputs_first(checkpoint, block)
    part = whole(checkpoint, name, inputs_first)
    if inputs_first:
        block.remarks.append("stored [inputs, outputs]: transposed")
        if part.m == 2 * part.n:
            return _halves(part)
    asked = bool(heads or kv_heads)
    heads = heads or facts.heads or 0
    kv_heads = kv_heads or facts.kv_heads or heads
    grouped = facts.model_type == "internlm2" or (
        facts.model_type == "deberta" and name.endswith("in_proj.weight")
    )
    if facts.model_type == "codegen" and part.m == 3 * part.n:
        return _codegen(part)
    if role == "qkv_mlp":
        if part.m <= 3 * part.n:
            return f"{part.m} rows do not hold q, k and v of {part.n} columns and more"
        return _plain(part.sub(0, 3 * part.n), part.n)
    if role == "qkv_by_channel":
        if part.m % 3:
            return f"{part.m} rows do not divide into q, k and v"
        block.remarks.append("rows taken as q, k and v in turn")
        return {r: part.take(tuple((i, i + 1) for i in range(at, part.m, 3)))
                for at, r in enumerate("qkv")}  # fmt: skip
    if (role == "qkv_by_head" or grouped) and not _chatglm(block, facts, part):
        return _by_head(checkpoint, block, part, heads, kv_heads, asked)
    rows = _query_rows(checkpoint, block, part, heads, kv_heads, asked)
    if not rows or part.m <= rows or (part.m - rows) % 2:
        return f"{part.m} rows do not split into q, k and v of {part.n} columns: give --heads N"
    if len(checkpoint.tensors[name].shape) > 2 and part.m == 3 * part.n:
        block.remarks.append("1x1 convolution, rows taken as q, k and v in thirds")
    return _plain(part, rows)


def _chatglm(block: Block, facts: ConfigFacts, part: Part) -> bool:
    if facts.plain_qkv:
        return True
    if facts.heads or facts.model_type or part.m == 3 * part.n:
        return False
    return block.path.startswith(("transformer.encoder.layers", "encoder.layers"))


def _plain(part: Part, q_rows: int) -> dict[str, Part]:
    k_rows = (part.m - q_rows) // 2
    return {
        "q": part.sub(0, q_rows),
        "k": part.sub(q_rows, q_rows + k_rows),
        "v": part.sub(q_rows + k_rows, part.m),
    }


def _halves(part: Part) -> dict[str, Part]:
    return {"k": part.sub(0, part.m // 2), "v": part.sub(part.m // 2, part.m)}


def split_kv(checkpoint: Checkpoint, block: Block) -> dict[str, Part] | str:
    """Parts k and v of a fused kv: all keys, then all values; or why they cannot be told apart."""
    part = whole(checkpoint, block.weights["kv"])
    norm = block.norms.get("kv_norm")
    if norm is not None and checkpoint.tensors[norm].shape[0] == part.m:
        return "one projection serves as key and as value"
    return f"{part.m} rows do not halve into k and v" if part.m % 2 else _halves(part)


def _by_head(
    checkpoint: Checkpoint, block: Block, part: Part, heads: int, kv_heads: int, asked: bool
) -> dict[str, Part] | str:
    if not heads:
        if kv_heads == 1 and part.m > part.n:
            return _plain(part, part.n)
        return "its rows go head by head: give --heads N"
    each = heads + 2 * kv_heads
    if heads % kv_heads or part.m % each:
        return _misfit(checkpoint, part, heads, kv_heads, asked)
    d, q_heads = part.m // each, heads // kv_heads
    stride = (q_heads + 2) * d
    starts = {"q": (0, q_heads), "k": (q_heads, q_heads + 1), "v": (q_heads + 1, q_heads + 2)}
    block.remarks.append("rows interleaved by head")
    return {
        role: part.take(
            tuple((g * stride + low * d, g * stride + high * d) for g in range(kv_heads))
        )
        for role, (low, high) in starts.items()
    }


def _query_rows(
    checkpoint: Checkpoint, block: Block, part: Part, heads: int, kv_heads: int, asked: bool
) -> int:
    """Rows of q in a plain stack, 0 where nothing tells."""
    each = heads + 2 * kv_heads
    grouped = bool(heads) and kv_heads != heads
    if asked and grouped:
        if part.m % each:
            _misfit(checkpoint, part, heads, kv_heads, asked)
        return part.m // each * heads
    if "o" in block.weights:  # its columns are the query heads' channels
        o = whole(checkpoint, block.weights["o"], part.transposed)
        if o.n < part.m and (part.m - o.n) % 2 == 0:
            return o.n
    if grouped and part.m % each == 0:
        return part.m // each * heads
    # between n and 3n rows there may be fewer keys than queries, and nothing tells how many
    return 0 if part.n < part.m < 3 * part.n or part.m % 3 else part.m // 3


def _misfit(checkpoint: Checkpoint, part: Part, heads: int, kv_heads: int, asked: bool) -> str:
    text = (
        f"{heads} query heads and {kv_heads} key/value heads do not divide the {part.m} rows of "
        f"{part.tensor!r}"
    )
    if asked:
        raise UserError(f"{checkpoint.spec.path}: {text}: give other --heads or --kv-heads")
    return f"the config's {text}"


def _codegen(part: Part) -> dict[str, Part]:
    """CodeGen: in each of four parts the rows of q, then v, then k."""
    if part.m % (3 * _CODEGEN_PARTS):
        return _plain(part, part.n)
    size = part.m // (3 * _CODEGEN_PARTS)
    return {
        role: part.take(
            tuple(((3 * i + at) * size, (3 * i + at + 1) * size) for i in range(_CODEGEN_PARTS))
        )
        for at, role in enumerate("qvk")
    }


def without_gates(parts: dict[str, Part], dim: int, remarks: list[str]) -> dict[str, Part]:
    """Parts without the rows of a gate that stands behind each head's queries (Qwen3-Next)."""
    q, o = parts.get("q"), parts.get("o")
    if not dim or q is None or o is None or q.m != 2 * o.n or q.m % (2 * dim):
        return parts
    remarks.append("q without the gate that stands behind each head")
    ranges = tuple((start, start + dim) for start in range(0, q.m, 2 * dim))
    return {**parts, "q": q.take(ranges)}


def split_latent(checkpoint: Checkpoint, weights: Mapping[str, str]) -> dict[str, Part] | str:
    """Parts of latent attention (MLA), or why its factors do not belong together.

    The rows of a ``kv_a_proj_with_mqa`` behind the latent are the shared rotary key.
    """
    parts = {role: whole(checkpoint, name) for role, name in weights.items()}
    if "kv_up" in parts:  # the same factors once more
        parts.pop("k_up", None)
        parts.pop("v_up", None)
    down = parts["kv_down"]
    ranks = {parts[role].n for role in ("kv_up", "k_up", "v_up") if role in parts}
    rank = min(ranks)
    if len(ranks) != 1 or down.m < rank or (down.m > rank and "k_rope" in parts):
        taken = " and ".join(map(str, sorted(ranks)))
        return (
            f"the down projection gives {down.m} channels, the up projections take {taken}: "
            "not factors of one latent"
        )
    if down.m > rank:
        parts["k_rope"] = down.sub(rank, down.m)
        parts["kv_down"] = down.sub(0, rank)
    return parts
