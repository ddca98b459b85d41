"""One read-only view over a checkpoint of any format: peeled names, scaled fp8, merged adapters.

A :class:`Checkpoint` is cheap to open and to open again in another process; only the tensors that
are asked for are read. Names are shown without the wrappers of trainers (``module.``,
``_orig_mod``, ``_fsdp_wrapped_module``, ``model.`` ...).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from mla_study.checkpoints.formats.container import Container, TensorInfo
from mla_study.checkpoints.locate import Located
from mla_study.errors import UserError

_INNER = re.compile(
    r"(?:^|(?<=\.))(?:(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|base_layer)\.)+"
)
_OUTER = re.compile(
    r"^(?:(?:module|model|base_model|diffusion_model|state_dict|generator|generator_ema|student|net"
    r"|net_g|ema|ema_model|model_ema|_forward_module)\.)+"
)
# Which of two flattened sets of weights is read, the live network before its running average.
_SETS = ("generator", "student", "net_g", "net", "model", "module", "generator_ema", "ema",
         "ema_model", "model_ema")  # fmt: skip
_SCALE_SUFFIXES = ("weight_scale_inv", "weight_scale", "scale_weight")
_FP8 = ("F8_E4M3", "F8_E5M2")
_BLOCK_SIZES = [1 << k for k in range(4, 13)]


def _split(name: str) -> tuple[str, str]:
    """Wrappers before a name, and the name without them."""
    bare = _INNER.sub("", name)
    short = bare.lstrip(".")
    wrapped = _OUTER.match(short)
    outer = wrapped[0] if wrapped else ""
    inner = "".join(_INNER.findall(name)) if len(bare) < len(name) else ""
    return outer + inner + "." * (len(bare) - len(short)), short[len(outer) :]


def peel(name: str) -> str:
    """A tensor's name without the prefixes that trainers and wrappers put before it."""
    return _split(name)[1]


def peel_all(names: Iterable[str], weights: str | None = None) -> tuple[dict[str, str], str | None]:
    """Peeled name -> stored name, and the set of weights that was chosen among several.

    Where two sets of weights in one file (``generator.``, ``generator_ema.``) have the same peeled
    names, ``weights`` or the order of preference says which is read; other names that would
    collide stay as they are stored, with all that have the same wrappers.
    """
    split = {name: _split(name) for name in names}
    sets: dict[str, list[str]] = {}
    for name, (wrapper, _) in split.items():
        sets.setdefault(wrapper, []).append(name)
    chosen = None
    taken: dict[str, str] = {}
    clashing: set[str] = set()
    for wrapper, short in split.values():
        other = taken.setdefault(short, wrapper)
        if other != wrapper or not short:
            clashing |= {other, wrapper}
    if weights is not None:
        fits = [w for w in sets if weights in w.split(".")]
        if fits and len(fits) < len(sets):
            return {split[n][1] or n: n for w in fits for n in sets[w]}, weights
    if clashing and all(w.split(".")[0] in _SETS for w in clashing):
        ranked = sorted(clashing, key=lambda w: (_rank(w), w))
        if _rank(ranked[0]) != _rank(ranked[1]):
            chosen = ranked[0].rstrip(".")
            split = {n: both for n, both in split.items() if both[0] not in ranked[1:]}
            clashing = set()
    return {
        name if wrapper in clashing else short or name: name
        for name, (wrapper, short) in split.items()
    }, chosen


