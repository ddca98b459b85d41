"""Adapters put onto a Wan model's weights, whichever of the two namings each of them is in."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mla_study.checkpoints.formats.container import TensorInfo
from mla_study.checkpoints.formats.opening import open_container
from mla_study.checkpoints.locate import locate
from mla_study.checkpoints.lora import LoraCheckpoint
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.reader import Checkpoint, OpenSpec
from mla_study.checkpoints.wan.names import to_diffusers
from mla_study.checkpoints.wan.native import NAMES, as_bytes, require_finite
from mla_study.errors import UserError

_DIFFUSERS = re.compile(r"[._]attn[12][._]|ffn[._]net[._]|condition_embedder|proj_out")
_ROWS = 1 << 21  # elements of a panel


class _Zeros(Checkpoint):
    """A base of zeros: merged into it, an adapter is seen as what it adds."""

    def __init__(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.spec = OpenSpec(path)
        self.files = ()
        self.config = self.config_path = None
        self.notes = []
        self._containers = []
        self.tensors = {name: TensorInfo(name, shape, "F32", 0) for name, shape in shapes.items()}
        self.last: np.ndarray | None = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Zeros that take no memory."""
        shape = self.tensors[name].shape
        rows = len(range(*slice(start, stop).indices(shape[0])))
        self.last = np.broadcast_to(np.float32(0), (rows, *shape[1:]))
        return self.last


class Addition:
    """What one adapter adds to each weight of a model in original names.

    Args:
        path: the adapter: peft, kohya or diffusers names, of original Wan's or diffusers' modules.
        shapes: shapes of the model's parameters by original name.
        strength: factor on everything that it adds.

    Raises:
        UserError: no adapter, one for another base, or one of a kind that is not read here.
    """

    def __init__(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], strength: float = 1.0
    ) -> None:
        self.path, self.strength = path, strength
        alone = open_checkpoint(OpenSpec(path))
        if not isinstance(alone, LoraCheckpoint):
            alone.close()
            raise UserError(f"{path} holds no LoRA tensors: give an adapter file")
        theirs = any(_DIFFUSERS.search(name) for name in alone.tensors)
        alone.close()
        names = {name: to_diffusers(name) if theirs else name for name in shapes}
        self._names = {name: other for name, other in names.items() if other is not None}
        self._zeros = _Zeros("the model", {o: shapes[n] for n, o in self._names.items()})
        located = locate(path)
        containers = [open_container(file) for file in located.files]
        adapter = Checkpoint(
            OpenSpec(path), located, containers, located.config, located.config_path
        )
        self._lora = LoraCheckpoint(adapter, self._zeros)

    def touches(self, name: str) -> bool:
        """Whether the adapter changes a weight."""
        other = self._names.get(name)
        if other is None or not self._zeros.tensors[other].shape:
            return False
        return self._lora.read(other, 0, 1) is not self._zeros.last

    def add_to(self, name: str, weight: Tensor) -> Tensor:
        """The weight with the product added, a new tensor of its dtype; float32 sums at least."""
        other = self._names[name]
        merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
        step = max(1, _ROWS // max(1, weight[:1].numel()))
        for start in range(0, weight.shape[0], step):
            stop = min(weight.shape[0], start + step)
            delta = torch.from_numpy(
                np.multiply(self._lora.read(other, start, stop), self.strength, dtype=np.float64)
            )
            merged[start:stop] = (weight[start:stop].double() + delta).to(weight.dtype)
        require_finite(as_bytes(merged), NAMES[merged.dtype], name, self.path)
        return merged

    def close(self) -> None:
        """Close the adapter's files."""
        self._lora.close()
