"""Latent attention without expanding the cache, in one fused kernel (README.md, "Fused").

Shapes: B batch, M queries, K keys, H heads, dc latent, dn and dr content and rotary channels, dv
value, P = dr / 2 rotary pairs; int8 caches also F frames of T tokens, K = F T. Triton is imported
only when something is computed; without a GPU only its interpreter (TRITON_INTERPRET=1) computes.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int8
from torch import Tensor

from mla_study.errors import UserError
from mla_study.kernels.latent_attention.triton_inputs import Cached, rotated_keys
from mla_study.kernels.latent_attention.triton_tiles import (
    INTERPRETED,
    Tiles,
    offsets,
    padded,
    parts,
    splits_of,
    tiles,
    unsupported,
)

__all__ = [
    "absorbed_triton",
    "arch_of",
    "latent_mean",
    "latent_mean_torch",
    "unavailable",
    "unsupported",
]


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device, in a sentence; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "absorbed_triton needs Triton, which is not installed: pip install 'mla-study[gpu]'"
    if device.type == "cpu" and _interpreted():
        return None
    if device.type != "cuda":
        return (
            f"absorbed_triton computes on a CUDA GPU, but these tensors are on '{device}': "
            "move them, or take the form 'absorbed'"
        )
    return None


def _interpreted() -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernels().latent_attention, InterpretedFunction)


def kernels() -> Any:
    """The module of the Triton source; UserError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise UserError(str(unavailable(torch.device("cpu"))))
    from mla_study.kernels.latent_attention import triton_kernel

    return triton_kernel


def latent_mean_torch(
    q_lat: Tensor, q_rope: Tensor, c: Cached, k_rope: Cached, scale: float, rotation: Tensor | None
) -> Tensor:
    """What :func:`latent_mean` computes, by the PyTorch operations of ``absorbed``.

    Its gradients are the kernel's: the fall-back that recomputes in the backward.
    """
    batch, queries, heads, d_c = q_lat.shape
    latent, key = c.floating(q_lat.dtype), k_rope.floating(q_lat.dtype)
    if rotation is not None:
        key = rotated_keys(key, rotation)
    query = torch.cat([q_lat, q_rope], dim=-1).reshape(batch, 1, queries * heads, -1)
    cached = torch.cat([latent, key], dim=-1)[:, None]
    mean = F.scaled_dot_product_attention(query, cached, cached, scale=scale)[..., :d_c]
    return mean.reshape(batch, queries, heads, d_c)


@dataclass(frozen=True)
class _How:
    """Everything but the tensors that gradients reach."""

    scale: float
    rotation: Tensor | None
    c_scales: Tensor | None
    k_scales: Tensor | None
    rotate_inside: bool | None
    shape: Tiles | None
    splits: int | None

    def cached(self, c: Tensor, k_rope: Tensor) -> tuple[Cached, Cached]:
        return Cached.of("c", c, self.c_scales), Cached.of("k_rope", k_rope, self.k_scales)


