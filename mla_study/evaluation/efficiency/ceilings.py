"""What the machine can do at all, measured in the run that is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_study.evaluation.timing import Clock, Spread, clock_of, interleaved


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large matrix product and of SDPA, bytes/s (read and written) of a large copy."""

    matmul: Spread
    sdpa: Spread
    copy: Spread


@torch.no_grad()
def ceilings(
    device: torch.device, dtype: torch.dtype, repeats: int = 7, clock: Clock | None = None
) -> Ceilings:
    """Measure them.

    The product has 2048 (GPU: 8192) rows and columns, SDPA 12 heads of 128 with 1560 queries and
    3120 keys, and the copy moves 256 MB, more than any cache of a processor holds.
    """
    side = 8192 if device.type == "cuda" else 2048
    make = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make).to(device, dtype)

    a, b = normal(side, side), normal(side, side)
    queries, keys, heads = 1560, 3120, 12
    q, k, v = (
        normal(1, heads, queries, 128),
        normal(1, heads, keys, 128),
        normal(1, heads, keys, 128),
    )
    source = torch.ones(2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "matmul": partial(torch.mm, a, b),
        "sdpa": partial(F.scaled_dot_product_attention, q, k, v),
        "copy": partial(target.copy_, source),
    }
    times = interleaved(calls, repeats, 2, clock or clock_of(device))

    def rate(name: str, work: float) -> Spread:
        return Spread.of([work / seconds for seconds in times.seconds[name]])

    return Ceilings(
        rate("matmul", 2.0 * side**3),
        rate("sdpa", 4.0 * heads * queries * keys * 128),
        rate("copy", 2.0 * source.nbytes),
    )
