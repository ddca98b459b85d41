"""Projections in fp8 (e4m3) by the matrix units of recent GPUs: half the bytes, twice the rate.

Shapes: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mla_study.errors import UserError
from mla_study.model.transformer import WanTransformer

FP8 = torch.float8_e4m3fn
FP8_LAYERS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "self_attn.q_down",
    "self_attn.kv_down", "self_attn.q_up", "self_attn.q_rope", "cross_attn.q", "cross_attn.o",
    "ffn.0", "ffn.2",
)  # fmt: skip
"""Projections that fp8 takes over. k_up and v_up are read by the attention kernels as matrices, the
shared rotary key stays exact, and the text's keys are made once a prompt."""


class Fp8Linear(nn.Module):
    """x W^T + b in e4m3, a scale a token and a scale an output, summed in float32.

    Weights are rounded once, activations at each call by their largest magnitude.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        data, scale = quantize_rows(weight)
        self.register_buffer("weight", data)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """Project."""
        data, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        # row-wise scales ask for bf16 out on a GPU
        out = torch._scaled_mm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            data, cast(Tensor, self.weight).T, scale, cast(Tensor, self.scale),
            out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda,
        )  # fmt: skip
        out = out.to(x.dtype) if self.bias is None else out.to(x.dtype) + self.bias
        return out.unflatten(0, x.shape[:-1])


def quantize_rows(x: Float[Tensor, "M K"]) -> tuple[Tensor, Float[Tensor, "M one"]]:
    """Rows in e4m3, and the float32 scale [M, 1] that takes each back."""
    top = torch.finfo(FP8).max
    scale = (x.abs().amax(1, keepdim=True).float() / top).clamp_min(1e-12)
    return (x.float() / scale).clamp(-top, top).to(FP8), scale


def to_fp8(model: WanTransformer) -> list[str]:
    """Replace the projections of :data:`FP8_LAYERS` in every block, in place; their names.

    A projection whose sizes are no multiples of 16 stays, for the matrix units ask for those.
    """
    done: list[str] = []
    for name, module in list(model.blocks.named_modules()):
        if not isinstance(module, nn.Linear) or name.partition(".")[2] not in FP8_LAYERS:
            continue
        if module.in_features % 16 or module.out_features % 16:
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(model.blocks.get_submodule(owner), leaf, Fp8Linear(module))
        done.append(name)
    return done


def require_fp8(device: torch.device) -> None:
    """UserError where the device has no fp8 matrix units."""
    if device.type != "cuda":
        raise UserError("fp8 needs a GPU with fp8 matrix units (compute capability 8.9 or later), "
                        f"and this model is on {device.type}: leave out --fp8")  # fmt: skip
    found = torch.cuda.get_device_capability(device)
    if found < (8, 9):
        raise UserError(
            f"fp8 needs compute capability 8.9 or later, and {torch.cuda.get_device_name(device)} "
            f"has {found[0]}.{found[1]}: leave out --fp8"
        )
