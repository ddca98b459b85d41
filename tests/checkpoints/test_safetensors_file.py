from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from checkpoints.safetensors_bytes import build, entry, pack
from mla_study.checkpoints.formats.container import TensorInfo, shown, sniff
from mla_study.checkpoints.formats.opening import open_container
from mla_study.checkpoints.formats.safetensors_file import SafetensorsFile
from mla_study.errors import UserError


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "blocks.0.k.weight": rng.standard_normal((7, 5)).astype(np.float32),
        "blocks.0.v.weight": rng.standard_normal((11, 3)).astype(np.float16),
        "codes": rng.integers(0, 65536, (3, 3), dtype=np.uint16),
        "wide": rng.standard_normal((2, 1, 3)),
        "scalar": np.array(3.25, dtype=np.float32),
        "empty": np.zeros((4, 0), dtype=np.float32),
        "none": np.zeros((0, 4), dtype=np.float32),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "w.safetensors"


def refused(path: Path, body: bytes) -> str:
    """The sentence for this file: one line that names it."""
    path.write_bytes(body)

    def read_all() -> None:
        opened = open_container(str(path))
        for name in opened.tensors:
            opened.read(name)

    with pytest.raises(UserError) as caught:
        read_all()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert path.name in sentence
    return sentence


def test_values_names_and_counts(path: Path, seed: int) -> None:
    stored = arrays(seed)
    body = build(stored, {"codes": "BF16"}, {"format": "pt"})
    path.write_bytes(body)
    opened = open_container(str(path))
    assert isinstance(opened, SafetensorsFile)
    assert (opened.format, opened.path) == ("safetensors", str(path))
    assert opened.metadata == {"format": "pt"}
    assert list(opened.tensors) == list(stored)
    assert opened.tensors["codes"] == TensorInfo("codes", (3, 3), "BF16", 18)
    header = len(body) - sum(array.nbytes for array in stored.values())
    opening = opened.bytes_read
    for name, array in stored.items():
        before = opened.bytes_read
        found = opened.read(name)
        assert opened.bytes_read - before == array.nbytes
        if name == "codes":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(found, array)
        assert found.shape == array.shape
        assert found.dtype == (np.float64 if name == "wide" else np.float32)
    assert header <= opening <= header + 520  # the head is looked at twice: sniffed, then parsed
    opened.close()


def test_agrees_with_the_reference_writer(path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    stored = {
        "bf": torch.randn(5, 9).bfloat16(),
        "f8": torch.randn(3, 7).to(torch.float8_e4m3fn),
        "i": torch.arange(-3, 3),
        "b": torch.tensor([True, False]),
    }
    save_file(stored, path)
    opened = open_container(str(path))
    for name, tensor in stored.items():
        np.testing.assert_array_equal(opened.read(name), tensor.double().numpy())
    opened.close()


def test_rows_are_all_that_is_read(path: Path, seed: int) -> None:
    stored = arrays(seed)
    path.write_bytes(build(stored))
    opened = SafetensorsFile(str(path))
    for name in ("blocks.0.k.weight", "blocks.0.v.weight", "wide"):
        array = stored[name]
        for start in range(len(array) + 1):
            for stop in range(start, len(array) + 1):
                before = opened.bytes_read
                np.testing.assert_array_equal(opened.read(name, start, stop), array[start:stop])
                assert opened.bytes_read - before == array[start:stop].nbytes
    for start, stop in ((-1, 2), (3, 2), (0, 8)):
        with pytest.raises(ValueError):
            opened.read("blocks.0.k.weight", start, stop)
    with pytest.raises(KeyError):
        opened.read("absent")
    opened.close()


def test_sha256_of_stored_bytes(path: Path, seed: int) -> None:
    stored = arrays(seed)
    path.write_bytes(build(stored))
    expected = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in stored.items()}
    opened = SafetensorsFile(str(path))
    assert {name: opened.raw_sha256(name) for name in stored} == expected
    hashing = SafetensorsFile(str(path), hash_reads=True)
    for name, array in stored.items():
        rows = len(array) if array.ndim else 1
        for start in range(0, rows, 3):
            hashing.read(name, start, min(start + 3, rows))
        hashing.read(name, 0, min(rows, 2))
    before = hashing.bytes_read
    assert {name: hashing.raw_sha256(name) for name in stored if name != "none"} == {
        name: digest for name, digest in expected.items() if name != "none"
    }
    assert hashing.bytes_read == before
    skipping = SafetensorsFile(str(path), hash_reads=True)
    skipping.read("blocks.0.k.weight", 0, 2)
    skipping.read("blocks.0.k.weight", 3, 7)
    assert skipping.raw_sha256("blocks.0.k.weight") == expected["blocks.0.k.weight"]
    for each in (opened, hashing, skipping):
        each.close()


