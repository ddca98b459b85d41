"""Bytes of weights, gradients and optimiser states that a rank of training holds.

They follow from the shapes and from how FSDP2 splits them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from mla_study.model.transformer import WanTransformer
from mla_study.training.objective import Role
from mla_study.training.optimisers import Muon, make_optimisers
from mla_study.training.ranks import Ranks
from mla_study.training.recipe import Precision, Stage


def shard_bytes(parameters: Iterable[Tensor], ranks: int) -> int:
    """Bytes of float32 parameters that FSDP2 keeps on rank 0, which none exceeds.

    A parameter is split along its first axis, into equal pieces but for the last ones.
    """
    return sum(
        4 * math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:]) for p in parameters if p.ndim
    )


def optimiser_bytes(model: nn.Module, stage: Stage, role: Role, ranks: Ranks) -> dict[str, int]:
    """Bytes of states a rank by optimiser: two moments of AdamW, the momentum of Muon.

    AdamW's count of steps, four bytes a parameter in the host's memory, is left out.
    """
    chosen = stage.critic if role == "fake_score" and stage.critic else stage.optimiser
    found: dict[str, int] = {}
    for optimiser in make_optimisers(model, chosen):
        mine = [p for group in optimiser.param_groups for p in group["params"]]
        muon = isinstance(optimiser, Muon)
        found["Muon" if muon else "AdamW"] = (1 if muon else 2) * kept_bytes(mine, ranks)
    return found


def gradient_bytes(model: nn.Module, ranks: Ranks, pieces: int) -> int:
    """Bytes of gradients a rank at the end of an update's passes.

    Between micro-batches nothing is reduced, so that every rank holds all of them in float32.
    """
    if ranks.sharded and pieces == 1:
        return shard_bytes(model.parameters(), ranks.count)
    return 4 * _count(model)


def gathered_bytes(
    trained: WanTransformer, models: Iterable[WanTransformer], ranks: Ranks, precision: Precision
) -> int:
    """Bytes of whole weights that FSDP2 holds at once, and of one block's gradients.

    Each model's weights outside of its blocks stay whole once they were asked for; of the blocks
    one is in use and the next one fetched. A block's gradients lie there in the dtype of the
    passes, and in float32 to be reduced.
    """
    if not ranks.sharded:
        return 0
    item = 2 if precision == "bf16" else 4
    block = max(_count(block) for block in trained.blocks)
    outside = sum(_count(m) - sum(_count(block) for block in m.blocks) for m in models)
    return item * (outside + 2 * block) + (item + 4) * block


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def kept_bytes(parameters: Iterable[Tensor], ranks: Ranks) -> int:
    """Bytes of float32 parameters that a rank keeps, split or whole."""
    return shard_bytes(parameters, ranks.count if ranks.sharded else 1)
