"""How fast ``rank-probe`` is: against its own arithmetic floor, and against WeightWatcher.

One process, variants interleaved, CPU seconds of one BLAS thread; every ratio comes from the same
run. Worth running on a machine that does nothing else::

    mla-study bench-probe --layers 4 --repeats 1
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import scipy.linalg
from scipy.linalg.blas import dsyrk  # pyright: ignore[reportAttributeAccessIssue,reportUnknownVariableType]

from mla_study.errors import UserError
from mla_study.evaluation.goals import Goal, Row, say, show, write_rows
from mla_study.probes.eigenvalues import symmetric_eigenvalues, two_stage_solver
from mla_study.probes.rank_probe import Options, inspect, probe_sources
from mla_study.probes.table import Source
from mla_study.probes.work import Store, one_thread

JOINT = Options(operators=("kv",), gauges=("raw",))
DEFAULT = Options()
APART = Options(operators=("k", "v"), gauges=("raw",))
# (Grams, eigenvalue problems) a layer that nothing can save: K, V; and K folded, five more spectra
WORK = {"joint": (2, 1), "default": (3, 6)}
GOALS = {
    "joint_cpu_s": Goal("<=", 16.0),
    "default_cpu_s": Goal("<=", 60.0),
    "joint_over_floor": Goal("<=", 2.0),
    "default_over_floor": Goal("<=", 2.0),
    "weightwatcher_over_apart": Goal(">=", 3.0),
    "weightwatcher_over_joint": Goal(">=", 4.0),
    "worker_peak_1_3b_mb": Goal("<=", 400.0),
    "worker_peak_14b_mb": Goal("<=", 900.0),
    "bytes_over_kv_bytes": Goal("<=", 1.05),
    "speedup_2_workers": Goal(">=", 1.7),
}
UNITS = {"_cpu_s": "CPU seconds", "_workers_s": "s", "_mb": "MB", "_gflops": "GF/s"}


def write_synthetic(path: Path, layers: int, width: int, seed: int = 0) -> None:
    """A Wan-named bf16 checkpoint: q, k, v, o and norm gains of each block, decaying spectra.

    The joint [K; V] of 1536 columns holds about 0.46 of its energy in 192 directions, as the paper
    says of Wan 1.3B. Written block by block, so that memory stays at a few matrices.
    """
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(2))
    sigma = 1.0 / (1.0 + np.arange(width) / (0.16 * width)) + 0.02
    left = (left * sigma).astype(np.float32)
    right = right.T.astype(np.float32)
    header: dict[str, Any] = {}
    offset = 0

    def entry(name: str, shape: Sequence[int]) -> None:
        nonlocal offset
        size = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size

    for layer in range(layers):
        for role in "qkvo":
            entry(f"blocks.{layer}.self_attn.{role}.weight", (width, width))
        for role in "qk":
            entry(f"blocks.{layer}.self_attn.norm_{role}.weight", (width,))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(layers):
            for _ in "qkvo":
                rows, columns = rng.permutation(width), rng.permutation(width)
                weight = left[rows] @ right[:, columns] / np.float32(width**0.5)
                file.write(_bf16(weight))
            for _ in "qk":
                file.write(_bf16(rng.uniform(0.5, 1.5, width).astype(np.float32)))


def _bf16(values: np.ndarray) -> bytes:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def _cpu(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def _probe(path: Path, options: Options, workers: int = 1) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Source(str(path), path.name)
        return probe_sources([source], options, Store(Path(folder)), workers).bytes_read


def _floor(layers: int, width: int, work: tuple[int, int]) -> float:
    """CPU seconds of nothing but dsyrk and eigenvalues, on matrices of these shapes."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((width, width))
    gram = dsyrk(1.0, weight.T, lower=1)
    grams, problems = work

    def once() -> None:
        for _ in range(grams):
            dsyrk(1.0, weight.T, lower=1)
        for _ in range(problems):
            symmetric_eigenvalues(gram.copy(order="F"), overwrite=True)

    return sum(_cpu(once) for _ in range(layers))


