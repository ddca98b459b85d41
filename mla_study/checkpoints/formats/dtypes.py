"""Stored bytes to float arrays, exactly, without torch or ml_dtypes.

Names are those of the safetensors format. fp8 follows "FP8 Formats for Deep Learning"
(arXiv:2209.05433, table 1); the FNUZ variants and E8M0 follow their OCP / ONNX definitions.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

# Every dtype that the safetensors format knows. Those that are not decoded here still have
# their extent checked.
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# Integers of 16 bits fit float32's significand; wider ones go to float64.
_PLAIN: dict[str, tuple[str, type[np.floating]]] = {
    "BOOL": ("u1", np.float32),
    "U8": ("u1", np.float32),
    "I8": ("i1", np.float32),
    "U16": ("<u2", np.float32),
    "I16": ("<i2", np.float32),
    "F16": ("<f2", np.float32),
    "F32": ("<f4", np.float32),
    "I32": ("<i4", np.float64),
    "U32": ("<u4", np.float64),
    "F64": ("<f8", np.float64),
    "I64": ("<i8", np.float64),
    "U64": ("<u8", np.float64),
}

# exponent bits, mantissa bits, bias, flavour
_FP8: dict[str, tuple[int, int, int, str]] = {
    "F8_E4M3": (4, 3, 7, "fn"),
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": (5, 2, 16, "fnuz"),
}

# Codes with these bits all set are NaN or Inf (E4M3 has no Inf, and NaN only there).
_EXPONENTS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E5M2": ("u1", 0x1F << 2),
}
_CHECKED = 1 << 18

DECODED = frozenset(_PLAIN) | frozenset(_FP8) | {"BF16", "F8_E8M0"}


def stored_nbytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes that a contiguous tensor takes; None for a dtype whose width is not known, -1 for one
    that does not fill whole bytes."""
    bits = BITS.get(dtype)
    if bits is None:
        return None
    total = bits * math.prod(shape)
    return total // 8 if total % 8 == 0 else -1


@cache
def fp8_table(dtype: str) -> np.ndarray:
    """The 256 values of an fp8 dtype, float32 [256], in the order of their codes (read-only)."""
    if dtype == "F8_E8M0":
        values = [math.ldexp(1.0, code - 127) for code in range(255)] + [math.nan]
    else:
        values = [_fp8_value(code, *_FP8[dtype]) for code in range(256)]
    table = np.array(values, dtype=np.float32)
    table.setflags(write=False)
    return table


def _fp8_value(code: int, exponent_bits: int, mantissa_bits: int, bias: int, flavour: str) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = code & ((1 << mantissa_bits) - 1)
    if flavour == "fnuz" and code == 0x80:
        return math.nan
    if flavour == "fn" and code & 0x7F == 0x7F:
        return math.nan
    if flavour == "ieee" and exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def decode(raw: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Little-endian stored bytes as an array of this shape: float32, or float64 for F64 and for
    integers wider than 16 bits (those beyond 2^53 are rounded).

    Exact otherwise; NaN and Inf are kept. F32 and F64 come back as views of ``raw`` (read-only if
    ``raw`` is). Raises KeyError for a dtype that is not in :data:`DECODED`, ValueError where the
    length does not fit the shape.
    """
    if dtype == "BF16":
        codes = np.frombuffer(raw, dtype="<u2")
        wide = np.left_shift(codes, 16, dtype=np.uint32)
        return wide.view(np.float32).reshape(shape)
    if dtype in _FP8 or dtype == "F8_E8M0":
        return fp8_table(dtype)[np.frombuffer(raw, dtype=np.uint8)].reshape(shape)
    stored, target = _PLAIN[dtype]
    codes = np.frombuffer(raw, dtype=stored)
    if dtype == "BOOL":
        codes = codes != 0
    with np.errstate(invalid="ignore"):  # a signalling NaN stays NaN
        return codes.astype(target, copy=False).reshape(shape)


def all_finite(raw: bytes | memoryview, dtype: str) -> bool:
    """Whether stored bytes hold neither NaN nor Inf; a dtype without either holds none."""
    if dtype not in _EXPONENTS:
        return True
    code, mask = _EXPONENTS[dtype]
    codes = np.frombuffer(raw, dtype=code)
    mask = codes.dtype.type(mask)
    return not any(
        ((codes[start : start + _CHECKED] & mask) == mask).any()
        for start in range(0, len(codes), _CHECKED)
    )
