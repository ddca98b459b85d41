"""Torch tensors out of a checkpoint: mapped as they are stored, or filled panel by panel.

A mapped tensor costs no memory of its own: its pages are the file's, private to the process once
they are written to. Every one has a storage of its own, so that ``torch.save`` writes no more.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mla_study.checkpoints.formats.container import Container, TensorInfo, shown
from mla_study.checkpoints.formats.dtypes import all_finite
from mla_study.checkpoints.formats.safetensors_file import SafetensorsFile
from mla_study.checkpoints.formats.torch_file import TorchFile
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAPPED = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in _MAPPED.items()}
_SPOKEN = {
    "float64": torch.float64,
    "fp64": torch.float64,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
_PANEL = 1 << 21  # elements
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL", "C64", "F4")


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``bf16``, ``float32`` ... or a dtype itself; raises UserError for any other."""
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else _SPOKEN.get(dtype.lower())
    if found not in DTYPES.values():
        raise UserError(f"dtype {dtype} is not known here: give fp32, bf16, fp16 or fp64")
    return found


def refuse_integers(info: TensorInfo, path: str) -> None:
    """Raise UserError for integers, which are no weights without the rule that made them."""
    if info.dtype.startswith(_INTEGERS):
        raise UserError(
            f"{path}: tensor {shown(info.name)} is {info.dtype}, which is no weight by itself: "
            "get the file in bf16, fp16, fp32 or fp8"
        )


def stored_in(checkpoint: Checkpoint, name: str) -> tuple[Container, str]:
    """The container that holds a tensor, and its name there, prefixes included."""
    return checkpoint._where[name]  # pyright: ignore[reportPrivateUsage]


class Mapper:
    """Maps the tensors of local safetensors and PyTorch files."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def __call__(self, container: Container, stored: str) -> Tensor | None:
        """The tensor as stored, or None where it cannot be mapped (remote, GGUF, odd offset)."""
        info = container.tensors[stored]
        dtype = _MAPPED.get(info.dtype)
        if dtype is None:
            return None
        if isinstance(container, TorchFile):
            return container.tensor(stored)
        if isinstance(container, SafetensorsFile) and not container.remote:
            start, stop = container.extent(stored)
            if start == stop or start % dtype.itemsize:
                return None
            pages, count = self._map(container.path), math.prod(info.shape)
            flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=start)
            return flat.reshape(info.shape)
        return None

    def release(self, container: Container, stored: str) -> None:
        """Let go of the resident pages of a tensor that was read and not changed."""
        if isinstance(container, SafetensorsFile) and container.path in self._maps:
            start, stop = container.extent(stored)
            start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = stop // mmap.PAGESIZE * mmap.PAGESIZE - start
            if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
                self._maps[container.path].madvise(mmap.MADV_DONTNEED, start, length)

    def _map(self, path: str) -> mmap.mmap:
        if path not in self._maps:
            try:
                with Path(path).open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise UserError(f"{path} cannot be mapped ({error.strerror}): copy it") from None
        return self._maps[path]


def raw_pieces(checkpoint: Checkpoint, name: str) -> Iterator[bytes | memoryview] | None:
    """A tensor's stored bytes, piece by piece; None where the format has no plain ones (GGUF)."""
    container, stored = stored_in(checkpoint, name)
    if isinstance(container, SafetensorsFile | TorchFile):
        return iter(container.raw(stored))
    return None


def panels(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Rows of a tensor in ``dtype``, with their first index; a few MB at a time."""
    shape = checkpoint.tensors[name].shape
    if not shape:
        value = float(checkpoint.read(name).reshape(()))
        yield 0, torch.tensor([value], dtype=torch.float64).to(dtype)
        return
    step = max(1, _PANEL // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        values = checkpoint.read(name, start, min(shape[0], start + step))
        yield start, _from_numpy(values).to(dtype)


def _from_numpy(values: object) -> Tensor:
    import numpy as np

    array = np.ascontiguousarray(values)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def filled(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, mapper: Mapper | None = None
) -> Tensor:
    """A tensor of its own in ``dtype``: one copy, and a few MB on the way.

    With a ``mapper`` plain tensors are read from the file's pages, which is faster.
    """
    info = checkpoint.tensors[name]
    shape = info.shape
    out = torch.empty(shape, dtype=dtype)
    if mapper is not None and info.dtype in DTYPES:
        place = stored_in(checkpoint, name)
        found = mapper(*place)
        if found is not None:
            out.copy_(found)
            mapper.release(*place)
            return out
    rows = out if shape else out.reshape(1)
    for start, panel in panels(checkpoint, name, dtype):
        rows[start : start + len(panel)] = panel
    return out


def require_finite(raw: bytes | memoryview, dtype: str, name: str, path: str) -> None:
    """Raise UserError that names the tensor where stored bytes hold NaN or Inf."""
    if not all_finite(raw, dtype):
        raise UserError(
            f"{path}: tensor {shown(name)} holds NaN or Inf: get an undamaged file, or a "
            "checkpoint from before training diverged"
        )


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
