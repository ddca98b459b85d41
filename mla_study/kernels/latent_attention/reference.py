"""The oracle: latent attention in float64, head by head, as the equations stand.

Shapes: B batch, M queries, K keys, H heads, dc latent, dn and dr content and rotary channels,
dv value.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def reference(
    q_nope: Float[Tensor, "B M H dn"],
    q_rope: Float[Tensor, "B M H dr"],
    c: Float[Tensor, "B K dc"],
    k_rope: Float[Tensor, "B K dr"],
    k_up: Float[Tensor, "H dn dc"],
    v_up: Float[Tensor, "H dv dc"],
) -> Float[Tensor, "B M H dv"]:
    """softmax((q_nope . W_K_up c + q_rope . k_rope) / sqrt(dn + dr)) W_V_up c, in float64.

    Rotary parts arrive rotated. (VideoMLA, section "Latent self-attention".) Returned in the dtype
    of ``q_nope``.
    """
    heads: list[Tensor] = []
    c64, r64 = c.double(), k_rope.double()
    scale = 1.0 / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
    for h in range(q_nope.shape[2]):
        key = c64 @ k_up[h].double().T
        value = c64 @ v_up[h].double().T
        content = q_nope[:, :, h].double() @ key.transpose(1, 2)
        position = q_rope[:, :, h].double() @ r64.transpose(1, 2)
        weights = torch.softmax((content + position) * scale, dim=-1)
        heads.append(weights @ value)
    return torch.stack(heads, dim=2).to(q_nope.dtype)