def _rank(wrapper: str) -> int:
    return min(_SETS.index(part) for part in wrapper.split(".") if part in _SETS)


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
        self.adapter_config = located.adapter_config
        self._containers = containers
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
        torch = any(c.format == "torch" for c in containers)  # has chosen its dictionary itself
        peeled, chosen = peel_all(stored, None if torch else spec.weights)
        notes = [n for c in containers for n in c.notes]
        if chosen is not None and spec.weights is not None:
            notes = [n for n in notes if not n.endswith(f"'{chosen}' is ignored.")]
        elif chosen is not None:
            notes.append(
                f"{spec.path} holds several sets of weights: {chosen!r} is read; "
                "--weights NAME chooses another."
            )
        self.notes = [*located.notes, *notes]
        self._where = {short: (stored[name], name) for short, name in peeled.items()}
        self.tensors: dict[str, TensorInfo] = {
            short: container.tensors[name] for short, (container, name) in self._where.items()
        }
        self._noted_fp8 = False
        self._scales: dict[str, np.ndarray] = {}

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
        text = "\n".join([*(c.fingerprint for c in self._containers), str(self._quantization)])
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor as float32 or float64, fp8 scales applied."""
        container, stored = self._where[name]
        values = container.read(stored, start, stop)
        if self._is_fp8_weight(name):
            values = self._scaled(name, values, start)
        return values

    @property
    def holds_base_layers(self) -> bool:
        """Whether layers are stored together with adapters that are not merged (peft)."""
        return any(".base_layer." in stored for _, stored in self._where.values())

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

    def _is_fp8_weight(self, name: str) -> bool:
        info = self.tensors[name]
        return (
            info.dtype.startswith(_FP8)
            and len(info.shape) >= 2
            and not name.endswith(_SCALE_SUFFIXES)
        )

    @property
    def _quantization(self) -> dict[str, Any]:
        found = (self.config or {}).get("quantization_config")
        return found if isinstance(found, dict) else {}

    @cached_property
    def _announces_scales(self) -> bool:
        if any(name.endswith((*_SCALE_SUFFIXES, "scaled_fp8")) for name in self.tensors):
            return True
        told = self._quantization
        return "fp8" in str(told.get("quant_method")) or told.get("format") == "float-quantized"

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
                    f"{stem}.{_SCALE_SUFFIXES[1]} (or scale_weight, weight_scale_inv) is missing: "
                    "get the complete file"
                )
            return values
        if scale_name not in self._scales:
            scale = self.read(scale_name)
            if not np.isfinite(scale).all():
                raise UserError(
                    f"{self.spec.path}: the fp8 scale {scale_name!r} holds NaN or Inf: "
                    "get an undamaged file"
                )
            self._scales[scale_name] = scale
        scale = self._scales[scale_name]
        return values * self._expanded(scale, scale_name, name, values, start)

    def _expanded(
        self, scale: np.ndarray, scale_name: str, name: str, values: np.ndarray, start: int
    ) -> np.ndarray:
        """Scales of a tensor, a row or a block, broadcast to rows [start, start + len(values))."""
        shape = self.tensors[name].shape
        rows, columns = shape[0], prod(shape[1:])
        stop = start + len(values)
        if scale.size == 1:
            return scale.reshape(())
        if scale.shape in ((rows,), (rows, 1)):
            return scale.reshape(-1)[start:stop].reshape(-1, *(1,) * (values.ndim - 1))
        if scale.ndim == 2 and values.ndim == 2 and scale.size:
            told = self._quantization.get("weight_block_size")
            told = told if isinstance(told, list) and len(told) == 2 else [None, None]
            row_block = _block_size(rows, scale.shape[0], told[0])
            column_block = _block_size(columns, scale.shape[1], told[1])
            if row_block and column_block:
                picked = scale[np.arange(start, stop) // row_block]
                return picked[:, np.arange(columns) // column_block]
        raise UserError(
            f"{self.spec.path}: the fp8 scale {scale_name!r} has shape {list(scale.shape)}, which "
            f"does not fit tensor {name!r} of shape {list(shape)}: get an undamaged file"
        )

    def note_plain_fp8(self, names: list[str]) -> None:
        """Remark once that fp8 weights without scales were read as they are."""
        plain = [n for n in names if n in self.tensors and self._is_fp8_weight(n)]
        if plain and not self._announces_scales and not self._noted_fp8:
            self._noted_fp8 = True
            self.notes.append(
                f"{len(plain)} attention tensors are {self.tensors[plain[0]].dtype} and the file "
                "announces no scales: read as a plain cast."
            )


def _block_size(size: int, blocks: int, told: object) -> int | None:
    """Elements a scale stands for along one axis, from the config or a power of two that fits."""
    sizes = [size, 1, *_BLOCK_SIZES]
    if isinstance(told, int) and told > 0:
        sizes.insert(0, told)
    return next((s for s in sizes if -(-size // s) == blocks), None)


def _check_index(located: Located, containers: list[Container]) -> None:
    by_path = dict(zip(located.files, containers, strict=True))
    for tensor, file in (located.weight_map or {}).items():
        if tensor not in by_path[file].tensors:
            raise UserError(
                f"{located.index} says that tensor {tensor!r} lies in {file}, but it does not: "
                "the shards and the index do not belong together"
            )
