"""Latent attention by expanding the latent to every head's keys and values first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def augmented_up(
    k_up: Float[Tensor, "H dn dc"], v_up: Float[Tensor, "H dv dc"], d_rope: int
) -> Float[Tensor, "dcr out"]:
    """W_aug with [c | k_rope] @ W_aug = all heads' [k_nope | k_rope] and then v: one GEMM for both.

    The rotary part passes through an identity block, so it arrives bit for bit.
    """
    heads, d_nope, d_c = k_up.shape
    keys = k_up.new_zeros(heads, d_nope + d_rope, d_c + d_rope)
    keys[:, :d_nope, :d_c] = k_up
    if d_rope:
        keys[:, d_nope:, d_c:] = torch.eye(d_rope, dtype=k_up.dtype, device=k_up.device)
    values = F.pad(v_up, (0, d_rope))
    return torch.cat([keys.flatten(0, 1), values.flatten(0, 1)]).T


def reconstruct(
    q_nope: Float[Tensor, "B M H dn"],
    q_rope: Float[Tensor, "B M H dr"],
    c: Float[Tensor, "B K dc"],
    k_rope: Float[Tensor, "B K dr"],
    k_up: Float[Tensor, "H dn dc"],
    v_up: Float[Tensor, "H dv dc"],
    head_group: int | None = None,
) -> Float[Tensor, "B M H dv"]:
    """The function of :func:`~mla_study.kernels.latent_attention.reference.reference`.

    Args:
        head_group: heads expanded at a time; bounds the transient [B, K, group, dn + dr + dv].
    """
    query = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
    cached = torch.cat([c, k_rope], dim=-1)
    heads, d_head, d_v = q_nope.shape[2], query.shape[-1], v_up.shape[1]
    group = heads if head_group is None else max(1, min(head_group, heads))
    outs: list[Tensor] = []
    for start in range(0, heads, group):
        stop = min(start + group, heads)
        up = augmented_up(k_up[start:stop], v_up[start:stop], k_rope.shape[-1])
        both = cached @ up
        n = stop - start
        key = both[..., : n * d_head].unflatten(-1, (n, d_head)).transpose(1, 2)
        value = both[..., n * d_head :].unflatten(-1, (n, d_v)).transpose(1, 2)
        outs.append(F.scaled_dot_product_attention(query[:, start:stop], key, value))
    return torch.cat(outs, dim=1).transpose(1, 2)


def expanded(
    c: Float[Tensor, "B K dc"], k_up: Float[Tensor, "H dn dc"], v_up: Float[Tensor, "H dv dc"]
) -> tuple[Float[Tensor, "B K H dn"], Float[Tensor, "B K H dv"]]:
    """Every head's content key and value, for tokens that several queries' windows share."""
    heads, d_nope, _ = k_up.shape
    both = c @ torch.cat([k_up.flatten(0, 1), v_up.flatten(0, 1)]).T
    key, value = both.split([heads * d_nope, both.shape[-1] - heads * d_nope], dim=-1)
    return key.unflatten(-1, (heads, d_nope)), value.unflatten(-1, (heads, v_up.shape[1]))


def attend_expanded(
    q_nope: Float[Tensor, "B M H dn"],
    q_rope: Float[Tensor, "B M H dr"],
    k_nope: Float[Tensor, "B K H dn"],
    k_rope: Float[Tensor, "B K dr"],
    v: Float[Tensor, "B K H dv"],
) -> Float[Tensor, "B M H dv"]:
    """:func:`reconstruct` after :func:`expanded`; the rotary key may differ from call to call."""
    query = torch.cat([q_nope, q_rope], dim=-1)
    shared = k_rope[:, :, None].expand(-1, -1, k_nope.shape[2], -1)
    key = torch.cat([k_nope, shared], dim=-1)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), v.transpose(1, 2)
    )
    return out.transpose(1, 2)
