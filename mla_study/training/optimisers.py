"""Optimisers of a role: AdamW, and Muon where matrices are whole or sharded (FSDP2).

torch.optim.Muon orthogonalises in bfloat16 and the shards of a matrix one by one; here a matrix is
gathered first, so that the number of ranks changes nothing, and float32 stays float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mla_study.training.recipe import Optimiser

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalised(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """About U V^T of a matrix U S V^T: singular values between .7 and 1.2 (Jordan et al. 2024).

    Five steps of X <- a X + (b A + c A^2) X with A = X X^T; float32 on a CPU, bfloat16 on a GPU.
    """
    a, b, c = COEFFICIENTS
    x = (
        matrix.bfloat16()
        if matrix.is_cuda
        else matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    )
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + torch.addmm(square, square, square, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W <- W - lr sqrt(max(1, m / n)) NS(g + beta v), v <- beta v + g.

    Args:
        params: matrices [m, n], plain or DTensor.
        lr: largest singular value of an update, for a matrix that is not tall.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                held = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                moved = p.grad.add(held, alpha=group["momentum"])
                whole = moved.full_tensor() if isinstance(moved, DTensor) else moved
                scale = max(1.0, whole.shape[0] / whole.shape[1]) ** 0.5
                update = orthogonalised(whole)
                if isinstance(p, DTensor):
                    update = distribute_tensor(update, p.device_mesh, p.placements)
                p.add_(update, alpha=-group["lr"] * scale)


def make_optimisers(model: nn.Module, chosen: Optimiser) -> list[torch.optim.Optimizer]:
    """AdamW for a model's parameters, or Muon for its blocks' matrices and AdamW for the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "blocks." in n and chosen.lr_matrix > 0]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=chosen.lr, betas=chosen.betas, weight_decay=chosen.weight_decay)
    ]
    if matrices:
        made.append(Muon(matrices, lr=chosen.lr_matrix))
    return made


def set_rates(
    optimisers: Iterable[torch.optim.Optimizer], chosen: Optimiser, factor: float
) -> None:
    """Give every group its learning rate times ``factor``."""
    for optimiser in optimisers:
        base = chosen.lr_matrix if isinstance(optimiser, Muon) else chosen.lr
        for group in optimiser.param_groups:
            group["lr"] = base * factor
