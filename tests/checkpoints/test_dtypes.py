"""Against torch's own casts, code by code."""

from __future__ import annotations

import numpy as np
import pytest

from mla_study.checkpoints.formats.dtypes import BITS, DECODED, decode, fp8_table, stored_nbytes

torch = pytest.importorskip("torch")

FP8 = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def bits(array: np.ndarray) -> np.ndarray:
    """Bit patterns, so that signed zeros differ; every NaN counts as one value."""
    plain = np.where(np.isnan(array), np.float32(np.nan), array).astype(np.float32)
    return plain.view(np.uint32)


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_tables_match_torch(dtype: str) -> None:
    if not hasattr(torch, FP8[dtype]):
        pytest.skip(f"this torch has no {FP8[dtype]}")
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(getattr(torch, FP8[dtype])).to(torch.float32).numpy()
    np.testing.assert_array_equal(bits(fp8_table(dtype)), bits(expected))
    shuffled = np.random.default_rng(7).permutation(256).astype(np.uint8)
    found = decode(shuffled.tobytes(), dtype, (4, 64))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(bits(found), bits(expected[shuffled].reshape(4, 64)))
    with pytest.raises(ValueError):
        fp8_table(dtype)[0] = 1.0


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_all_16_bit_codes_match_torch(dtype: str, name: str) -> None:
    codes = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(codes.view(np.int16)).view(getattr(torch, name)).float().numpy()
    found = decode(codes.tobytes(), dtype, (65536,))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize(
    ("dtype", "stored", "target"),
    [
        ("U8", np.uint8, np.float32),
        ("I8", np.int8, np.float32),
        ("U16", np.uint16, np.float32),
        ("I16", np.int16, np.float32),
        ("I32", np.int32, np.float64),
        ("U32", np.uint32, np.float64),
        ("I64", np.int64, np.float64),
        ("U64", np.uint64, np.float64),
        ("F32", np.float32, np.float32),
        ("F64", np.float64, np.float64),
    ],
)
def test_plain_dtypes(dtype: str, stored: type, target: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if np.issubdtype(stored, np.integer):
        limits = np.iinfo(stored)
        values = rng.integers(max(limits.min, -(2**52)), min(limits.max, 2**52), 15, dtype=stored)
    else:
        values = rng.standard_normal(15).astype(stored)
        values[:3] = np.nan, np.inf, -0.0
    found = decode(values.tobytes(), dtype, (5, 3))
    assert found.dtype == target
    np.testing.assert_array_equal(found, values.reshape(5, 3).astype(target))


def test_bool() -> None:
    found = decode(bytes([0, 1, 2]), "BOOL", (3,))
    assert found.tolist() == [0.0, 1.0, 1.0]
    assert found.dtype == np.float32


def test_shapes_and_memoryviews() -> None:
    raw = memoryview(bytearray(np.arange(6, dtype=np.float32).tobytes()))
    assert decode(raw, "F32", (2, 3))[1, 2] == 5
    assert decode(raw[:4], "F32", ()).shape == ()
    assert decode(b"", "BF16", (3, 0)).shape == (3, 0)
    assert decode(b"", "F8_E4M3", (0,)).shape == (0,)
    with pytest.raises(ValueError):
        decode(raw, "F32", (2, 2))
    with pytest.raises(KeyError):
        decode(raw, "C64", (3,))


def test_stored_nbytes() -> None:
    assert stored_nbytes("BF16", (3, 5)) == 30
    assert stored_nbytes("F64", ()) == 8
    assert stored_nbytes("F4", (3, 2)) == 3
    assert stored_nbytes("F4", (3,)) == -1
    assert stored_nbytes("F6_E2M3", (4,)) == 3
    assert stored_nbytes("Q4_K", (4,)) is None
    assert set(BITS) > DECODED