class _LatentMean(torch.autograd.Function):
    """The kernel forward; backward through :func:`latent_mean_torch` on the saved inputs."""

    @staticmethod
    def forward(
        ctx: Any, q_lat: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, how: _How
    ) -> Tensor:
        ctx.save_for_backward(q_lat, q_rope, c, k_rope)
        ctx.how = how
        return _launch(q_lat, q_rope, *how.cached(c, k_rope), how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        leaves = [
            x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        with torch.enable_grad():
            cached = how.cached(leaves[2], leaves[3])
            out = latent_mean_torch(leaves[0], leaves[1], *cached, how.scale, how.rotation)
        wanted = [x for x in leaves if x.requires_grad]
        got = iter(torch.autograd.grad(out, wanted, grads[0]))
        return (*(next(got) if x.requires_grad else None for x in leaves), None)


def _launch(q_lat: Tensor, q_rope: Tensor, c: Cached, k_rope: Cached, how: _How) -> Tensor:
    source = kernels()
    batch, queries, heads, d_c = q_lat.shape
    d_rope, rows, keys = q_rope.shape[-1], queries * heads, c.data.shape[1]
    q_lat, q_rope = _rows(q_lat), _rows(q_rope)
    held = torch.int8 if c.scheme != "none" else q_lat.dtype
    shape = how.shape or tiles(arch_of(q_lat.device), d_c, d_rope, held, rows)
    row_tiles = math.ceil(rows / shape.BM)
    splits, split_keys = splits_of(
        row_tiles * batch, keys, shape.BN, _processors(q_lat.device), how.splits
    )
    rotation, inside = how.rotation, False
    if rotation is not None and d_rope:
        inside = row_tiles == 1 and d_rope <= 32
        inside = inside if how.rotate_inside is None else how.rotate_inside
        if not inside:
            turned = rotated_keys(k_rope.floating(q_lat.dtype), rotation)
            k_rope = Cached.of("k_rope", turned, None)
    cis = q_rope if not inside or rotation is None else _table(rotation)
    out = q_lat.new_empty(batch, queries, heads, d_c)
    mean, lse = out, out
    if splits > 1:
        mean = out.new_empty(splits, batch, rows, d_c, dtype=torch.float32)
        lse = mean.new_empty(splits, batch, rows)
    widths = parts(d_c, shape.widest, shape.narrowest)
    with torch.cuda.device_of(q_lat):
        source.latent_attention[(row_tiles, splits, batch)](
            q_lat, q_rope, c.data, k_rope.data, cis, c.scales, k_rope.scales, mean, lse,
            how.scale * math.log2(math.e), rows, keys, heads, split_keys,
            max(c.frame_tokens, 1), max(k_rope.frame_tokens, 1),
            *q_lat.stride()[:3], *q_rope.stride()[:3],
            *c.data.stride()[:2], *k_rope.data.stride()[:2], cis.stride(0),
            *c.scale_steps, *k_rope.scale_steps,
            PARTS=widths, OFFSETS=offsets(widths), D_C=d_c, D_ROPE=d_rope, W_ROPE=padded(d_rope),
            ROTATE=inside, C_SCALING=c.scaling(shape.BN), K_SCALING=k_rope.scaling(shape.BN),
            SPLIT=splits > 1, BM=shape.BM, BN=shape.BN,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        if splits > 1:
            source.combine[(batch * rows,)](
                mean, lse, out, batch * rows, splits, D_C=d_c, WIDTH=2 ** (d_c - 1).bit_length()
            )
    return out


def _table(rotation: Tensor) -> Tensor:
    """cos and sin [K, P, 2] in float32, without a copy where they are that already."""
    return torch.view_as_real(rotation.to(torch.complex64).resolve_conj())


def _rows(q: Tensor) -> Tensor:
    """Queries with neighbouring channels; their other strides are free."""
    return q if q.stride(-1) == 1 else q.contiguous()


def arch_of(device: torch.device) -> int:
    """Compute capability (90 for sm_90); INTERPRETED for what is no CUDA device."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _processors(device: torch.device) -> int:
    """Programs that run side by side; one in the interpreter, which runs them in turn."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def latent_mean(
    q_lat: Float[Tensor, "B M H dc"],
    q_rope: Float[Tensor, "B M H dr"],
    c: Float[Tensor, "B K dc"] | Float[Tensor, "B F T dc"] | Int8[Tensor, "B F T dc"],
    k_rope: Float[Tensor, "B K dr"] | Float[Tensor, "B F T dr"] | Int8[Tensor, "B F T dr"],
    scale: float,
    *,
    rotation: Complex[Tensor, "K P"] | None = None,
    c_scales: Tensor | None = None,
    k_scales: Tensor | None = None,
    rotate_inside: bool | None = None,
    shape: Tiles | None = None,
    splits: int | None = None,
) -> Float[Tensor, "B M H dc"]:
    """softmax(scale (q_lat . c + q_rope . R k_rope)) c: the weighted mean latent of every query.

    The inner part of ``absorbed`` (README.md, "Why they are one function"); W_V_up is left to the
    caller. ``c`` and ``k_rope`` may be views into a ring: any strides but that of the channels.
    Gradients reach every floating input; the backward recomputes by PyTorch operations.

    Args:
        q_lat: q_nope W_K_up, float16 or bfloat16 (float32 too in the interpreter).
        scale: 1 / sqrt(d_nope + d_rope).
        rotation: cos + i sin of every key, to turn an unrotated ``k_rope``; None: it is rotated.
        c_scales, k_scales: scales of an int8 cache, [B, F, T, 1] or [B, F, 1, channels].
        rotate_inside: in the kernel, or by PyTorch before it; None: inside where the rows fit one
            tile, so that no key is turned twice.
        shape: tile sizes; None: those of the table (``triton_tiles.tiles``).
        splits: parts of the keys that run side by side; None: enough to fill the GPU.

    Raises:
        UserError: no Triton or no GPU, sizes or dtypes that it does not take, strides that would
            need a copy.
    """
    how = _How(scale, rotation, c_scales, k_scales, rotate_inside, shape, splits)
    cached = how.cached(c, k_rope)
    _check(q_lat, q_rope, *cached, rotation)
    return cast(Tensor, _LatentMean.apply(q_lat, q_rope, c, k_rope, how))


def _check(
    q_lat: Tensor, q_rope: Tensor, c: Cached, k_rope: Cached, rotation: Tensor | None
) -> None:
    sizes = (q_lat.shape[-1], q_rope.shape[-1], q_lat.dtype, c.data.shape[1])
    reason = unavailable(q_lat.device)
    reason = reason or unsupported(*sizes, arch_of(q_lat.device), c.scheme != "none")
    if reason:
        raise UserError(reason)
    keys, pairs = c.data.shape[1], q_rope.shape[-1] // 2
    if k_rope.data.shape[:2] != c.data.shape[:2]:
        raise UserError(
            f"c holds {list(c.data.shape[:2])} samples and keys, but k_rope "
            f"{list(k_rope.data.shape[:2])}"
        )
    if rotation is not None and (rotation.shape != (keys, pairs) or rotation.stride(-1) != 1):
        raise UserError(
            f"the rotation {list(rotation.shape)} must hold {keys} keys of {pairs} pairs, "
            "neighbours in memory"
        )
    for name, cached in (("c", c), ("k_rope", k_rope)):
        if keys * cached.data.stride(1) >= 2**31:
            raise UserError(f"{name} spans 2^31 elements or more a sample: use fewer keys")
        if cached.scheme == "none" and cached.data.dtype != q_lat.dtype:
            raise UserError(f"{name} is {cached.data.dtype}, but the queries are {q_lat.dtype}")
    tensors = (q_rope, c.data, c.scales, k_rope.data, k_rope.scales, rotation)
    if any(x is not None and x.device != q_lat.device for x in tensors):
        raise UserError("queries, cache, scales and rotation must lie on one device")


def absorbed_triton(
    q_nope: Float[Tensor, "B M H dn"],
    q_rope: Float[Tensor, "B M H dr"],
    c: Float[Tensor, "B K dc"],
    k_rope: Float[Tensor, "B K dr"],
    k_up: Float[Tensor, "H dn dc"],
    v_up: Float[Tensor, "H dv dc"],
) -> Float[Tensor, "B M H dv"]:
    """The function of :func:`~mla_study.kernels.latent_attention.absorbed.absorbed`, fused.

    Raises:
        UserError: as :func:`latent_mean`.
    """
    latent = torch.einsum("bmhn,hnc->bmhc", q_nope, k_up)
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    mean = latent_mean(latent, q_rope, c, k_rope, scale)
    return torch.einsum("bmhc,hvc->bmhv", mean, v_up)
