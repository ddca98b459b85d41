"""Finished blocks on disk: whole or absent, readable to the last bit, one run a folder."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mla_study.errors import UserError
from mla_study.probes.stacks import Spectrum
from mla_study.probes.store import Measured, Store, locked, read_measured, write_measured


def sample(rng: np.random.Generator) -> Measured:
    sigma = np.sort(rng.random(7))[::-1].copy()
    spectra = [
        Spectrum("kv", -1, "raw", sigma, 9, 7, "gram"),
        Spectrum("qk", 3, "weighted-raw", sigma[:2], 8, 8, "factors", 2),
    ]
    metrics = [{"r_0.5": 3.0, "condition": float("inf")}, {"r_0.5": 0.1 + 0.2, "x": float("nan")}]
    nulls = {1: {"gaussian": {"r_0.5": (1 / 3, 0.0), "x": (float("nan"), 2.0)}}}
    return Measured(spectra, metrics, {"a": "0f"}, 123, rng.random((5, 2)), nulls)


def test_a_result_comes_back_to_the_last_bit(tmp_path: Path, seed: int) -> None:
    given = sample(np.random.default_rng(seed))
    write_measured(tmp_path / "x.npz", given)
    back = read_measured(tmp_path / "x.npz")
    for one, two in zip(given.spectra, back.spectra, strict=True):
        assert {**vars(one), "sigma": 0} == {**vars(two), "sigma": 0}
        np.testing.assert_array_equal(one.sigma, two.sigma)
    assert repr(back.metrics) == repr(given.metrics)
    assert repr(back.nulls) == repr(given.nulls)
    assert (back.digests, back.bytes_read) == (given.digests, 123)
    assert back.basis is not None and given.basis is not None
    np.testing.assert_array_equal(back.basis, given.basis)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    given.basis = None
    write_measured(tmp_path / "x.npz", given)
    assert read_measured(tmp_path / "x.npz").basis is None


def test_the_same_result_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_measured(tmp_path / name, sample(np.random.default_rng(5)))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_damaged_result_is_not_held(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store = Store(tmp_path)
    assert not store.holds("x")
    write_measured(store.path("x"), sample(rng))
    assert store.holds("x")
    good = store.path("x").read_bytes()
    for cut in (0, 1, 30, len(good) // 2, len(good) - 1):
        store.path("x").write_bytes(good[:cut])
        assert not store.holds("x"), cut
    for _ in range(40):  # a flipped bit is either seen or harmless
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        store.path("x").write_bytes(bytes(bad))
        store.holds("x")


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    given = sample(np.random.default_rng(seed))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        write_measured(tmp_path / "x.npz", given)
    assert not list(tmp_path.iterdir())


def test_one_run_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".blocks"
    with (
        locked(folder),
        pytest.raises(UserError, match="out is in use by another rank-probe"),
        locked(folder),
    ):
        pass
    (folder / "abc.npz.77.tmp").write_bytes(b"half")
    (folder / "abc.npz").write_bytes(b"whole")
    with locked(folder):
        assert sorted(p.name for p in folder.iterdir()) == [".lock", "abc.npz"]


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, os, signal\n"
        "from mla_study.probes.store import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode < 0
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "x"):
        pass
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file" / "x").prepare()
