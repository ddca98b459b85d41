"""Blocks measured by one process or several: same bytes, nothing twice, no orphan."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from probe_files import as_bf16, config, wan, write

from mla_study.checkpoints.reader import OpenSpec
from mla_study.errors import UserError
from mla_study.probes import work
from mla_study.probes.activations import save_covariance
from mla_study.probes.rank_probe import Options, inspect
from mla_study.probes.table import Source
from mla_study.probes.work import Item, Store, load, measure, run, serve


def items_of(path: Path, options: Options | None = None, subspace: int = 0) -> list[Item]:
    options = options or Options()
    opened = inspect(Source(str(path), path.name), options)
    request = replace(options.request, subspace=subspace)
    found = [opened.item(a, request) for a in opened.report.found.attentions]
    opened.checkpoint.close()
    return found


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    work.close_all()


@pytest.fixture
def checkpoint(tmp_path: Path, seed: int) -> Path:
    return write(tmp_path / "w.safetensors", wan(np.random.default_rng(seed), layers=5, d=19))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_two_workers_give_the_bytes_of_one(checkpoint: Path, tmp_path: Path) -> None:
    items = items_of(checkpoint, subspace=-1)
    one, two = Store(tmp_path / "one", "salt"), Store(tmp_path / "two", "salt")
    seen: list[tuple[int, int]] = []
    run(items, one, workers=1)
    run(items, two, workers=2, progress=lambda done, read: seen.append((done, read)))

    def values(store: Store) -> dict[str, bytes]:
        # how many bytes a worker read depends on who opened the file
        found = {item.key("salt"): load(item, store) for item in items}
        return {key: pickle.dumps(replace(m, bytes_read=0)) for key, m in found.items()}

    assert len(values(one)) == 5
    assert values(one) == values(two)
    assert sum(done for done, _ in seen) == 5
    total = sum(read for _, read in seen)
    parts = 5 * (2 * 19 * 19 + 19) * 4
    header = 5 * 6 * 120
    assert parts <= total <= parts + 2 * header


def test_what_is_held_is_not_measured_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, store = items_of(checkpoint), Store(tmp_path / "s")
    run(items[:3], store, workers=1)
    measured: list[str] = []

    def spy(item: Item) -> work.Measured:
        measured.append(item.attention.block)
        return measure(item)

    monkeypatch.setattr(work, "measure", spy)
    ticks: list[int] = []
    run(items, store, workers=1, progress=lambda done, read: ticks.append(done))
    assert measured == [item.attention.block for item in items[3:]]
    assert ticks == [3, 1, 1]
    store.path(items[0].key("")).write_bytes(b"damaged")
    run(items, store, workers=1)
    assert measured[2:] == [items[0].attention.block]


def test_a_key_tells_apart_all_that_a_result_depends_on(
    checkpoint: Path, tmp_path: Path, seed: int
) -> None:
    items = items_of(checkpoint)
    item = items[0]
    save_covariance(tmp_path / "c.safetensors", {"a": np.eye(19), "b": np.eye(19)})
    covariance = (str(tmp_path / "c.safetensors"), "a")
    weighted = replace(item, covariance=covariance)
    others = [
        *items[1:],
        replace(item, identity="other"),
        replace(item, spec=replace(item.spec, weights="generator_ema")),
        replace(item, request=replace(item.request, operators=("k",))),
        replace(item, request=replace(item.request, exact_tail=True)),
        replace(item, request=replace(item.request, subspace=3)),
        replace(item, attention=replace(item.attention, kind="cross")),
        replace(item, attention=replace(item.attention, norms={})),
        weighted,
        replace(weighted, seed=1),
        replace(item, covariance=(covariance[0], "b")),
    ]
    keys = {other.key("") for other in others}
    assert len(keys) == len(others)
    assert item.key("") not in keys
    assert item.key("x") != item.key("")
    assert item.key("") == items_of(checkpoint)[0].key("")
    # the seed and the number of the layer change nothing that is measured
    assert item.key("") == replace(item, seed=9).key("")
    assert item.key("") == replace(item, attention=replace(item.attention, layer=7)).key("")
    addresses = [OpenSpec(f"https://h/m.safetensors{query}") for query in ("", "?sig=1", "?sig=2")]
    assert len({replace(item, spec=spec).key("") for spec in addresses}) == 1
    time.sleep(0.01)
    save_covariance(covariance[0], {"a": 2 * np.eye(19)})
    assert weighted.key("") not in keys


def test_a_changed_file_or_config_is_another_item(checkpoint: Path, seed: int) -> None:
    before = items_of(checkpoint)
    config(checkpoint.with_name("config.json"), num_layers=5)
    with_config = items_of(checkpoint)
    assert before[0].key("") != with_config[0].key("")
    arrays = wan(np.random.default_rng(seed + 1), layers=5, d=19)
    time.sleep(0.01)
    write(checkpoint, arrays)
    after = items_of(checkpoint)
    assert with_config[0].key("") != after[0].key("")
    with pytest.raises(UserError, match="changed while it was being probed"):
        measure(before[0])


def test_opened_checkpoints_are_few_and_closed(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    items: list[Item] = []
    for number in range(9):
        path = write(tmp_path / f"{number}.safetensors", wan(rng, layers=1, d=5))
        items += items_of(path)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").exists() else 0
    seen: list[int] = []
    run(items, Store(tmp_path / "s"), 1, lambda *_: seen.append(len(work._open)))
    assert max(seen) <= 4
    assert not work._open
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_the_first_users_error_comes_through_from_a_worker(tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=4, d=8)
    arrays["blocks.2.self_attn.k.weight"][1, 1] = np.nan
    items = items_of(write(tmp_path / "w.safetensors", arrays))
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"blocks\.2\.self_attn\.k\.weight"):
            run(items, Store(tmp_path / f"{workers}"), workers)
    left = list((tmp_path / "1").iterdir())
    assert len(left) == 2, "what was finished before stays"


def _children() -> set[int]:
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return {int(pid) for pid in path.read_text().split()} if path.exists() else set()


def test_a_worker_that_dies_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = work._start

    def killed() -> subprocess.Popen[bytes]:
        child = start()
        child.kill()
        return child

    monkeypatch.setattr(work, "_start", killed)
    before = _children()
    with pytest.raises(UserError, match=r"w\.safetensors: a worker ended by signal SIGKILL"):
        run(items_of(checkpoint), Store(tmp_path / "s"), workers=2)
    assert _children() <= before


def test_an_error_of_our_own_shows_its_traceback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([(items_of(checkpoint)[0], "nowhere")] * 2)
    problems = iter([ZeroDivisionError("ours"), MemoryError()])
    replies = io.BytesIO()

    def receive() -> tuple[Item, str]:
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    def fail(item: Item) -> work.Measured:
        raise next(problems)

    monkeypatch.setattr(work, "measure", fail)
    serve(receive, replies.write)
    first, second = (json.loads(line) for line in replies.getvalue().splitlines())
    assert first[0] == "crash" and "ZeroDivisionError: ours" in first[1]
    assert second[0] == "error" and "too little memory for block 'blocks.0.self_attn'" in second[1]


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_ends_with_its_parent(busy: bool, tmp_path: Path, seed: int) -> None:
    """Also in the middle of a block: its result must not appear after a new run has begun."""
    d = 1400 if busy else 8
    arrays, dtypes = as_bf16(wan(np.random.default_rng(seed), layers=1, d=d))
    [item] = items_of(write(tmp_path / "w.safetensors", arrays, dtypes))
    child = work._start()
    assert child.stdin is not None and child.stdout is not None
    result = tmp_path / "x.npz"
    if busy:
        pickle.dump((item, str(result)), child.stdin)
        child.stdin.flush()
        time.sleep(0.8)
    child.stdin.close()
    child.wait(timeout=20)
    child.stdout.close()
    assert not busy or not result.exists()


def test_a_worker_does_not_import_from_the_working_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("numpy", "pickle", "signal", "mla_study"):
        (trap / f"{name}.py").write_text("raise SystemExit('taken')")
    items = items_of(checkpoint)
    monkeypatch.chdir(trap)
    run(items, Store(tmp_path / "s"), workers=2)
    assert len(list((tmp_path / "s").iterdir())) == 5


def test_a_worker_ignores_the_terminals_interrupt(checkpoint: Path, tmp_path: Path) -> None:
    child = work._start()
    assert child.stdin is not None and child.stdout is not None
    assert os.getpgid(child.pid) != os.getpgrp()
    [item, *_] = items_of(checkpoint)
    pickle.dump((item, str(tmp_path / "x.npz")), child.stdin)
    child.stdin.flush()
    assert json.loads(child.stdout.readline())[0] == "done"
    child.send_signal(signal.SIGINT)
    pickle.dump((item, str(tmp_path / "y.npz")), child.stdin)
    child.stdin.flush()
    assert json.loads(child.stdout.readline())[0] == "done"
    child.stdin.close()
    assert child.wait(timeout=20) == 0
    child.stdout.close()


def test_weighted_nulls_belong_to_the_block(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    [item] = items_of(write(tmp_path / "w.safetensors", wan(rng, layers=1, d=9)))
    inputs = rng.standard_normal((40, 9)) * np.geomspace(3, 0.2, 9)
    save_covariance(tmp_path / "c.safetensors", {"x": inputs.T @ inputs / 40})
    found = measure(replace(item, covariance=(str(tmp_path / "c.safetensors"), "x")))
    weighted = [n for n, s in enumerate(found.spectra) if s.gauge.startswith("weighted")]
    assert list(found.nulls) == weighted and weighted
    assert "covariance x" in found.digests
    flat = measure(replace(item, covariance=None))
    assert not flat.nulls
    save_covariance(tmp_path / "z.safetensors", {"x": np.zeros((9, 9))})
    with pytest.raises(UserError, match="all zero"):
        measure(replace(item, covariance=(str(tmp_path / "z.safetensors"), "x")))


def test_items_and_specs_travel(checkpoint: Path) -> None:
    item = items_of(checkpoint)[0]
    assert pickle.loads(pickle.dumps(item)) == item
    assert isinstance(item.spec, OpenSpec)
    assert item.cost() > 0
    assert sys.executable
