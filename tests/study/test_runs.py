from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_study.config import wan_1_3b
from mla_study.errors import UserError
from mla_study.study import observe, runs

INPUTS = {"weights": "ab" * 32}


def frame(seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "layer": np.arange(7),
            "operator": pd.Categorical(["k", "v", "kv", "k", "v", "kv", "q"]),
            "value": np.append(random.normal(size=6), np.nan),
        },
        index=range(10, 17),
    )


def write(folder: Path, **changed: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "config": {"tau": 0.99, "ks": (64, 128)},
        "inputs": INPUTS,
        "seed": 3,
        "modules": ["mla_study.study.runs"],
        "provenance": "measured",
        "validity": "full",
        "units": {"value": "1"},
    }
    tables = changed.pop("tables", {"table": frame()})
    return runs.write_result(folder, tables, **{**arguments, **changed})


def test_identity_is_hashed_and_observation_is_not(tmp_path: Path) -> None:
    with runs.Stopwatch() as watch:
        first = write(tmp_path / "a")
    again = write(tmp_path / "b", observed=watch.observed(), notes=["a note"])
    assert first["run_hash"] == again["run_hash"]
    assert again["observed"]["wall_s"] >= 0
    files = [tmp_path / name / "table.parquet" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["run.json", "table.parquet"]
    hashes = {first["run_hash"]}
    for change in (
        {"config": {"tau": 0.98, "ks": (64, 128)}},
        {"inputs": {"weights": "cd" * 32}},
        {"seed": None},
        {"modules": ["mla_study.config"]},
    ):
        hashes.add(write(tmp_path / "c", **change)["run_hash"])
    assert len(hashes) == 5


def test_read_back_and_refuse_what_was_touched(tmp_path: Path) -> None:
    run = write(tmp_path, tables={"table": frame(), "spectra": frame(1)}, config=wan_1_3b())
    result = runs.read_result(tmp_path)
    assert result.run_hash == run["run_hash"]
    assert (result.provenance, result.validity) == ("measured", "full")
    assert result.run["identity"]["config"]["width"] == 1536
    pd.testing.assert_frame_equal(
        result.table, frame().astype({"operator": "str"}).reset_index(drop=True)
    )
    (tmp_path / "spectra.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"spectra\.parquet is not the table"):
        runs.read_result(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match="no run record"):
        runs.read_result(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        runs.read_result(tmp_path / "absent")


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, hashlib, pandas as pd; from mla_study.study.runs import parquet_bytes;"
        "f = pd.DataFrame({'a': range(999), 'b': ['x', 'yy', 'z'] * 333});"
        "f = f.convert_dtypes() if sys.argv[1] == '2' else f;"
        "print(hashlib.sha256(parquet_bytes(f)).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, seed],
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(seen) == 1


@pytest.mark.parametrize("at", ["replace", "write_bytes"])
def test_disk_full_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    before = write(tmp_path)
    old = (tmp_path / "table.parquet").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, at, full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path, tables={"table": frame(5)})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json", "table.parquet"]
    assert (tmp_path / "table.parquet").read_bytes() == old
    assert runs.read_result(tmp_path).run_hash == before["run_hash"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "out")


def test_atomic_write_with_a_function(tmp_path: Path) -> None:
    runs.atomic_write(tmp_path / "deep" / "x.txt", lambda to: to.write_text(to.suffix))
    assert (tmp_path / "deep" / "x.txt").read_text() == ".txt"

    def fails(to: Path) -> None:
        to.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.atomic_write(tmp_path / "deep" / "x.txt", fails)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["x.txt"]
    assert (tmp_path / "deep" / "x.txt").read_text() == ".txt"


@given(st.floats(width=64), st.integers(1, 17))
def test_rounding_is_the_decimal_one(value: float, digits: int) -> None:
    (rounded,) = runs.round_significant(np.array([value]), digits).tolist()
    if math.isnan(value):
        assert math.isnan(rounded)
    else:
        assert rounded == float(f"{value:.{digits}g}")
        assert math.copysign(1, rounded) == math.copysign(1, value)


def test_rounding_forgives_the_last_bits_and_leaves_other_columns() -> None:
    table = pd.DataFrame({"value": [0.1 + 0.2, np.inf, np.nan], "n": [1, 2, 3], "s": list("abc")})
    rounded = runs.round_significant(table)
    assert rounded["value"].tolist()[:2] == [0.3, math.inf]
    assert rounded["n"].dtype == table["n"].dtype
    assert table["value"][0] != 0.3
    shaped = runs.round_significant(np.full((2, 3), 1 / 3, dtype=np.float32), 3)
    assert shaped.dtype == np.float32
    assert shaped.shape == (2, 3)


def test_canonical_json() -> None:
    value = {"b": np.int64(2), "a": {"y": (1, 2.5), "x": math.nan}, "é": {3, 1}}
    assert runs.canonical_json(value) == '{"a":{"x":"nan","y":[1,2.5]},"b":2,"\\u00e9":[1,3]}'
    with pytest.raises(TypeError, match="PosixPath"):
        runs.canonical_json({"path": Path("/x")})


def test_unknown_class_is_refused() -> None:
    record = {"config": {}, "inputs": {}, "seed": None, "modules": []}
    for wrong in ({"provenance": "guessed"}, {"validity": "half"}):
        with pytest.raises(Exception, match=r"guessed|half"):
            runs.run_record(**{**record, "provenance": "measured", "validity": "full", **wrong})


def test_stopwatch_counts_children() -> None:
    burn = "x = sum(i * i for i in range(2_000_000))"
    with runs.Stopwatch() as watch:
        subprocess.run([sys.executable, "-c", burn], check=True)
    spent = watch.cpu
    assert spent > 0
    assert watch.wall > 0
    assert watch.cpu == spent
    assert runs.peak_memory()["self"] > 10
    with pytest.raises(RuntimeError):
        _ = runs.Stopwatch().wall


def test_revision_of_a_checkout_only(tmp_path: Path) -> None:
    assert observe.git_state(tmp_path) is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    git("init")
    assert observe.git_state(tmp_path) is None
    (tmp_path / "file").write_text("x")
    git("add", "file")
    git("commit", "-m", "x")
    state = observe.git_state(tmp_path)
    assert state is not None
    assert len(state["revision"]) == 40
    assert state["dirty"] is False
    (tmp_path / "file").write_text("y")
    state = observe.git_state(tmp_path)
    assert state is not None
    assert state["dirty"] is True


def test_run_file_is_plain_json(tmp_path: Path) -> None:
    write(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert run["tables"]["table"]["rows"] == 7
    assert "date" in run["observed"]
