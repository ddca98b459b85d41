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

    Without gradients on the CPU heads are expanded one by one into one buffer, see
    :func:`_head_by_head`; not under autocast, which does not reach what writes into a buffer.

    Args:
        head_group: heads expanded at a time; bounds the transient [B, K, group, dn + dr + dv].
    """
    given = (q_nope, q_rope, c, k_rope, k_up, v_up)
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if c.device.type == "cpu" and not graph and not torch.is_autocast_enabled("cpu"):
        return _head_by_head(*given)
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


def _head_by_head(
    q_nope: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, k_up: Tensor, v_up: Tensor
) -> Tensor:
    """:func:`reconstruct` with one buffer [K, dr + dn + dv] that every head's GEMM writes into.

    Nothing is copied or joined, and a head's keys and values are still in the processor's cache
    when attention reads them. The rotary channels come first; a dot product does not mind.
    """
    (batch, queries, heads, d_nope), d_rope, d_v = q_nope.shape, k_rope.shape[-1], v_up.shape[1]
    query = torch.cat([q_rope, q_nope], dim=-1).transpose(1, 2)
    up = torch.cat([k_up, v_up], dim=1).transpose(1, 2)
    both = c.new_empty(1, 1, c.shape[1], d_rope + d_nope + d_v)
    key, value = both.split([d_rope + d_nope, d_v], dim=-1)
    out = c.new_empty(batch, queries, heads, d_v)
    for sample in range(batch):
        both[0, 0, :, :d_rope] = k_rope[sample]
        for head in range(heads):
            torch.mm(c[sample], up[head], out=both[0, 0, :, d_rope:])
            mine = query[sample : sample + 1, head : head + 1]
            out[sample, :, head] = F.scaled_dot_product_attention(mine, key, value)[0, 0]
    return out


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
