"""Latent attention without expanding the cache: every head queries the shared latent itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def absorbed(
    q_nope: Float[Tensor, "B M H dn"],
    q_rope: Float[Tensor, "B M H dr"],
    c: Float[Tensor, "B K dc"],
    k_rope: Float[Tensor, "B K dr"],
    k_up: Float[Tensor, "H dn dc"],
    v_up: Float[Tensor, "H dv dc"],
) -> Float[Tensor, "B M H dv"]:
    """The function of :func:`~mla_study.kernels.latent_attention.reference.reference`.

    The up projections move to the other side of the products: q_nope W_K_up against c, and W_V_up
    after the weighted mean of c. The factors are kept apart; composing them with their neighbours
    costs more (see README.md). Heads are folded into the rows of one multi-query attention, and
    [c | k_rope] serves as key and as value, which keeps the fast kernels of SDPA (d_qk = d_v).
    """
    batch, queries, heads, d_nope = q_nope.shape
    d_c = c.shape[-1]
    latent = torch.einsum("bmhn,hnc->bmhc", q_nope, k_up)
    query = torch.cat([latent, q_rope], dim=-1).reshape(batch, 1, queries * heads, -1)
    cached = torch.cat([c, k_rope], dim=-1)[:, None]
    scale = (d_nope + q_rope.shape[-1]) ** -0.5
    mean = F.scaled_dot_product_attention(query, cached, cached, scale=scale)[..., :d_c]
    return torch.einsum("bmhc,hvc->bmhv", mean.reshape(batch, queries, heads, d_c), v_up)
