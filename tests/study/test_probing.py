"""One run: result folder, places that cannot be written, secrets, Python's probe()."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from checkpoints.range_server import Site, serve
from probe_files import as_bf16, config, gqa, wan, write

from mla_study import probe
from mla_study.errors import UserError
from mla_study.probes.activations import save_covariance
from mla_study.probes.rank_probe import Options
from mla_study.probes.table import COLUMNS, SPECTRA_COLUMNS
from mla_study.study import probing
from mla_study.study.probe_report import document, listing, text_table
from mla_study.study.probing import BLOCKS, Job, execute, list_operators
from mla_study.study.runs import read_result


@pytest.fixture
def small(tmp_path: Path, seed: int) -> Path:
    return write(tmp_path / "w.safetensors", wan(np.random.default_rng(seed), layers=3))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# The result folder


def test_a_result_folder_holds_tables_and_the_record(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    probed, run = execute(Job((str(small),)), Options(), out, 1)
    assert names(out) == ["run.json", "spectra.parquet", "table.parquet"]
    result = read_result(out)
    assert result.run == json.loads(json.dumps(run))
    assert tuple(result.table.columns) == COLUMNS
    assert tuple(result.tables["spectra"].columns) == SPECTRA_COLUMNS
    for name, frame in (("table", probed.table), ("spectra", probed.spectra)):
        back = result.tables[name].astype(frame.dtypes.to_dict())
        pd.testing.assert_frame_equal(back, frame)
    assert (run["provenance"], run["validity"]) == ("measured", "full")
    assert run["identity"]["inputs"] == {str(small): probed.inputs[str(small)]}
    assert run["identity"]["config"]["options"]["operators"] == ["kv", "k", "v", "composed"]
    assert run["identity"]["seed"] == 0 and run["notes"] == probed.notes
    assert run["observed"]["bytes_read"] == probed.bytes_read > 0
    assert {"wall_s", "cpu_s", "peak_rss_mib"} <= set(run["observed"])


def test_parquet_holds_integers_and_missing_steps_as_such(small: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    execute(Job((str(small),)), Options(), tmp_path / "out", 1)
    schema = pq.read_schema(tmp_path / "out" / "table.parquet")
    kinds = dict(zip(schema.names, map(str, schema.types), strict=True))
    assert tuple(kinds) == COLUMNS
    integers = {"step", "layer", "head", "m", "n"}
    assert {name for name, kind in kinds.items() if kind == "int64"} == integers
    floats = {"value", "null_value", "null_se"}
    assert {name for name, kind in kinds.items() if kind == "double"} == floats
    assert {kinds[name] for name in set(kinds) - integers - floats} == {"string"}


def test_what_identifies_a_run(small: Path, tmp_path: Path) -> None:
    def record(**options: Any) -> dict[str, Any]:
        return execute(Job((str(small),)), Options.of(**options), None, 1)[1]

    first = record()
    assert first["run_hash"] == record()["run_hash"] != record(seed=1)["run_hash"]
    given = config(tmp_path / "c.json", num_layers=3)
    save_covariance(tmp_path / "c.safetensors", {str(n): np.eye(24) for n in range(3)})
    more = record(config=given, covariance=tmp_path / "c.safetensors")["identity"]["inputs"]
    assert set(more) == {
        str(small),
        f"--config {given}",
        f"--covariance {tmp_path / 'c.safetensors'}",
    }
    assert more[f"--config {given}"] == hashlib.sha256(given.read_bytes()).hexdigest()


# Places that cannot be written


def test_two_runs_do_not_share_a_folder(small: Path, tmp_path: Path) -> None:
    from mla_study.probes.store import locked

    with (
        locked(tmp_path / "out" / BLOCKS),
        pytest.raises(UserError, match="in use by another rank-probe"),
    ):
        execute(Job((str(small),)), Options(), tmp_path / "out", 1)


def test_out_must_be_a_folder_that_can_be_written(small: Path, tmp_path: Path) -> None:
    job = Job((str(small),))
    with pytest.raises(UserError, match=r"--out .*w\.safetensors is a file"):
        execute(job, Options(), small, 1)
    with pytest.raises(UserError, match="cannot be written"):
        execute(job, Options(), small / "inside", 1)
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot be written"):
            execute(job, Options(), tmp_path / "closed" / "out", 1)


@pytest.mark.parametrize("room", [0, 1, 4, 5, 6])
def test_a_full_disk_leaves_no_half_result(
    room: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes some files and then no more."""
    left = [room]
    whole = Path.write_bytes

    def limited(path: Path, data: Any) -> int:
        if left[0] == 0:
            whole(path, bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        left[0] -= 1
        return whole(path, data)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", limited)
        if room == 6:
            execute(Job((str(small),)), Options(), out, 1)
            return
        with pytest.raises(UserError, match="No space left on device"):
            execute(Job((str(small),)), Options(), out, 1)
    assert names(out) == [BLOCKS]
    assert not list(out.glob("**/*.tmp*"))
    execute(Job((str(small),)), Options(), out, 1)
    assert names(out) == ["run.json", "spectra.parquet", "table.parquet"]


@pytest.mark.parametrize("kilobytes", [24, 96])
def test_a_disk_that_really_is_full(kilobytes: int, small: Path, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        (place / "ballast").write_bytes(bytes(1024 * (kilobytes - 20)))
        with pytest.raises(UserError, match="No space left on device"):
            execute(Job((str(small),)), Options(), place / "out", 1)
        assert names(place / "out") == [BLOCKS]
        assert not list(place.glob("**/*.tmp*"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


# Jobs


def test_a_job_is_one_thing() -> None:
    for fields, told in (
        ({}, "nothing to probe"),
        ({"paths": ("a",), "series": ("b",)}, "give either paths"),
        ({"paths": ("a",), "pair": ("b", "c")}, "give either paths"),
        ({"paths": ("a", "b", "a")}, "a is given twice"),
        ({"pair": ("a", "a")}, "a is given twice"),
        ({"paths": ("https://h/m?k=1", "https://h/m?k=2")}, "https://h/m is given twice"),
        ({"paths": ("",)}, "a path is empty"),
        ({"paths": ("a",), "step_regex": "x"}, "--step-regex reads the steps of --series"),
    ):
        with pytest.raises(UserError, match=told):
            Job(**fields)  # type: ignore[arg-type]


def test_demo_weights_are_called_as_they_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "resolve", lambda p: f"/somewhere/{p}")
    [source] = Job(("demo:minilm",)).sources()
    assert (source.path, source.label) == ("/somewhere/demo:minilm", "demo:minilm")


def test_listing_measures_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "probe_sources", None)
    [report] = list_operators(Job((str(small),)), Options())
    assert len(report.found.attentions) == 3


# Addresses


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("no_proxy")
def test_range_reading_costs_the_tensors_and_keeps_secrets(
    tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    arrays, dtypes = as_bf16(wan(np.random.default_rng(seed), layers=4, d=256, cross=True))
    body = write(tmp_path / "w.safetensors", arrays, dtypes).read_bytes()
    out = tmp_path / "out"
    with serve(Site(files={"/w.safetensors": body}, etag='"1"')) as site:
        host = site.url.removeprefix("http://")
        job = Job((f"http://me:PASSWORD@{host}/w.safetensors?token=SECRET",))
        probed, run = execute(job, Options(), out, 1)
    kv = 4 * 2 * 2 * 256 * 256 * 2
    assert kv <= site.body_bytes <= 1.1 * kv
    assert probed.bytes_read == site.body_bytes
    assert len(site.requests) < 4 * 2 * 3 + 6, "one request for each tensor, about"
    assert set(probed.table["checkpoint"]) == {f"http://{host}/w.safetensors"}
    everything = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    text = repr(run) + json.dumps(document(probed, run, "raw")) + capfd.readouterr().err
    text += text_table(probed, "raw") + listing(probed.reports)
    for secret in ("SECRET", "PASSWORD"):
        assert secret.encode() not in everything and secret not in text
    local = probing.probe(tmp_path / "w.safetensors")
    pd.testing.assert_series_equal(local["value"], probed.table["value"])


@pytest.mark.usefixtures("no_proxy")
def test_two_workers_read_the_header_once_more_each(tmp_path: Path, seed: int) -> None:
    arrays, dtypes = as_bf16(wan(np.random.default_rng(seed), layers=6, d=256))
    body = write(tmp_path / "w.safetensors", arrays, dtypes).read_bytes()
    with serve(Site(files={"/w.safetensors": body})) as site:
        probed, _ = execute(Job((f"{site.url}/w.safetensors",)), Options(), None, 2)
    kv = 6 * 2 * 256 * 256 * 2
    assert kv <= site.body_bytes <= 1.05 * kv
    assert probed.bytes_read == site.body_bytes


# Python


def test_probe_is_the_command_in_python(small: Path, tmp_path: Path, seed: int) -> None:
    frame = probe(small)
    assert tuple(frame.columns) == COLUMNS and set(frame["checkpoint"]) == {str(small)}
    second = write(tmp_path / "g.safetensors", gqa(np.random.default_rng(seed)))
    both = probe(str(small), second, operators="kv,qk", heads=6, out=tmp_path / "out")
    assert list(dict.fromkeys(both["checkpoint"])) == [str(small), str(second)]
    assert set(both["operator"]) == {"kv", "qk"}
    assert names(tmp_path / "out") == ["run.json", "spectra.parquet", "table.parquet"]
    assert len(read_result(tmp_path / "out").table) == len(both)
    pd.testing.assert_frame_equal(both, probe(small, second, operators=["kv", "qk"], heads=6))


def test_probe_refuses_in_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to probe"):
        probe()
    with pytest.raises(UserError, match="does not exist"):
        probe(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="no option 'operator'"):
        probe(tmp_path, operator="kv")
