"""How many heads a block has, and which norm gains belong to its queries and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mla_study.checkpoints.operators.blocks import Block, Heads, Part
from mla_study.checkpoints.operators.config_facts import ConfigFacts
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError

# transformers multiplies by 1 + the stored gain
_SHIFTED_GAINS = re.compile(r"gemma3(?!n)|t5gemma|qwen3_next|qwen3_5|step3p7")


def find_norms(
    checkpoint: Checkpoint, block: Block, parts: Mapping[str, Part], facts: ConfigFacts
) -> dict[str, str]:
    """Gains that fit their projection: all channels at once, or the channels of one head."""
    targets = {"q_norm": "q", "k_norm": "k", "kv_norm": "kv_down"}
    kept: dict[str, str] = {}
    for role, name in block.norms.items():
        target = parts.get(targets.get(role, ""))
        if target is None:
            continue
        size = checkpoint.tensors[name].shape[0]
        if not size or target.m % size or (role == "kv_norm" and size != target.m):
            block.remarks.append(f"{name} has {size} gains for {target.m} channels: ignored")
        elif _SHIFTED_GAINS.match(facts.model_type) and checkpoint.format != "gguf":
            block.remarks.append(f"{name} holds its gains less 1: not folded")
        else:
            kept[role] = name
            if f"{name.removesuffix('.weight')}.bias" in checkpoint.tensors:
                block.remarks.append(f"{name} has a bias: folded as an RMS norm, without its mean")
    return kept


def find_heads(
    checkpoint: Checkpoint,
    block: Block,
    parts: Mapping[str, Part],
    facts: ConfigFacts,
    heads: int,
    kv_heads: int,
) -> Heads | None:
    """Heads of a block from ``--heads`` and ``--kv-heads``, its qk-norm, or the config.

    Args:
        checkpoint: where the tensors lie.
        block: the block; a config that does not fit is added to its remarks.
        parts: its projections, ``k`` among them.
        facts: what the config says for it.
        heads: ``--heads``, 0 where it was not given.
        kv_heads: ``--kv-heads``, 0 where it was not given.

    Raises:
        UserError: heads that were given and do not divide the rows.
    """
    q, k, o = parts.get("q"), parts["k"], parts.get("o")
    rows = q.m if q else (o.n if o else 0)
    if heads or kv_heads:
        return _given(checkpoint, parts, rows, heads, kv_heads, facts)
    dim = 0
    norm = block.norms.get("k_norm")
    if norm is not None and 0 < checkpoint.tensors[norm].shape[0] < k.m:
        dim = checkpoint.tensors[norm].shape[0]
    elif not rows:
        kv = facts.kv_heads or facts.heads or 0
        dim = facts.head_dim or (k.m // kv if kv else 0)
        if not dim or k.m % dim or (kv and kv * dim != k.m):
            return None
        return Heads(facts.heads or k.m // dim, k.m // dim, dim)
    elif facts.heads and rows % facts.heads == 0:
        dim = rows // facts.heads
        if facts.head_dim and facts.head_dim != dim:
            block.remarks.append(
                f"the config's {facts.heads} heads of {facts.head_dim} do not make {rows} rows"
            )
            return None
    elif facts.heads:
        block.remarks.append(f"the config's {facts.heads} heads do not divide {rows} rows")
    elif facts.head_dim and rows % facts.head_dim == 0:
        dim = facts.head_dim
    rows = rows or k.m
    if not dim or rows % dim or k.m % dim or (rows // dim) % (k.m // dim):
        return None
    return Heads(rows // dim, k.m // dim, dim)


def _given(
    checkpoint: Checkpoint,
    parts: Mapping[str, Part],
    rows: int,
    heads: int,
    kv_heads: int,
    facts: ConfigFacts,
) -> Heads:
    k = parts["k"]
    by = parts.get("q") or parts.get("o") or k
    path = checkpoint.spec.path
    if not heads:
        heads = rows * kv_heads // k.m if rows else facts.heads or kv_heads
    if rows:
        if not heads or rows % heads:
            raise UserError(
                f"{path}: {heads} heads do not divide the {rows} channels of {by.tensor!r}: "
                "give another --heads"
            )
        dim = rows // heads
    else:
        count = kv_heads or heads
        if k.m % count:
            raise UserError(
                f"{path}: {count} heads do not divide the {k.m} rows of {k.tensor!r}: "
                "give another --heads or --kv-heads"
            )
        dim = k.m // count
    if kv_heads and k.m != kv_heads * dim:
        raise UserError(
            f"{path}: {kv_heads} key/value heads make heads of {k.m / kv_heads:g} rows in "
            f"{k.tensor!r}, but {heads} query heads make {dim}: give another --kv-heads"
        )
    if k.m % dim or heads % (k.m // dim):
        raise UserError(
            f"{path}: heads of {dim} channels do not divide the {k.m} rows of {k.tensor!r}: "
            "give another --heads"
        )
    return Heads(heads, k.m // dim, dim)