def _peak_mb(path: Path) -> float:
    """Peak memory of a process that measures one block, above what its imports took."""
    code = (
        "import sys\n"
        "from mla_study.evaluation.bench_probe import inspect, DEFAULT, Source\n"
        "from mla_study.probes.work import measure\n"
        "from mla_study.study.observe import peak_memory\n"
        "opened = inspect(Source(sys.argv[1], 'x'), DEFAULT)\n"
        "before = peak_memory()['self']\n"
        "measure(opened.item(opened.report.found.attentions[0], DEFAULT.request))\n"
        "print(peak_memory()['self'] - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout) * 2**20 / 1e6


def _weightwatcher(path: Path, layers: int) -> float:
    """CPU seconds of WeightWatcher's analysis of the same K and V tensors."""
    try:
        import torch
        import weightwatcher
    except ImportError as error:
        raise UserError(
            f"the comparison needs {error.name}: install it with `pip install -e '.[bench,torch]'`"
        ) from None
    import logging

    from mla_study.checkpoints.opening import open_checkpoint

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(str(path))
    model = torch.nn.Module()
    for layer in range(layers):
        for role in "kv":
            values = checkpoint.read(f"blocks.{layer}.self_attn.{role}.weight")
            linear = torch.nn.Linear(values.shape[1], values.shape[0], bias=False)
            linear.weight.data = torch.from_numpy(np.array(values))
            model.add_module(f"{role}{layer}", linear)
    watcher = weightwatcher.WeightWatcher(model=model)
    analysed = 0

    def analyse() -> None:
        nonlocal analysed
        analysed = len(watcher.analyze(plot=False))

    seconds = _cpu(analyse)
    if analysed != 2 * layers:
        raise UserError(f"WeightWatcher analysed {analysed} of {2 * layers} tensors: no comparison")
    return seconds


def _nearer_ways(width: int) -> dict[str, float]:
    """CPU seconds of the ways to the eigenvalues of one Gram of this width."""
    rng = np.random.default_rng(2)
    gram = dsyrk(1.0, rng.standard_normal((2 * width, width)).T, lower=1)
    single = np.asfortranarray(gram, dtype=np.float32)

    def plain(matrix: np.ndarray) -> Callable[[], object]:
        return lambda: scipy.linalg.eigh(matrix, lower=True, eigvals_only=True, driver="evd")

    ways: dict[str, Callable[[], object]] = {"dsyevd": plain(gram), "ssyevd": plain(single)}
    solver = two_stage_solver()
    if solver is not None:
        ways["dsyevd_2stage"] = lambda: solver(gram, False)
    ways["svdvals"] = lambda: scipy.linalg.svdvals(gram)
    return {f"eigenvalues_{width}_{name}_cpu_s": _cpu(way) for name, way in ways.items()}


def bench_probe(layers: int = 30, repeats: int = 3, write: bool = True) -> int:
    """Run everything, print the table with its goals, and write ``results/data/bench_probe``."""
    values: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, one_thread():
        path, wide = Path(folder) / "wan_shaped.safetensors", Path(folder) / "wide.safetensors"
        _say(f"writing {layers} blocks of width 1536 and one of 5120 (bf16)")
        write_synthetic(path, layers, 1536)
        write_synthetic(wide, 1, 5120)
        runs: dict[str, list[float]] = {}
        for turn in range(repeats):
            for name, action in (
                ("joint", lambda: _probe(path, JOINT)),
                ("joint_floor", lambda: _floor(layers, 1536, WORK["joint"])),
                ("default", lambda: _probe(path, DEFAULT)),
                ("default_floor", lambda: _floor(layers, 1536, WORK["default"])),
                ("apart", lambda: _probe(path, APART)),
            ):
                seconds = _cpu(action)
                runs.setdefault(name, []).append(seconds)
                _say(f"repeat {turn + 1} of {repeats}: {name} {seconds:.2f} CPU-s")
        _say("WeightWatcher on the same K and V (minutes)")
        watched = _weightwatcher(path, layers)
        mid = {name: median(times) for name, times in runs.items()}
        scale = 30 / layers
        values["gemm_gflops"] = _gflops()
        values |= {f"{name}_cpu_s": seconds * scale for name, seconds in mid.items()}
        values["weightwatcher_cpu_s"] = watched * scale
        values["joint_over_floor"] = mid["joint"] / mid["joint_floor"]
        values["default_over_floor"] = mid["default"] / mid["default_floor"]
        values["weightwatcher_over_apart"] = watched / mid["apart"]
        values["weightwatcher_over_joint"] = watched / mid["joint"]
        report, *_ = inspect(Source(str(path), "x"), DEFAULT)
        kv_bytes = sum(
            2 * a.parts[r].m * a.parts[r].n for a in report.found.attentions for r in "kv"
        )
        values["bytes_over_kv_bytes"] = _probe(path, DEFAULT) / kv_bytes
        _say("one worker against two (wall seconds)")
        for workers in (1, 2):
            start = time.perf_counter()
            _probe(path, DEFAULT, workers)
            values[f"wall_{workers}_workers_s"] = time.perf_counter() - start
        values["speedup_2_workers"] = values["wall_1_workers_s"] / values["wall_2_workers_s"]
        values["worker_peak_1_3b_mb"] = _peak_mb(path)
        values["worker_peak_14b_mb"] = _peak_mb(wide)
        for width in (1536, 3072):
            values |= _nearer_ways(width)
    rows = _rows(values, layers)
    show(rows)
    if write:
        spread = [
            (name, turn, seconds) for name, ts in runs.items() for turn, seconds in enumerate(ts)
        ]
        write_rows(
            "bench_probe",
            rows,
            config={"layers": layers, "repeats": repeats, "width": 1536, "dtype": "bf16"},
            modules=("mla_study.evaluation.bench_probe",),
            more={"repeats": pd.DataFrame(spread, columns=["variant", "repeat", "cpu_s"])},
        )
    return 0


def _gflops() -> float:
    """float64 GF/s of one core in a matrix product of 1536."""
    a = np.random.default_rng(3).standard_normal((1536, 1536))
    np.matmul(a, a)
    return 3 * 2 * 1536**3 / _cpu(lambda: [np.matmul(a, a) for _ in range(3)]) / 1e9


def _say(line: str) -> None:
    say("bench-probe", line)


def _rows(values: dict[str, float], layers: int) -> list[Row]:
    setting = "" if layers == 30 else f"seconds scaled from {layers} blocks to 30"
    return [
        Row(
            name,
            value,
            next((unit for end, unit in UNITS.items() if name.endswith(end)), "ratio"),
            setting,
            GOALS.get(name),
        )
        for name, value in values.items()
    ]
