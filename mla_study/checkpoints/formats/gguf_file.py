"""GGUF files: the header by hand, the quantised blocks by the ``gguf`` package."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mla_study.checkpoints.formats.bytesource import LocalBytes
from mla_study.checkpoints.formats.container import TensorInfo, shown
from mla_study.checkpoints.formats.dtypes import decode
from mla_study.errors import UserError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_ELEMENTS = 1 << 56
_MAX_KEY = 65_535
_MAX_KEPT = 4096  # a tokenizer's vocabulary is of no use here
_CHUNK = 1 << 20

# ggml type number -> (name, values a block, bytes a block), for what needs no other package.
_PLAIN = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}
_PLAIN_NAMES = frozenset(name for name, _, _ in _PLAIN.values())


class _Extent(NamedTuple):
    offset: int
    kind: int


class GgufFile:
    """A GGUF file, version 2 or 3, little-endian.

    Shapes are row-major (``[out, in]``, the reverse of the file's own order). ``metadata`` holds
    the file's keys with plain Python values (``general.architecture``,
    ``llama.attention.head_count``, ...), long arrays and texts left out. Raises UserError for a
    header that does not fit the file, before anything of the claimed size is allocated.
    """

    format = "gguf"

    def __init__(self, path: str, *, weights: str | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        if weights is not None:
            self.notes.append(f"{path}: there is one set of weights; '{weights}' is ignored.")
        self._source = LocalBytes(path)
        try:
            header = _Header(self._source)
            header.parse()
        except BaseException:
            self._source.close()
            raise
        self.metadata: Mapping[str, object] = header.metadata
        self.tensors: Mapping[str, TensorInfo] = header.tensors
        self._extents = header.extents
        parts = header.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            self.notes.append(f"{path} is one of {parts} parts: only its own tensors are read.")

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``[start, stop)`` of the first axis, dequantised to float32 (float64 for F64 and
        wide integers). Only these rows are read and dequantised. Raises UserError."""
        info = self._info(name)
        if not info.shape:
            return self._decode(info, 0, info.nbytes, ())
        first, last, _ = slice(start, stop).indices(info.shape[0])
        last = max(first, last)
        if len(info.shape) == 1 and info.dtype not in _PLAIN_NAMES:
            return self._decode(info, 0, info.nbytes, info.shape)[first:last]
        row_bytes = info.nbytes // max(1, info.shape[0])
        shape = (last - first, *info.shape[1:])
        return self._decode(info, first * row_bytes, last * row_bytes, shape)

    def raw_sha256(self, name: str) -> str:
        """Hexadecimal sha256 of the stored blocks of one tensor."""
        info = self._info(name)
        offset = self._extents[name].offset
        digest = hashlib.sha256()
        for start in range(0, info.nbytes, _CHUNK):
            stop = min(start + _CHUNK, info.nbytes)
            digest.update(self._source.read(offset + start, offset + stop))
        return digest.hexdigest()

    def close(self) -> None:
        self._source.close()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise UserError(f"{self.path} has no tensor {shown(name)}: check its name") from None

    def _decode(
        self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        extent = self._extents[info.name]
        raw = self._source.read(extent.offset + start, extent.offset + stop)
        if info.dtype in _PLAIN_NAMES:
            return decode(raw, info.dtype, shape)
        if math.prod(shape) == 0:
            return np.zeros(shape, dtype=np.float32)
        constants, quants = _gguf(self.path)
        block, block_bytes = constants.GGML_QUANT_SIZES[extent.kind]
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(-1, shape[-1] // block * block_bytes)
        try:
            # A damaged block scale may be any bit pattern; the walk looks at the values.
            with np.errstate(all="ignore"):
                kind = constants.GGMLQuantizationType(extent.kind)
                return quants.dequantize(blocks, kind).astype(np.float32, copy=False).reshape(shape)
        except Exception as error:
            raise UserError(
                f"{self.path}: tensor {shown(info.name)} of type {info.dtype} cannot be "
                f"dequantised ({str(error)[:100] or type(error).__name__}): "
                "convert the file to F16, BF16 or Q8_0"
            ) from None


class _Header:
    """A cursor over the header that never looks, nor allocates, past the end of the file."""

    def __init__(self, source: LocalBytes) -> None:
        self.source = source
        self.path = source.path
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.extents: dict[str, _Extent] = {}
        self._at = 0
        self._base = 0
        self._buffer = b""

    def parse(self) -> None:
        if self._take(4) != b"GGUF":
            raise UserError(f"{self.path} does not start like a GGUF file: check the path")
        version = self._number("<I")
        if version not in (2, 3):
            big = version & 0xFFFF == 0 and version != 0
            raise UserError(
                f"{self.path} is a {'big-endian ' if big else ''}GGUF file of "
                f"{'the other byte order' if big else f'version {version}'}, which is not read "
                "here: convert it to version 3, little-endian"
            )
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        # A key and an empty value take 13 bytes, a tensor's entry 24.
        self._expect(key_count, 13, "metadata keys")
        self._expect(tensor_count, 24, "tensors")
        for _ in range(key_count):
            self._key_value()
        entries = [self._entry() for _ in range(tensor_count)]
        self._place(entries)

    def _key_value(self) -> None:
        key = self._text(_MAX_KEY, "a metadata key")
        if key in self.metadata:
            raise UserError(f"{self.path} has the metadata key {shown(key)} twice: write it anew")
        value = self._value(self._number("<I"), depth=0)
        if value is not None:
            self.metadata[key] = value

    def _value(self, kind: int, depth: int) -> object:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            length = self._number("<Q")
            if length > _MAX_KEPT:
                self._skip(length)
                return None
            return self._take(length).decode("utf-8", "replace")
        if kind != _ARRAY or depth >= _MAX_DIMS:
            raise self._damaged(f"a metadata value has the unknown type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        if inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            self._expect(count, width, "array items")
            if count > _MAX_KEPT:
                self._skip(count * width)
                return None
            return [self._number(_SCALARS[inner]) for _ in range(count)]
        self._expect(count, 8, "array items")
        if count > _MAX_KEPT:
            for _ in range(count):
                if inner == _STRING:
                    self._skip(self._number("<Q"))
                else:
                    self._value(inner, depth + 1)
            return None
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(_MAX_KEY, "a tensor's name")
        dims = self._number("<I")
        if dims > _MAX_DIMS:
            raise self._damaged(f"tensor {shown(name)} has {dims} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(dims)]))
        return name, shape, self._number("<I"), self._number("<Q")

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment!r}, no power of two")
        data = -(-self._at // alignment) * alignment
        spans: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in entries:
            where = f"tensor {shown(name)}"
            if name in self.tensors:
                raise self._damaged(f"{where} is listed twice")
            dtype, block, block_bytes = self._type(kind, where)
            width = shape[-1] if shape else 1
            if width % block:
                raise self._damaged(f"{where} of type {dtype} has rows of {width} values")
            # Zeros apart: an empty array may not have a huge extent along another axis either.
            if math.prod(n for n in shape if n) > _MAX_ELEMENTS:
                raise self._damaged(f"{where} claims the shape {shape}")
            nbytes = math.prod(shape) // block * block_bytes
            if offset % alignment or data + offset + nbytes > self.source.size:
                raise self._damaged(
                    f"{where} of shape {shape} and type {dtype} lies outside the file"
                )
            self.tensors[name] = TensorInfo(name, shape, dtype, nbytes)
            self.extents[name] = _Extent(data + offset, kind)
            if nbytes:
                spans.append((offset, offset + nbytes, name))
        spans.sort()
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise self._damaged(f"tensors {shown(first)} and {shown(second)} overlap")

    def _type(self, kind: int, where: str) -> tuple[str, int, int]:
        if kind in _PLAIN:
            return _PLAIN[kind]
        constants, _ = _gguf(self.path)
        try:
            known = constants.GGMLQuantizationType(kind)
            return (known.name, *constants.GGML_QUANT_SIZES[known])
        except (ValueError, KeyError):
            raise self._damaged(
                f"{where} has the type {kind}, which the installed gguf package does not know"
            ) from None

    def _text(self, limit: int, what: str) -> str:
        length = self._number("<Q")
        if length > limit:
            raise self._damaged(f"{what} claims {length} bytes")
        return self._take(length).decode("utf-8", "replace")

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _expect(self, count: int, width: int, what: str) -> None:
        if count * width > self.source.size - self._at:
            raise self._damaged(f"it claims {count} {what}")

    def _take(self, count: int) -> bytes:
        start = self._at - self._base
        if start + count > len(self._buffer):
            self._fits(count)
            stop = min(self.source.size, self._at + max(count, _CHUNK))
            self._base, start = self._at, 0
            self._buffer = bytes(self.source.read(self._at, stop))
        self._at += count
        return self._buffer[start : start + count]

    def _skip(self, count: int) -> None:
        self._fits(count)
        self._at += count

    def _fits(self, count: int) -> None:
        if count > self.source.size - self._at:
            raise self._damaged("its header runs past the end of the file")

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path} is damaged or truncated ({what}): download or convert it again"
        )


def _gguf(path: str) -> tuple[Any, Any]:
    """``(gguf.constants, gguf.quants)``."""
    try:
        from gguf import constants, quants
    except ImportError:
        raise UserError(
            f"{path} has quantised tensors and the package gguf is not installed: "
            "pip install 'mla-study[formats]'"
        ) from None
    return constants, quants
