"""One read-only view over a checkpoint of any format: peeled names, scaled fp8, merged adapters.

A :class:`Checkpoint` is cheap to open and to open again in another process; only the tensors that
are asked for are read. Names are shown without the wrappers of trainers (``module.``, ``_orig_mod``,
``_fsdp_wrapped_module``, ``model.`` ...).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mla_study.checkpoints.container import Container, TensorInfo, open_container
from mla_study.checkpoints.locate import Located, locate, read_json
from mla_study.errors import UserError

_INNER = re.compile(r"(^|\.)(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)(?=\.)")
_OUTER = re.compile(
    r"^(module|model|base_model|diffusion_model|state_dict|generator|generator_ema|net_g|_forward_module)\."
)
_SCALE_SUFFIXES = ("weight_scale_inv", "weight_scale", "scale_weight")


def peel(name: str) -> str:
    """A tensor's name without the prefixes that trainers and wrappers put before it."""
    previous = None
    while name != previous:
        previous = name
        name = _INNER.sub("", name).lstrip(".")
        name = _OUTER.sub("", name)
    return name


def peel_all(names: list[str]) -> dict[str, str]:
    """Peeled name -> stored name; where two would collide, both keep their stored names."""
    peeled: dict[str, list[str]] = {}
    for name in names:
        peeled.setdefault(peel(name), []).append(name)
    return {
        short if len(stored) == 1 else name: name
        for short, stored in peeled.items()
        for name in stored
    }


@dataclass(frozen=True)
class OpenSpec:
    """What :func:`open_checkpoint` was called with; picklable, so that workers open it again."""

    path: str
    weights: str | None = None
    config: str | None = None
    base: str | None = None


