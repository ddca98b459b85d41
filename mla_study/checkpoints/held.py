"""Tensors that a program holds, in the form of a weight file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mla_study.checkpoints.formats.container import TensorInfo
from mla_study.checkpoints.locate import Located
from mla_study.checkpoints.reader import Checkpoint, OpenSpec

if TYPE_CHECKING:
    from torch import Tensor


class Held:
    """A state dict as a :class:`~mla_study.checkpoints.formats.container.Container`.

    Nothing is copied: a tensor is read as it is at that moment, wherever it lies.
    """

    format = "torch"

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.path = name
        self.metadata: Mapping[str, object] = {}
        self.notes: list[str] = []
        self.bytes_read = 0
        self._tensors = tensors
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(
                key,
                tuple(value.shape),
                str(value.dtype).removeprefix("torch."),
                value.numel() * value.element_size(),
            )
            for key, value in tensors.items()
        }

    @property
    def fingerprint(self) -> str:
        """sha256 over all tensors: what is held may change."""
        return hashlib.sha256("".join(map(self.raw_sha256, self._tensors)).encode()).hexdigest()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop), float32, or float64 where the tensor is; a view where it can be."""
        import torch

        value = self._tensors[name].detach()[start:stop]
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        return value.to("cpu", dtype).numpy()

    def raw_sha256(self, name: str) -> str:
        """sha256 (hex) of the values as :meth:`read` gives them."""
        return hashlib.sha256(np.ascontiguousarray(self.read(name)).data).hexdigest()

    def close(self) -> None:
        """Nothing is open."""


def checkpoint_of(tensors: Mapping[str, Tensor], name: str) -> Checkpoint:
    """A state dict as a checkpoint that is called ``name`` in messages."""
    return Checkpoint(OpenSpec(name), Located((name,)), [Held(tensors, name)], None, None)
