"""The Triton source of fused latent attention (README.md, "Fused"); imported only with Triton.

Rows are queries times heads, row = m * H + h. A latent is held in PARTS (``triton_tiles.parts``).
"""

# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# ruff: noqa: RUF005
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

NO_SCALES = tl.constexpr(0)
TOKEN_SCALES = tl.constexpr(1)
CHANNEL_SCALES = tl.constexpr(2)
SHORT_FRAME_SCALES = tl.constexpr(3)  # by channel too, where a tile may span more than two frames


@triton.jit
@no_type_check
def cached_tile(
    ptr, scales_ptr, start, keys, stride_key, stride_scale, frame_tokens, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SCALING: tl.constexpr, MASKED: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Channels FIRST .. FIRST + WIDTH of a tile of cached tokens, dequantised to DTYPE."""
    token = start + tl.arange(0, BN)
    channel = FIRST + tl.arange(0, WIDTH)
    at = ptr + token[:, None] * stride_key + channel[None, :]
    exists = (token < keys)[:, None] & (channel < CHANNELS)[None, :]
    PARTIAL: tl.constexpr = MASKED or FIRST + WIDTH > CHANNELS
    if PARTIAL:
        tile = tl.load(at, mask=exists, other=0)
    else:
        tile = tl.load(at)
    if SCALING == TOKEN_SCALES:
        scales = tl.load(scales_ptr + token * stride_scale, mask=token < keys, other=0.0)
        tile = (tile.to(tl.float32) * scales.to(tl.float32)[:, None]).to(DTYPE)
    if SCALING == CHANNEL_SCALES:
        early = start // frame_tokens
        late = tl.minimum(start + BN - 1, keys - 1) // frame_tokens
        real = channel < CHANNELS
        one = tl.load(scales_ptr + early * stride_scale + channel, mask=real, other=0.0)
        two = tl.load(scales_ptr + late * stride_scale + channel, mask=real, other=0.0)
        first = (token < (early + 1) * frame_tokens)[:, None]
        scales = tl.where(first, one.to(tl.float32)[None, :], two.to(tl.float32)[None, :])
        tile = (tile.to(tl.float32) * scales).to(DTYPE)
    if SCALING == SHORT_FRAME_SCALES:
        at = (token // frame_tokens)[:, None] * stride_scale + channel[None, :]
        scales = tl.load(scales_ptr + at, mask=exists, other=0.0)
        tile = (tile.to(tl.float32) * scales.to(tl.float32)).to(DTYPE)
    return tile


@triton.jit
@no_type_check
def rotated(
    key, cis_ptr, token, keys, stride_cis, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Turn the interleaved pairs (2i, 2i + 1) of a tile of keys; in float32."""
    channel = tl.arange(0, WIDTH)
    exists = (token < keys)[:, None] & (channel < CHANNELS)[None, :]
    at = cis_ptr + token[:, None] * stride_cis + channel[None, :]
    BN: tl.constexpr = key.shape[0]
    cos, sin = tl.split(tl.reshape(tl.load(at, mask=exists, other=0.0), (BN, WIDTH // 2, 2)))
    even, odd = tl.split(tl.reshape(key.to(tl.float32), (BN, WIDTH // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, (BN, WIDTH)).to(key.dtype)


@triton.jit
@no_type_check
def absorb_tile(
    start, keys, q, r, highest, total, acc, c_ptr, k_ptr, cis_ptr, c_scales_ptr, k_scales_ptr,
    log2_scale, c_tokens, k_tokens, stride_ck, stride_kk, stride_cis, stride_cs, stride_ks,
    PARTS: tl.constexpr, OFFSETS: tl.constexpr, D_C: tl.constexpr, D_ROPE: tl.constexpr,
    W_ROPE: tl.constexpr, ROTATE: tl.constexpr, C_SCALING: tl.constexpr, K_SCALING: tl.constexpr,
    MASKED: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys start .. start + BN into (highest, total, acc)."""
    token = start + tl.arange(0, BN)
    k = cached_tile(
        k_ptr, k_scales_ptr, start, keys, stride_kk, stride_ks, k_tokens, 0, W_ROPE, D_ROPE,
        K_SCALING, MASKED, BN, DTYPE,
    )  # fmt: skip
    if ROTATE:
        k = rotated(k, cis_ptr, token, keys, stride_cis, W_ROPE, D_ROPE)
    score = tl.dot(r, tl.trans(k), input_precision="ieee")
    c = ()
    for i in tl.static_range(len(PARTS)):
        part = cached_tile(
            c_ptr, c_scales_ptr, start, keys, stride_ck, stride_cs, c_tokens, OFFSETS[i],
            PARTS[i], D_C, C_SCALING, MASKED, BN, DTYPE,
        )  # fmt: skip
        score = tl.dot(q[i], tl.trans(part), score, input_precision="ieee")
        c = c + (part,)
    score = score * log2_scale
    if MASKED:
        score = tl.where((token < keys)[None, :], score, float("-inf"))
    higher = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(weight, 1)
    new = ()
    for i in tl.static_range(len(PARTS)):
        scaled = acc[i] * shrink[:, None]
        new = new + (tl.dot(weight.to(DTYPE), c[i], scaled, input_precision="ieee"),)
    return higher, total, new


@triton.jit
@no_type_check
def latent_attention(
    q_ptr, r_ptr, c_ptr, k_ptr, cis_ptr, c_scales_ptr, k_scales_ptr, out_ptr, lse_ptr,
    log2_scale, rows, keys, heads, split_keys, c_tokens, k_tokens,
    stride_qb, stride_qm, stride_qh, stride_rb, stride_rm, stride_rh,
    stride_cb, stride_ck, stride_kb, stride_kk, stride_cis,
    stride_csb, stride_cs, stride_ksb, stride_ks,
    PARTS: tl.constexpr, OFFSETS: tl.constexpr, D_C: tl.constexpr, D_ROPE: tl.constexpr,
    W_ROPE: tl.constexpr, ROTATE: tl.constexpr, C_SCALING: tl.constexpr, K_SCALING: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of rows against one split of the keys: softmax(q . [c | k]) c by online softmax.

    Grid (row tiles, splits, batch). Writes the mean latent [B, rows, D_C]; with SPLIT, one a split
    in float32 [splits, B, rows, D_C] and log2 of its denominator [splits, B, rows].
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    N: tl.constexpr = len(PARTS)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    real = row < rows
    query = (row // heads).to(tl.int64)
    head = row % heads
    q_row = q_ptr + batch * stride_qb + query * stride_qm + head * stride_qh
    r_row = r_ptr + batch * stride_rb + query * stride_rm + head * stride_rh

    q = ()
    acc = ()
    for i in tl.static_range(N):
        channel = OFFSETS[i] + tl.arange(0, PARTS[i])
        inside = real[:, None]
        if OFFSETS[i] + PARTS[i] > D_C:
            inside = inside & (channel < D_C)[None, :]
        q = q + (tl.load(q_row[:, None] + channel[None, :], mask=inside, other=0.0),)
        acc = acc + (tl.full((BM, PARTS[i]), 0.0, tl.float32),)
    channel_r = tl.arange(0, W_ROPE)
    r = tl.load(
        r_row[:, None] + channel_r[None, :],
        mask=real[:, None] & (channel_r < D_ROPE)[None, :],
        other=0.0,
    )

    highest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    c_batch = c_ptr + batch * stride_cb
    k_batch = k_ptr + batch * stride_kb
    cs_batch = c_scales_ptr + batch * stride_csb
    ks_batch = k_scales_ptr + batch * stride_ksb
    begin = split * split_keys
    end = tl.minimum(begin + split_keys, keys)
    whole = begin + (end - begin) // BN * BN
    for start in range(begin, whole, BN):
        highest, total, acc = absorb_tile(
            start, keys, q, r, highest, total, acc, c_batch, k_batch, cis_ptr, cs_batch, ks_batch,
            log2_scale, c_tokens, k_tokens, stride_ck, stride_kk, stride_cis, stride_cs, stride_ks,
            PARTS, OFFSETS, D_C, D_ROPE, W_ROPE, ROTATE, C_SCALING, K_SCALING,
            False, BN, DTYPE,
        )  # fmt: skip
    if whole < end:
        highest, total, acc = absorb_tile(
            whole, keys, q, r, highest, total, acc, c_batch, k_batch, cis_ptr, cs_batch, ks_batch,
            log2_scale, c_tokens, k_tokens, stride_ck, stride_kk, stride_cis, stride_cs, stride_ks,
            PARTS, OFFSETS, D_C, D_ROPE, W_ROPE, ROTATE, C_SCALING, K_SCALING,
            True, BN, DTYPE,
        )  # fmt: skip

    line = (split * tl.num_programs(2) + batch) * rows + row
    for i in tl.static_range(N):
        channel = OFFSETS[i] + tl.arange(0, PARTS[i])
        inside = real[:, None]
        if OFFSETS[i] + PARTS[i] > D_C:
            inside = inside & (channel < D_C)[None, :]
        mean = acc[i] / total[:, None]
        tl.store(
            out_ptr + line[:, None] * D_C + channel[None, :],
            mean.to(out_ptr.dtype.element_ty),
            mask=inside,
        )
    if SPLIT:
        tl.store(lse_ptr + line, highest + tl.log2(total), mask=real)


@triton.jit
@no_type_check
def combine(
    mean_ptr, lse_ptr, out_ptr, lines, splits, D_C: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Join the splits of one row: the mean of their means, weighted by their denominators.

    Grid (B * rows,). mean [splits, lines, D_C] and lse [splits, lines] in, out [lines, D_C].
    """
    line = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < D_C
    highest = float("-inf")
    total = 0.0
    acc = tl.zeros((WIDTH,), tl.float32)
    for split in range(splits):
        lse = tl.load(lse_ptr + split * lines + line)
        higher = tl.maximum(highest, lse)
        shrink = tl.exp2(highest - higher)
        weight = tl.exp2(lse - higher)
        mean = tl.load(mean_ptr + (split * lines + line) * D_C + channel, mask=inside, other=0.0)
        acc = acc * shrink + mean * weight
        total = total * shrink + weight
        highest = higher
    tl.store(out_ptr + line * D_C + channel, (acc / total).to(out_ptr.dtype.element_ty), inside)