def test_pickles_and_reports_progress(path: Path, seed: int) -> None:
    path.write_bytes(build(arrays(seed)))
    seen: list[int] = []
    opened = SafetensorsFile(str(path), on_bytes=seen.append, hash_reads=True)
    opened.read("blocks.0.k.weight", 0, 3)
    assert sum(seen) == opened.bytes_read
    again = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(again.read("wide"), opened.read("wide"))
    assert again.fingerprint == opened.fingerprint
    opened.close()
    again.close()


def test_weights_choice_is_noted(path: Path) -> None:
    path.write_bytes(build({"x": np.ones(2, np.float32)}))
    opened = open_container(str(path), weights="generator_ema")
    assert "generator_ema" in opened.notes[0]
    opened.close()


def test_magic_wins_over_suffix(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(build({"x": np.ones(2, np.float32)}))
    opened = open_container(str(path))
    assert opened.format == "safetensors"
    opened.close()


def test_no_tensors_is_a_container_still(path: Path) -> None:
    path.write_bytes(pack({}))
    opened = open_container(str(path))
    assert opened.tensors == {}
    opened.close()


def test_header_of_640_bytes_is_no_pickle(path: Path) -> None:
    # 640 = 0x280: the file starts with the two bytes of a pickle of protocol 2
    header = json.dumps({"x": entry("F32", [1], 0, 4)}).ljust(640)
    path.write_bytes(pack(header, bytes(4)))
    assert path.read_bytes()[:2] == b"\x80\x02"
    opened = open_container(str(path))
    assert list(opened.tensors) == ["x"]
    opened.close()


ONE = {"x": entry("F32", [2, 3], 0, 24)}
TWO = {"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 8, 16)}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is empty"),
        (b"\x00", "1 bytes, too few"),
        (b"\x08\0\0\0\0\0\0\0{", "9 bytes, too few"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page instead of weights"),
        (b"\n\n  <html><head></head></html>", "HTML page instead of weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs"),
        (gzip.compress(build({"x": np.ones(99)}), mtime=0), "unpack it"),
        (pack(ONE, bytes(24), length=100_000_001), "more than 100000000"),
        (pack(ONE, bytes(24), length=2**63), "more than 100000000"),
        (pack(ONE, bytes(24), length=5000), "header of 5000 bytes where"),
        (pack(ONE, b"")[:40], "truncated"),
        (pack(ONE, bytes(23)), "tensor 'x' lies at bytes '[0, 24]' of the data, which has only 23"),
        (pack(ONE, bytes(25)), "1 bytes after its last tensor"),
        (pack("{" + " " * 20), "not valid JSON"),
        (pack('{"x": ' + "[" * 100_000 + "}"), "not valid JSON"),
        (pack('{"x": ' + "1" * 5000 + "}"), "not valid JSON"),
        (pack(b'{"\xff\xfe": 1}      '), "not valid JSON"),
        (pack(" " + json.dumps(ONE), bytes(24)), "no JSON header"),
        (pack("[1, 2, 3, 4]"), "no JSON header"),
        (pack('{"x": %s, "x": %s}' % ((json.dumps(ONE["x"]),) * 2), bytes(24)), "'x' twice"),
        (pack('{"x": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' twice"),
        (pack({"x": 3}), "no valid dtype"),
        (pack({"x": {"dtype": "F32", "shape": [1]}}), "no valid dtype"),
        (pack({"x": entry("F32", [True], 0, 4)}, bytes(4)), "no valid dtype"),
        (pack({"x": entry("F32", [1.0], 0, 4)}, bytes(4)), "no valid dtype"),  # type: ignore
        (pack({"x": {"dtype": 1, "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "no valid"),
        (pack({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)), "no valid"),
        (pack({"x": entry("F32", [-1, -1], 0, 4)}, bytes(4)), "impossible shape"),
        (pack({"x": entry("F32", [0, 10**30], 0, 0)}), "impossible shape"),
        (pack({"x": entry("F32", [10**4000, 10**4000], 0, 4)}, bytes(4)), "impossible shape"),
        (pack({"x": entry("F32", [1] * 65, 0, 4)}, bytes(4)), "impossible shape"),
        (pack({"x": entry("F32", [1], 4, 0)}, bytes(4)), "impossible offsets"),
        (pack({"x": entry("F32", [1], -4, 0)}, bytes(4)), "impossible offsets"),
        (pack({"x": entry("F32", [2], 0, 10**4000)}, bytes(4)), "lies at bytes"),
        (pack({"x": entry("F32", [3], 0, 8)}, bytes(8)), "does not fit its 8 bytes"),
        (pack({"x": entry("F16", [2**31, 2**31], 0, 8)}, bytes(8)), "impossible shape"),
        (pack({"x": entry("F4", [3], 0, 2)}, bytes(2)), "does not fit its 2 bytes"),
        (pack(TWO | {"y": entry("F32", [2], 4, 12)}, bytes(12)), "tensor 'y' overlaps tensor 'x'"),
        (pack(TWO | {"y": entry("F32", [2], 0, 8)}, bytes(8)), "overlaps"),
        (pack(TWO | {"y": entry("F32", [2], 12, 20)}, bytes(20)), "bytes 8 to 12.*no tensor"),
        (pack({"__metadata__": {"a": 1}} | ONE, bytes(24)), "__metadata__"),
        (pack({"__metadata__": []} | ONE, bytes(24)), "__metadata__"),
        (pack('{"\\ud800": ' + json.dumps(ONE["x"]) + "}", bytes(24)), "not valid Unicode"),
        (pack({"x": entry("C64", [1], 0, 8)}, bytes(8)), "tensor 'x' has dtype 'C64'"),
        (pack({"x": entry("Q\n9", [1], 0, 8)}, bytes(8)), "which is not read here"),
    ],
)
def test_bad_files_give_one_sentence(path: Path, body: bytes, says: str) -> None:
    assert re.search(says.replace("[", r"\["), refused(path, body))


def test_unknown_dtype_only_matters_when_read(path: Path) -> None:
    path.write_bytes(pack(TWO | {"y": entry("MX9", [2], 8, 16)}, bytes(16)))
    opened = open_container(str(path))
    assert opened.read("x").tolist() == [0, 0]
    with pytest.raises(UserError, match="'y' has dtype 'MX9'"):
        opened.read("y")
    assert opened.raw_sha256("y") == hashlib.sha256(bytes(8)).hexdigest()
    opened.close()


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("x.bin", b"\x00" * 300, "no format known"),
        ("x.gguf", b"plain text, not weights", "no format known"),
        ("x.json", b'{"weight_map": {}}', "JSON, not weights"),
        ("x.pt", b"<html>404</html>", "HTML page"),
        ("x.gguf", b"", "is empty"),
    ],
)
def test_unknown_files(tmp_path: Path, name: str, body: bytes, says: str) -> None:
    assert says in refused(tmp_path / name, body)


def test_file_cut_after_opening(path: Path, seed: int) -> None:
    body = build(arrays(seed))
    path.write_bytes(body)
    opened = open_container(str(path))
    path.write_bytes(body[: len(body) - 40])
    with pytest.raises(UserError, match="truncated or was changed"):
        opened.read("wide")
    opened.close()


def test_tensor_that_does_not_fit_into_memory(path: Path) -> None:
    size = 1 << 43  # sparse: the file really has this length, and no blocks
    body = pack({"x": entry("U8", [size], 0, size)})
    path.write_bytes(body)
    try:
        with path.open("r+b") as file:
            file.truncate(len(body) + size)
    except OSError:
        pytest.skip("no file of this length here")
    opened = open_container(str(path))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 42, limits[1]))
    try:
        with pytest.raises(UserError, match="does not fit into memory"):
            opened.read("x")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    opened.close()


def test_mutated_files_open_or_are_refused(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    valid = build(arrays(seed), {"codes": "BF16"}, {"format": "pt"})
    header_end = 8 + int.from_bytes(valid[:8], "little")
    refusals = 0
    for case in range(400):
        body = bytearray(valid)
        match case % 4:
            case 0:  # bit flips in the header
                for at in rng.integers(0, header_end, rng.integers(1, 4)):
                    body[at] ^= 1 << int(rng.integers(8))
            case 1:
                body = body[: rng.integers(0, len(body))]
            case 2:  # one digit for another
                digits = [at for at in range(8, header_end) if chr(body[at]).isdigit()]
                body[int(rng.choice(digits))] = int(rng.integers(48, 58))
            case _:
                at = int(rng.integers(0, header_end))
                body[at:at] = rng.bytes(int(rng.integers(1, 9)))
        path.write_bytes(body)
        try:
            opened = open_container(str(path))
        except UserError:
            refusals += 1
            continue
        for name in opened.tensors:
            try:
                opened.read(name)
            except UserError:
                refusals += 1
        opened.close()
    assert refusals > 100


def test_real_files_match_the_reference_library(assets: Path) -> None:
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    files = sorted((assets / "weights").glob("*.safetensors"))
    assert files
    for file in files:
        opened = open_container(str(file))
        for name, tensor in load_file(file).items():
            found = opened.read(name)
            assert torch.equal(torch.from_numpy(found.copy()).double(), tensor.double())
        opened.close()


def test_sniff_and_shown() -> None:
    assert sniff(b"GGUF\3\0\0\0") == "gguf"
    assert sniff(b"PK\3\4rest") == "zip"
    assert sniff(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.") == "pickle"
    assert sniff(b"version ") == "lfs"
    assert sniff(b"v") == "unknown"
    assert sniff(b"{}") == "json"
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown("x" * 1000)) == 122
