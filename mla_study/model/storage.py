"""How cache entries are kept: in a floating-point dtype, or in int8 with their scales.

Shapes: B batch, F slots, n frames of them, T tokens of a frame, then channel axes.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from mla_study.model.quantize import (
    SCALE_DTYPE,
    Quantized,
    Scheme,
    dequantize,
    quantize,
    scale_shape,
)

Storage = Literal["bf16", "fp16", "fp32", "fp64", "int8-channel", "int8-token"]
NAMES: dict[torch.dtype, Storage] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}
SCHEMES: dict[str, Scheme] = {"int8-channel": "channel", "int8-token": "token"}


def stored(values: Tensor, storage: Storage) -> Tensor:
    """Entries [B, F, T, *channels] as a cache of ``storage`` gives them back, in their dtype."""
    if storage in SCHEMES:
        return dequantize(quantize(values, SCHEMES[storage]), values.dtype)
    return values.to(DTYPES[storage]).to(values.dtype)


class _Stored(torch.autograd.Function):
    """What :func:`stored` does, with the gradient passed straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, storage: Storage) -> Tensor:
        return stored(values, storage)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def rounded(values: Tensor, storage: Storage) -> Tensor:
    """:func:`stored` where gradients flow."""
    if DTYPES.get(storage) == values.dtype:
        return values
    return cast(Tensor, _Stored.apply(values, storage))


class Slots:
    """Storage of one of a layer's two tensors, plain or int8 with scales."""

    def __init__(
        self, batch: int, frames: int, tokens: int, shape: tuple[int, ...], storage: Storage,
        device: torch.device,
    ) -> None:  # fmt: skip
        full = (batch, frames, tokens, *shape)
        self.scheme: Scheme | None = SCHEMES.get(storage)
        self.scales: Tensor | None = None
        # a buffer born in inference mode could never be written outside of it
        with torch.inference_mode(False):
            dtype = torch.int8 if self.scheme else DTYPES[storage]
            self.data = torch.zeros(full, dtype=dtype, device=device)
            if self.scheme is not None:
                shape = scale_shape(full, self.scheme)
                self.scales = torch.zeros(shape, dtype=SCALE_DTYPE, device=device)

    def write(self, where: slice, values: Tensor) -> None:
        """Put frames [B, n, T, ...] into slots."""
        if self.scheme is None or self.scales is None:
            self.data[:, where] = values
            return
        packed = quantize(values, self.scheme)
        self.data[:, where] = packed.data
        self.scales[:, where] = packed.scales

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for held in self.tensors():
            held[:, target] = held[:, source]

    def read(self, where: slice, dtype: torch.dtype) -> Tensor:
        """Frames [B, n, T, ...] in ``dtype``; a view where nothing needs unpacking."""
        data = self.data[:, where]
        if self.scheme is None or self.scales is None:
            return data.to(dtype)
        return dequantize(Quantized(data, self.scales[:, where]), dtype)

    def tensors(self) -> list[Tensor]:
        """Data, and scales where there are any."""
        return [self.data] if self.scales is None else [self.data, self.scales]