class Checkpoint:
    """Tensors of one checkpoint under peeled names.

    Attributes:
        spec: how to open it again.
        tensors: name -> :class:`TensorInfo` (stored shape and dtype).
        config: the JSON config that describes it, or None.
        notes: sentences about choices made while opening.
    """

    def __init__(
        self,
        spec: OpenSpec,
        located: Located,
        containers: list[Container],
        config: dict[str, Any] | None,
        config_path: str | None,
    ) -> None:
        self.spec = spec
        self.files = located.files
        self.config = config
        self.config_path = config_path
        self.notes = list(located.notes) + [n for c in containers for n in c.notes]
        self._containers = containers
        self._where: dict[str, tuple[Container, str]] = {}
        stored: dict[str, Container] = {}
        for container in containers:
            for name in container.tensors:
                if name in stored:
                    raise UserError(
                        f"{spec.path}: tensor {name!r} stands in two of its files: remove one"
                    )
                stored[name] = container
        if located.weight_map is not None:
            _check_index(located, containers)
        self._where = {
            short: (stored[name], name) for short, name in peel_all(list(stored)).items()
        }
        self.tensors: dict[str, TensorInfo] = {
            short: container.tensors[name] for short, (container, name) in self._where.items()
        }
        self._noted_fp8 = False

    @property
    def format(self) -> str:
        """safetensors, torch, gguf or onnx."""
        return self._containers[0].format

    @property
    def metadata(self) -> Mapping[str, object]:
        """Metadata of the first file (GGUF keys, safetensors strings)."""
        return self._containers[0].metadata

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from all files so far."""
        return sum(c.bytes_read for c in self._containers)

    @property
    def fingerprint(self) -> str:
        """A cheap identity of the files: sizes and times, or ETags."""
        text = "\n".join(c.fingerprint for c in self._containers)
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor as float32 or float64, fp8 scales applied."""
        container, stored = self._where[name]
        values = container.read(stored, start, stop)
        if self.tensors[name].dtype.startswith("F8_E") and values.ndim >= 2:
            values = self._scaled(name, values, start)
        return values

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(up [m, r], down [r, n]) where the tensor is stored as a product, else None."""
        del name
        return None

    def raw_sha256(self, name: str) -> str:
        """sha256 (hex) of the stored bytes that the tensor is made of."""
        container, stored = self._where[name]
        return container.raw_sha256(stored)

    def close(self) -> None:
        """Close every file."""
        for container in self._containers:
            container.close()

    @cached_property
    def _announces_scales(self) -> bool:
        if any(name.endswith(_SCALE_SUFFIXES) or name == "scaled_fp8" for name in self.tensors):
            return True
        quantization = (self.config or {}).get("quantization_config")
        return isinstance(quantization, dict) and "fp8" in str(quantization.get("quant_method"))

    def _scaled(self, name: str, values: np.ndarray, start: int) -> np.ndarray:
        stem = name.removesuffix(".weight")
        scale_name = next(
            (s for s in (f"{stem}.{suffix}" for suffix in _SCALE_SUFFIXES) if s in self.tensors),
            None,
        )
        if scale_name is None:
            if self._announces_scales:
                raise UserError(
                    f"{self.spec.path}: tensor {name!r} is fp8 and the file announces scales, but "
                    f"{stem}.{_SCALE_SUFFIXES[1]} is missing: get the complete file"
                )
            return values
        scale = self.read(scale_name)
        if not np.isfinite(scale).all():
            raise UserError(f"{self.spec.path}: the fp8 scale {scale_name!r} holds NaN or Inf")
        return values * self._expanded(scale, scale_name, name, values, start)

    def _expanded(
        self, scale: np.ndarray, scale_name: str, name: str, values: np.ndarray, start: int
    ) -> np.ndarray:
        """Scales of a tensor, a row or a block, broadcast to rows [start, start + len(values))."""
        rows, columns = self.tensors[name].shape[0], int(np.prod(self.tensors[name].shape[1:]))
        shape = (len(values),) + (1,) * (values.ndim - 1)
        if scale.size == 1:
            return scale.reshape(())
        if scale.size == rows:
            return scale.reshape(-1)[start : start + len(values)].reshape(shape)
        if scale.ndim == 2 and values.ndim == 2:
            block = (self.config or {}).get("quantization_config", {}).get("weight_block_size")
            sizes = block if isinstance(block, list) and len(block) == 2 else [128, 128]
            if [-(-rows // int(sizes[0])), -(-columns // int(sizes[1]))] != list(scale.shape):
                sizes = [-(-rows // scale.shape[0]), -(-columns // scale.shape[1])]
            row_block = np.arange(start, start + len(values)) // int(sizes[0])
            column_block = np.arange(columns) // int(sizes[1])
            if row_block.max() < scale.shape[0] and column_block.max() < scale.shape[1]:
                return scale[row_block][:, column_block]
        raise UserError(
            f"{self.spec.path}: the fp8 scale {scale_name!r} has shape {list(scale.shape)}, which "
            f"does not fit tensor {name!r} of shape {list(self.tensors[name].shape)}"
        )

    def note_plain_fp8(self, names: list[str]) -> None:
        """Remark once that fp8 weights without scales were read as they are."""
        plain = [n for n in names if self.tensors[n].dtype.startswith("F8_E")]
        if plain and not self._announces_scales and not self._noted_fp8:
            self._noted_fp8 = True
            self.notes.append(
                f"{len(plain)} attention tensors are {self.tensors[plain[0]].dtype} and the file "
                "announces no scales: read as a plain cast."
            )


def _check_index(located: Located, containers: list[Container]) -> None:
    by_path = dict(zip(located.files, containers, strict=True))
    for tensor, file in (located.weight_map or {}).items():
        if tensor not in by_path[file].tensors:
            raise UserError(
                f"{located.index} says that tensor {tensor!r} lies in {file}, but it does not: "
                "the shards and the index do not belong together"
            )


def open_checkpoint(
    spec: OpenSpec | str, on_bytes: Callable[[int], None] | None = None
) -> Checkpoint:
    """Open any checkpoint for reading; raises :class:`UserError` for whatever is wrong with it.

    ``spec.config`` names a config that replaces the one beside the weights; ``spec.base`` the dense
    checkpoint that a LoRA file is merged into.
    """
    from mla_study.checkpoints.lora import LoraCheckpoint, is_lora

    if isinstance(spec, str):
        spec = OpenSpec(spec)
    located = locate(spec.path)
    containers = [open_container(f, weights=spec.weights, on_bytes=on_bytes) for f in located.files]
    config, config_path = located.config, located.config_path
    if spec.config is not None:
        config, config_path = read_json(spec.config), spec.config
    checkpoint = Checkpoint(spec, located, containers, config, config_path)
    if is_lora(checkpoint.tensors):
        base = open_checkpoint(OpenSpec(spec.base), on_bytes) if spec.base else None
        return LoraCheckpoint(checkpoint, base)
    if spec.base is not None:
        raise UserError(f"{spec.path} holds no LoRA tensors, so --base has nothing to merge into")
    return checkpoint
