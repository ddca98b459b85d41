"""Where a model's output stopped being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from mla_study.model.transformer import WanTransformer


def first_fault(model: WanTransformer, call: Callable[[], Tensor]) -> str:
    """Run the failing call again and say which layer first gave NaN or infinity."""
    watched: dict[str, nn.Module] = {
        "the patch embedding": model.patch_embedding,
        "the time embedding": model.time_embedding,
        "the time projection": model.time_projection,
    }
    if model.config.learned_positions:
        watched["the position embedding"] = model.position_embedding
    watched |= {f"layer {i}": block for i, block in enumerate(model.blocks)}
    watched["the head"] = model.head
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            del module, inputs
            if not found and not bool(torch.isfinite(cast(Tensor, output)).all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "the model's output is not finite, but not a second time: check the machine"
    where = found[0]
    for name, parameter in watched[where].named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"{where} gave NaN or infinity, as its weight {name} holds some"
    return (
        f"{where} gave NaN or infinity although its weights are finite: "
        "try float32 weights, or cache storage of a wider range"
    )
