from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mla_study.errors import UserError
from mla_study.study import staleness
from mla_study.study.notebooks import Project, discover
from mla_study.study.runs import file_sha256, read_record

from .conftest import MODULE, Checkout


@pytest.fixture(autouse=True)
def own_analysis_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``analysis`` of the throwaway checkout, not one that another test has imported."""
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def take() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == "analysis"]
        return {name: sys.modules.pop(name) for name in names}

    before = take()
    yield
    take()
    sys.modules.update(before)


def age(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file look as if it had stood for a while, which ctime does not let us set."""
    monkeypatch.setattr(staleness, "RACY_NS", -(10**12))


def test_cache_sees_a_change_that_keeps_size_and_mtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    age(file, monkeypatch)
    cache = staleness.HashCache(tmp_path / "cache.json")
    first = cache.sha256(file)
    cache.save()
    status = file.stat()
    time.sleep(0.02)
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    again = staleness.HashCache(tmp_path / "cache.json").sha256(file)
    assert first != again == file_sha256(file)


def test_cache_is_only_a_shortcut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    calls: list[Path] = []

    def count(path: Path) -> str:
        calls.append(path)
        return file_sha256(path)

    monkeypatch.setattr(staleness, "file_sha256", count)
    cache = staleness.HashCache(tmp_path / "cache.json")
    # Just written: it could change again within the clock's grain, so nothing is kept.
    assert cache.sha256(file) == cache.sha256(file) == file_sha256(file)
    assert len(calls) == 2
    age(file, monkeypatch)
    assert cache.sha256(file) == cache.sha256(file)
    assert len(calls) == 3
    cache.save()
    for junk in ("", "[]", "null"):
        (tmp_path / "cache.json").write_text(junk)
        assert staleness.HashCache(tmp_path / "cache.json").sha256(file) == file_sha256(file)
    with pytest.raises(UserError, match="cannot be read"):
        cache.sha256(tmp_path / "absent")


def test_each_part_changes_with_its_own_cause(checkout: Checkout) -> None:
    inputs = checkout.root / "weights"
    inputs.mkdir()
    (inputs / "a.bin").write_bytes(b"a")
    module = MODULE + f"\n\ndef INPUTS():\n    return {{'demo': {str(inputs)!r}}}\n"
    checkout.add("fig7_inputs", module=module)
    project = Project(checkout.root)
    record = checkout.root / "results/data/line/run.json"
    record.write_text(json.dumps({"run_hash": "x", "observed": {"date": "today"}}))

    def parts(slope: float = 1.5) -> dict[str, str]:
        (figure,) = discover(project)
        cache = staleness.HashCache(checkout.root / "cache.json")
        return staleness.key_parts(figure, project, figure.values({"slope": slope}), cache)

    def changed() -> set[str]:
        return {name for name, value in parts().items() if value != before[name]}

    before = parts()
    record.write_text(json.dumps({"run_hash": "x", "observed": {"date": "tomorrow"}}))
    assert changed() == set()
    (inputs / "b.bin").write_bytes(b"b")
    assert changed() == {"inputs"}
    (inputs / "b.bin").unlink()
    record.write_text(json.dumps({"run_hash": "y"}))
    assert changed() == {"data"}
    record.write_text(json.dumps({"run_hash": "x"}))
    source = checkout.root / "analysis" / "fig7_inputs.py"
    text = source.read_text()
    source.write_text(text + "# a remark\n")
    assert changed() == {"code"}
    source.write_text(text)
    assert {n for n, v in parts(2.0).items() if v != before[n]} == {"parameters"}
    assert changed() == set()


def test_reasons(tmp_path: Path) -> None:
    parts = {"code": "1", "data": "2"}
    output = tmp_path / "fig.png"
    output.write_bytes(b"x")
    stamp = tmp_path / "stamp.json"
    staleness.write_stamp(stamp, parts, {"fig.png": file_sha256(output)})

    def why(now: dict[str, str] = parts) -> str:
        return staleness.why_stale(read_record(stamp), now, tmp_path)

    assert why() == ""
    assert why({**parts, "data": "3"}) == "changed: data"
    output.write_bytes(b"y")
    assert why() == "fig.png was edited"
    output.unlink()
    assert why() == "fig.png is missing"
    for junk in ("", "[]", "{", '{"parts": 1, "outputs": {}}'):
        stamp.write_text(junk)
        assert why() == "never drawn"
