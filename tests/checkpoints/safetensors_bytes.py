"""Safetensors files built by hand, so that they can also be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

_NAMES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: Mapping[str, Any] | str | bytes, data: bytes = b"", length: int | None = None):
    """Length, header (as JSON where it is a mapping) and data."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def build(
    arrays: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """A valid file; ``dtypes`` overrides the stored dtype's name (uint16 codes as BF16)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        dtype = (dtypes or {}).get(name) or _NAMES[array.dtype.name]
        header[name] = entry(dtype, list(array.shape), len(data), len(data) + len(raw))
        data += raw
    return pack(header, data)
