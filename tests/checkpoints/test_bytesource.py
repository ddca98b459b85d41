from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from mla_study.checkpoints.formats import bytesource
from mla_study.checkpoints.formats.bytesource import LocalBytes, is_remote
from mla_study.checkpoints.formats.sources import open_bytes
from mla_study.errors import UserError


def test_reads_exact_ranges_and_counts_them(tmp_path: Path, seed: int) -> None:
    body = np.random.default_rng(seed).bytes(10_007)
    (tmp_path / "x.bin").write_bytes(body)
    pieces: list[int] = []
    source = open_bytes(str(tmp_path / "x.bin"), pieces.append)
    assert source.size == 10_007
    assert not source.remote
    for start, stop in ((0, 0), (0, 1), (3, 4099), (10_000, 10_007), (10_007, 10_007)):
        assert bytes(source.read(start, stop)) == body[start:stop]
    assert source.bytes_read == 1 + 4096 + 7 == sum(pieces)
    source.close()


def test_long_reads_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytesource, "_PIECE", 101)
    body = os.urandom(1000)
    (tmp_path / "x.bin").write_bytes(body)
    source = LocalBytes(tmp_path / "x.bin")
    assert source.read(13, 1000) == body[13:]
    source.close()


def test_end_of_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"abc")
    source = LocalBytes(path)
    with pytest.raises(UserError, match=r"x\.bin ends at byte 3 where 5 were expected"):
        source.read(1, 5)
    with pytest.raises(ValueError):
        source.read(-1, 2)
    with pytest.raises(ValueError):
        source.read(2, 1)
    source.close()


def test_pickles_as_its_path(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"abcdef")
    source = LocalBytes(path, on_bytes=lambda count: None)
    source.read(0, 4)
    again = pickle.loads(pickle.dumps(source))
    source.close()
    assert again.read(2, 6) == b"cdef"
    assert again.fingerprint() == source.fingerprint()
    again.close()


def test_fingerprint_follows_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"abcdef")
    os.utime(path, ns=(1, 1_700_000_000_000_000_001))

    def fingerprint() -> str:
        source = LocalBytes(path)
        source.close()
        return source.fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    os.utime(path, ns=(1, 1_700_000_000_000_000_002))
    second = fingerprint()
    path.write_bytes(b"abcdefg")
    os.utime(path, ns=(1, 1_700_000_000_000_000_002))
    assert len({first, second, fingerprint()}) == 3


def test_bad_paths_give_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        LocalBytes(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        LocalBytes(tmp_path)
    with pytest.raises(UserError, match="cannot be opened"):
        LocalBytes("a\0b")
    with pytest.raises(UserError, match="cannot be opened"):
        LocalBytes("x" * 5000)
    os.mkfifo(tmp_path / "pipe")  # must not wait for a writer
    with pytest.raises(UserError, match="not a regular file"):
        LocalBytes(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"abc")
    path.chmod(0)
    with pytest.raises(UserError, match="permissions"):
        LocalBytes(path)


def test_addresses() -> None:
    assert is_remote("https://host/x.safetensors")
    assert is_remote("hf://org/name")
    assert is_remote("s3://bucket/x")
    assert not is_remote("/data/x.safetensors")
    assert not is_remote("C:/x.safetensors")
    assert not is_remote("a://b".replace("://", ":/"))
    for address in ("s3://bucket/x", "ftp://host/x", "file:///x"):
        with pytest.raises(UserError, match="not read here"):
            open_bytes(address)
