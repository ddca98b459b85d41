"""The safetensors format, read lazily from any byte source.

A header (u64 length, then JSON) names dtype, shape and extent of each tensor; the data follows and
must be covered by the tensors without overlap or hole. As strict as the reference library, except
that a dtype unknown here is refused only when that tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import numpy as np

from mla_study.checkpoints.formats.bytesource import ByteSource
from mla_study.checkpoints.formats.container import (
    HEAD_BYTES,
    MAX_HEADER_BYTES,
    TensorInfo,
    refuse_kind,
    shown,
    sniff,
)
from mla_study.checkpoints.formats.dtypes import DECODED, decode, stored_nbytes
from mla_study.checkpoints.formats.sources import open_bytes
from mla_study.errors import UserError

_AGAIN = "it is damaged or truncated; download or save it again"
_PIECE = 8 << 20
_MAX_DIMS = 32
_MAX_ELEMENTS = 1 << 56


@dataclass
class _Running:
    """A tensor's sha256 while its rows come in, in order."""

    row: int
    digest: Any


class SafetensorsFile:
    """One safetensors file, local or remote; only the header is read on opening.

    ``weights`` has no meaning here (there is one dictionary). ``on_bytes(n)`` is called after each
    piece read. With ``hash_reads`` (the default for remote files) a tensor that was read from its
    first row to its last has its sha256 without being read again. Raises UserError where the file
    is not valid safetensors.
    """

    format = "safetensors"

    def __init__(
        self,
        path: str,
        *,
        weights: str | None = None,
        on_bytes: Callable[[int], None] | None = None,
        hash_reads: bool | None = None,
    ) -> None:
        self.path = path
        self.notes: list[str] = []
        self._source: ByteSource = open_bytes(path, on_bytes)
        self._name = self._source.name
        self._hash_reads = self._source.remote if hash_reads is None else hash_reads
        self._running: dict[str, _Running] = {}
        self._digests: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        try:
            header, data_start = self._read_header()
            self._check(header, data_start)
        except BaseException:
            self._source.close()
            raise
        if weights is not None:
            self.notes.append(f"{self._name}: there is one set of weights; '{weights}' is ignored.")

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``[start, stop)`` of the first axis, float32 or float64; only they are fetched.

        A 0-dim tensor is read whole. The array may be a read-only view. Raises UserError for a
        dtype that is not decoded here or a file that ends early, KeyError for an unknown name,
        ValueError for rows outside the tensor.
        """
        info = self.tensors[name]
        if info.dtype not in DECODED:
            raise UserError(
                f"{self._name}: tensor {shown(name)} has dtype {shown(info.dtype)}, which is not "
                "read here: convert it to F32, F16 or BF16"
            )
        rows = info.shape[0] if info.shape else 1
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows [{start}, {stop}) of {rows} in tensor {shown(name)}")
        row_bytes = info.nbytes // rows if rows else 0
        base = self._starts[name]
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        try:
            raw = self._source.read(base + start * row_bytes, base + stop * row_bytes)
            if self._hash_reads and name not in self._digests:
                self._feed(name, raw, start, stop, rows)
            return decode(raw, info.dtype, shape)
        except MemoryError:
            raise UserError(
                f"{self._name}: tensor {shown(name)} ({info.nbytes} bytes stored) does not fit "
                "into memory: use a machine with more"
            ) from None

    def raw_sha256(self, name: str) -> str:
        """Hexadecimal sha256 of the tensor's stored bytes, computed once."""
        if name not in self._digests:
            digest = hashlib.sha256()
            for piece in self.raw(name):
                digest.update(piece)
            self._digests[name] = digest.hexdigest()
        return self._digests[name]

    def raw(self, name: str) -> Iterator[bytes | memoryview]:
        """The tensor's stored bytes in pieces of at most 8 MiB."""
        at, end = self.extent(name)
        while at < end:
            stop = min(at + _PIECE, end)
            yield self._source.read(at, stop)
            at = stop

    def extent(self, name: str) -> tuple[int, int]:
        """Where the tensor's bytes lie in the file: first, and one past the last."""
        start = self._starts[name]
        return start, start + self.tensors[name].nbytes

    @property
    def remote(self) -> bool:
        """Whether the bytes come over a network."""
        return self._source.remote

    def close(self) -> None:
        self._source.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_running": {}}

    def _feed(self, name: str, raw: bytes | memoryview, start: int, stop: int, rows: int) -> None:
        if start == 0:
            self._running[name] = _Running(0, hashlib.sha256())
        running = self._running.get(name)
        if running is None or running.row != start:
            return
        running.digest.update(raw)
        running.row = stop
        if stop == rows:
            self._digests[name] = self._running.pop(name).digest.hexdigest()

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """The parsed header and the offset of the data."""
        size = self._source.size
        head = bytes(self._source.read(0, min(8, size)))
        length = int.from_bytes(head, "little")
        room = size - 8
        if size < 10 or not 2 <= length <= min(MAX_HEADER_BYTES, room):
            if size > 8:
                head += self._source.read(8, min(HEAD_BYTES, size))
            kind = sniff(head)
            refuse_kind(kind, self._name)
            if kind in ("zip", "pickle", "gguf"):
                what = {"zip": "a PyTorch or zip", "pickle": "a pickle", "gguf": "a GGUF"}[kind]
                raise UserError(
                    f"{self._name} is {what} file, not safetensors: download it if it is remote, "
                    "and probe the local copy"
                )
            if size < 10:
                raise UserError(f"{self._name} has {size} bytes, too few for safetensors: {_AGAIN}")
            if length > MAX_HEADER_BYTES:
                raise UserError(
                    f"{self._name} announces a header of {length} bytes, more than "
                    f"{MAX_HEADER_BYTES}: it is damaged or not safetensors; download it again"
                )
            raise UserError(
                f"{self._name} announces a header of {length} bytes where {room} are left: {_AGAIN}"
            )
        raw = bytes(self._source.read(8, 8 + length))
        if not raw.startswith(b"{"):
            refuse_kind(sniff(head + raw[:HEAD_BYTES]), self._name)
            raise UserError(f"{self._name} has no JSON header where safetensors has one: {_AGAIN}")
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:  # JSON, UTF-8 and over-long integers
            raise UserError(
                f"{self._name} has a header that is not valid JSON ({error}): {_AGAIN}"
            ) from None
        return header, 8 + length

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise UserError(
                        f"{self._name} names {shown(key)} twice in its header: save it again with "
                        "unique names"
                    )
                seen.add(key)
        return found

    def _check(self, header: dict[str, Any], data_start: int) -> None:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise UserError(f"{self._name} has a __metadata__ that is not text to text: {_AGAIN}")
        self.metadata = metadata
        data = self._source.size - data_start
        extents: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            info, begin, end = self._entry(name, entry, data)
            self.tensors[name] = info
            self._starts[name] = data_start + begin
            extents.append((begin, end, name))
        at, before = 0, ""
        for begin, end, name in sorted(extents):
            if begin < at:
                raise UserError(
                    f"{self._name}: tensor {shown(name)} overlaps tensor {shown(before)} "
                    f"(bytes {begin} to {at} belong to both): {_AGAIN}"
                )
            if begin > at:
                raise UserError(
                    f"{self._name}: bytes {at} to {begin}, before tensor {shown(name)}, belong to "
                    f"no tensor: {_AGAIN}"
                )
            at, before = end, name
        if at < data:
            raise UserError(f"{self._name} has {data - at} bytes after its last tensor: {_AGAIN}")

    def _entry(self, name: str, entry: Any, data: int) -> tuple[TensorInfo, int, int]:
        where = f"{self._name}: tensor {shown(name)}"
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where} has a name that is not valid Unicode: {_AGAIN}") from None
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if (
            not isinstance(dtype, str)
            or not _all_integers(shape)
            or not _all_integers(offsets)
            or len(offsets) != 2
        ):
            raise UserError(f"{where} has no valid dtype, shape and data_offsets: {_AGAIN}")
        if (
            any(dim < 0 for dim in shape)
            or len(shape) > _MAX_DIMS
            or math.prod(max(dim, 1) for dim in shape) > _MAX_ELEMENTS
        ):
            raise UserError(f"{where} has the impossible shape {shown(str(shape))}: {_AGAIN}")
        begin, end = offsets
        if not 0 <= begin <= end:
            raise UserError(f"{where} has impossible offsets {shown(str(offsets))}: {_AGAIN}")
        if end > data:
            raise UserError(
                f"{where} lies at bytes {shown(str(offsets))} of the data, which has only {data}: "
                f"{_AGAIN}"
            )
        needed = stored_nbytes(dtype, tuple(shape))
        if needed is not None and needed != end - begin:
            raise UserError(
                f"{where} of shape {shown(str(shape))} and dtype {dtype} does not fit its "
                f"{end - begin} bytes: {_AGAIN}"
            )
        return TensorInfo(name, tuple(shape), dtype, end - begin), begin, end


def _all_integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int for item in cast(list[Any], value))
