"""What a weight file looks like to the rest of the package, and which class opens which file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from mla_study.errors import UserError

HEAD_BYTES = 512  # what `sniff` wants to see
MAX_HEADER_BYTES = 100_000_000  # the safetensors reference reader has the same limit

FORMATS = "safetensors, PyTorch (.pt, .pth, .bin), GGUF or ONNX"

Kind = Literal[
    "empty",
    "lfs",
    "html",
    "safetensors",
    "zip",
    "pickle",
    "gguf",
    "archive",
    "json",
    "unknown",
]


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its stored name, shape and dtype name, and its stored size in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@runtime_checkable
class Container(Protocol):
    """A file of named tensors, of which only what is asked for is read.

    ``path`` re-opens it (:func:`open_container`) in another process; ``format`` is
    ``safetensors``, ``torch``, ``gguf`` or ``onnx``; ``notes`` are sentences for the summary
    about choices made on opening; ``fingerprint`` is a cheap identity (size and time or ETag);
    ``bytes_read`` counts the bytes fetched so far, the header's included.
    """

    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, object]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``[start, stop)`` of the first axis, as float32 (float64 where float32 would lose).

        Quantised blocks are dequantised, fp8 is cast as stored (scales belong to the reader);
        NaN and Inf pass. The array may be a read-only view. Raises UserError.
        """
        ...

    def raw_sha256(self, name: str) -> str:
        """Hexadecimal sha256 of the stored bytes of one tensor."""
        ...

    def close(self) -> None: ...


def shown(name: str, limit: int = 120) -> str:
    """A tensor's name, or another text, fit for one line of a message: quoted, escaped, cut."""
    return repr(name if len(name) <= limit else name[: limit - 3] + "...")


def sniff(head: bytes) -> Kind:
    """What a file is, from its first :data:`HEAD_BYTES` bytes (8 are enough for most kinds)."""
    if not head:
        return "empty"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    # Before pickle: a safetensors header of 640 bytes starts with 80 02 as well.
    header = int.from_bytes(head[:8], "little")
    if len(head) >= 8 and 2 <= header <= MAX_HEADER_BYTES and head[8:9] in (b"{", b""):
        return "safetensors"
    if head[:1] == b"\x80" and 2 <= int.from_bytes(head[1:2], "little") <= 5:
        return "pickle"
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"\xfd7zXZ")):
        return "archive"
    if len(head) >= 8 and head[:23] == b"version https://git-lfs"[: len(head)]:
        return "lfs"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doc", b"<html", b"<head", b"<?xml", b"<!--", b"<script")):
        return "html"
    if text.startswith((b"{", b"[")):
        return "json"
    return "unknown"


def refuse_kind(kind: Kind, name: str) -> None:
    """Raise the sentence for a file that cannot be weights; return for one that may be."""
    if kind == "empty":
        raise UserError(f"{name} is empty (0 bytes): download or save it again")
    if kind == "lfs":
        raise UserError(
            f"{name} is a git-lfs pointer, not the weights themselves: "
            "run `git lfs pull` in its repository, or download the file"
        )
    if kind == "html":
        hint = "download it again (perhaps the address needs a login)"
        if "/blob/" in name:
            hint = "put /resolve/ in place of /blob/ in the address"
        raise UserError(f"{name} is an HTML page instead of weights: {hint}")
    if kind == "archive":
        raise UserError(f"{name} is a compressed archive: unpack it and name the file inside")
