"""Runs that were killed or interrupted: the same bytes in the end, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_files import as_bf16, wan, write

from mla_study.probes.rank_probe import Options
from mla_study.study.probing import BLOCKS, Job, execute

COMMAND = "import sys; from mla_study.cli import rank_probe_main; sys.exit(rank_probe_main())"
ROOT = Path(__file__).resolve().parents[2]
TABLES = ("table.parquet", "spectra.parquet")


@pytest.fixture
def small(tmp_path: Path, seed: int) -> Path:
    return write(tmp_path / "w.safetensors", wan(np.random.default_rng(seed), layers=3))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two or three seconds of work in a dozen blocks."""
    arrays, dtypes = as_bf16(wan(np.random.default_rng(7), layers=12, d=400))
    return write(tmp_path_factory.mktemp("large") / "w.safetensors", arrays, dtypes)


def launch(*arguments: object, code: str = COMMAND, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        **more,
    )


def finish(*arguments: object, **more: Any) -> tuple[int, str, str]:
    process = launch(*arguments, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def hashes(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in TABLES]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def undisturbed(large: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("reference")
    code, _, err = finish(large, "--out", out, "--workers", 1)
    assert code == 0, err
    return hashes(out)


def until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_any_number_of_workers_gives_the_same_bytes(
    large: Path, tmp_path: Path, undisturbed: list[str]
) -> None:
    code, out, err = finish(large, "--out", tmp_path / "two", "--workers", 2)
    assert code == 0, err
    assert hashes(tmp_path / "two") == undisturbed
    assert "Traceback" not in err and out.count("\n") > 12


# Interrupted runs


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    workers: int, large: Path, tmp_path: Path, undisturbed: list[str], seed: int
) -> None:
    rng = random.Random(seed)
    kills, attempt = 0, 0
    while kills < 5:
        out = tmp_path / f"out{attempt}"
        process = launch(large, "--out", out, "--workers", workers)
        until(lambda place=out / BLOCKS: place.is_dir())
        try:
            process.communicate(timeout=rng.uniform(0, 0.3 + 0.7 * workers))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0
        assert hashes(out) == undisturbed
        attempt += 1  # finished before it was killed: begin anew
    out = tmp_path / f"out{attempt}"
    code, _, err = finish(large, "--out", out, "--workers", workers)
    assert code == 0, err
    assert hashes(out) == undisturbed
    assert names(out) == ["run.json", "spectra.parquet", "table.parquet"]


KILLED_AT = (
    """
import os, pathlib, signal, sys
left = [int(sys.argv.pop(1))]
rename = pathlib.Path.replace
def replace(self, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.replace = replace
"""
    + COMMAND
)


@pytest.mark.parametrize("moment", [1, 4, 5, 6])
def test_killed_between_writing_and_renaming(moment: int, small: Path, tmp_path: Path) -> None:
    """Three blocks, then the two tables and run.json: each rename in its turn does not happen."""
    job, out = Job((str(small),)), tmp_path / "out"
    execute(job, Options(), tmp_path / "whole", 1)
    assert finish(moment, small, "--out", out, code=KILLED_AT)[0] == -signal.SIGKILL
    half = [name for name in names(out) + names(out / BLOCKS) if ".tmp" in name]
    assert half, "the kill must have left something half-done"
    assert not (out / "run.json").exists()
    execute(job, Options(), out, 1)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert names(out) == ["run.json", "spectra.parquet", "table.parquet"]


def _session(pid: int) -> list[int]:
    """Living processes of a session."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("workers", "sent"), [(1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_interrupted_it_says_one_sentence_and_leaves_no_process(
    workers: int, sent: signal.Signals, large: Path, tmp_path: Path, undisturbed: list[str]
) -> None:
    out = tmp_path / "out"
    process = launch(large, "--out", out, "--workers", workers, start_new_session=True)
    until(lambda: list(out.glob(f"{BLOCKS}/*.npz")))
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does: to all of its group
    else:
        process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert err == "rank-probe: interrupted; the same command with --out goes on.\n"
    else:
        assert process.returncode == -sent
    until(lambda: not _session(process.pid))
    assert list(out.glob(f"{BLOCKS}/*.npz")) and not (out / "run.json").exists()
    if workers == 1:
        assert finish(large, "--out", out, "--workers", 2)[0] == 0
        assert hashes(out) == undisturbed


def test_a_changed_file_is_measured_anew(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path, out = tmp_path / "w.safetensors", tmp_path / "out"
    write(path, wan(rng, layers=3))
    execute(Job((str(path),)), Options(), tmp_path / "first", 1)
    assert finish(4, path, "--out", out, code=KILLED_AT)[0] == -signal.SIGKILL
    assert len(list(out.glob(f"{BLOCKS}/*.npz"))) == 3
    time.sleep(0.01)
    write(path, wan(rng, layers=3))
    execute(Job((str(path),)), Options(), out, 1)
    execute(Job((str(path),)), Options(), tmp_path / "second", 1)
    assert hashes(out) == hashes(tmp_path / "second") != hashes(tmp_path / "first")
