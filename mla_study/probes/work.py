"""Measure many attention blocks: one process a core, one BLAS thread each, each block kept on disk.

What a block gives depends on the block alone, so that any number of workers, and a run that was
interrupted or killed and started again, end with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import Attention
from mla_study.checkpoints.reader import Checkpoint, OpenSpec
from mla_study.errors import UserError
from mla_study.probes.block import measure_block, root_of, weighted_nulls
from mla_study.probes.layer import Request
from mla_study.probes.names import public_name
from mla_study.probes.stacks import Weights
from mla_study.probes.store import Measured, Store, read_measured, write_measured

__all__ = [
    "Item",
    "Measured",
    "Store",
    "close_all",
    "closing",
    "default_workers",
    "identity",
    "keep_open",
    "load",
    "measure",
    "one_thread",
    "run",
    "serve",
]

# below this much arithmetic a second process costs more than it brings (a second or two a core)
_PARALLEL_FLOPS = 6e10
_THREAD_LIMITS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_KEEP_OPEN = 4


@dataclass(frozen=True)
class Item:
    """One block of one checkpoint to measure.

    ``identity`` is :func:`identity` of the checkpoint; ``covariance`` is (file, key) of the second
    moment of the block's inputs; ``seed`` is that of its null models.
    """

    spec: OpenSpec
    identity: str
    attention: Attention
    request: Request
    covariance: tuple[str, str] | None = None
    seed: int = 0

    def key(self, salt: str) -> str:
        """Name of the item's result in a store: a digest of all that the result depends on.

        An address counts without its query, so that a fresh signature goes on with the same run.
        """
        parts = {role: asdict(part) for role, part in self.attention.parts.items()}
        covariance = None
        if self.covariance is not None:
            stat = Path(self.covariance[0]).stat()
            covariance = [*self.covariance, stat.st_size, stat.st_mtime_ns, self.seed]
        text = json.dumps(
            [
                salt,
                {k: v and public_name(v) for k, v in asdict(self.spec).items()},
                self.identity,
                self.attention.block,
                self.attention.kind,
                self.attention.layout,
                parts,
                dict(self.attention.norms),
                None if self.attention.heads is None else asdict(self.attention.heads),
                asdict(self.request),
                covariance,
            ],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def cost(self) -> float:
        """Rough floating-point operations, to decide whether workers pay."""
        sizes = [(p.m, p.n) for p in self.attention.parts.values()]
        return sum(12.0 * min(m, n) ** 2 * max(m, n) for m, n in sizes)


_open: OrderedDict[tuple[OpenSpec, str], Checkpoint] = OrderedDict()


def identity(checkpoint: Checkpoint) -> str:
    """Digest of what a checkpoint's values depend on: its files, cheaply, and its configs."""
    related = [checkpoint, *(vars(checkpoint).get(name) for name in ("_adapter", "_base"))]
    names = ("config", "adapter_config")
    configs = [vars(c).get(name) for c in related if c is not None for name in names]
    text = json.dumps([checkpoint.fingerprint, configs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def keep_open(checkpoint: Checkpoint) -> None:
    """Let :func:`measure` use a checkpoint that is open: no header is read twice."""
    _open[checkpoint.spec, identity(checkpoint)] = checkpoint
    while len(_open) > _KEEP_OPEN:
        _open.popitem(last=False)[1].close()


def close_all() -> None:
    """Close the checkpoints that :func:`measure` left open in this process."""
    while _open:
        _open.popitem()[1].close()


@contextlib.contextmanager
def closing() -> Generator[None]:
    """Close at the end what stayed open, whatever happened."""
    try:
        yield
    finally:
        close_all()


def _opened(item: Item) -> tuple[Checkpoint, int]:
    """The item's checkpoint, and how many bytes opening it took now."""
    known = _open.get((item.spec, item.identity))
    if known is not None:
        return known, 0
    checkpoint = open_checkpoint(item.spec)
    if identity(checkpoint) != item.identity:
        checkpoint.close()
        raise UserError(
            f"{public_name(item.spec.path)} changed while it was being probed: probe it again"
        )
    keep_open(checkpoint)
    return checkpoint, checkpoint.bytes_read


@lru_cache(maxsize=1)
def _inputs(path: str, key: str, mtime: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Root [n, c] of a stored covariance C = root root^T, its eigenvalues, and its sha256."""
    from mla_study.probes.activations import load_covariance

    del mtime  # a file that changed is read again
    covariance = load_covariance(path, [key])[key]
    digest = hashlib.sha256(np.ascontiguousarray(covariance).data).hexdigest()
    root, values = root_of(covariance)
    if not values[-1] > 0:
        raise UserError(f"{path}: the covariance {key!r} is all zero: collect it on other inputs")
    return root, values, digest


def measure(item: Item) -> Measured:
    """Measure one block in this process; raises UserError that names the tensor."""
    checkpoint, opening = _opened(item)
    before = checkpoint.bytes_read
    weights = Weights(checkpoint)
    root = eigenvalues = None
    if item.covariance is not None:
        path, key = item.covariance
        root, eigenvalues, digest = _inputs(path, key, Path(path).stat().st_mtime_ns)
        weights.digests[f"covariance {key}"] = digest
    measured = measure_block(weights, item.attention, item.request, root)
    measured.bytes_read = checkpoint.bytes_read - before + opening
    measured.nulls = {
        number: weighted_nulls(spectrum, eigenvalues, item.seed)
        for number, spectrum in enumerate(measured.spectra)
        if eigenvalues is not None and spectrum.gauge.startswith("weighted")
    }
    return measured


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """One BLAS thread: faster than many on a busy machine, and the same bits everywhere."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def default_workers() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def load(item: Item, store: Store) -> Measured:
    """The result of an item that :func:`run` has been through."""
    return read_measured(store.path(item.key(store.salt)))


def run(
    items: Sequence[Item],
    store: Store,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Measure every item that the store does not hold yet.

    ``progress(finished, bytes)`` is called after each block. Raises the first UserError that a
    block raised; what was finished stays in the store.
    """
    store.prepare()
    waiting = {item.key(store.salt): item for item in items}
    todo = {key: item for key, item in waiting.items() if not store.holds(key)}
    if progress and len(items) > len(todo):
        progress(len(items) - len(todo), 0)
    if workers is None:
        cost = sum(item.cost() for item in todo.values())
        workers = default_workers() if cost > _PARALLEL_FLOPS else 1
    workers = min(workers, len(todo))
    if workers > 1:
        _run_processes(todo, store, workers, progress)
        return
    try:
        with one_thread():
            for key, item in todo.items():
                measured = measure(item)
                write_measured(store.path(key), measured)
                if progress:
                    progress(1, measured.bytes_read)
    finally:
        close_all()


def _run_processes(
    todo: dict[str, Item],
    store: Store,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    close_all()
    waiting: queue.SimpleQueue[tuple[str, Item] | None] = queue.SimpleQueue()
    # the large ones first, so that no core waits for a late one
    for pair in sorted(todo.items(), key=lambda pair: -pair[1].cost()):
        waiting.put(pair)
    for _ in range(workers):
        waiting.put(None)
    answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    children: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []
    try:
        for _ in range(workers):
            child = _start()
            feed = threading.Thread(
                target=_feed, args=(child, waiting, answers, store), daemon=True
            )
            children.append((child, feed))
            feed.start()
        for _ in todo:
            kind, value = answers.get()
            if kind == "error":
                raise UserError(value)
            if kind == "crash":
                raise RuntimeError(value)
            if progress:
                progress(1, value)
    finally:
        for child, _ in children:
            child.kill()
        for child, feed in children:
            if feed.ident is not None:
                feed.join()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # what was not sent yet
                    if pipe is not None:
                        pipe.close()
            child.wait()


def _start() -> subprocess.Popen[bytes]:
    # -P: a file in the working folder must not take a library's place. A process group of its own:
    # Ctrl-C is the parent's to handle.
    path = os.pathsep.join(p for p in sys.path if p)
    limits = dict.fromkeys(_THREAD_LIMITS, "1")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "mla_study.probes.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **limits, "PYTHONPATH": path},
        process_group=0,
    )


def _feed(
    child: subprocess.Popen[bytes],
    waiting: queue.SimpleQueue[tuple[str, Item] | None],
    answers: queue.SimpleQueue[tuple[str, Any]],
    store: Store,
) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    while (pair := waiting.get()) is not None:
        key, item = pair
        try:
            pickle.dump((item, str(store.path(key))), child.stdin)
            child.stdin.flush()
            kind, value = json.loads(child.stdout.readline() or b'["ended", null]')
        except (OSError, ValueError):
            kind, value = "ended", None
        if kind == "ended":
            kind, value = "error", _ended(child.wait(), item)
        answers.put((kind, value))
        if kind != "done":
            return


def _ended(code: int, item: Item) -> str:
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return (
        f"{public_name(item.spec.path)}: a worker ended {how} at block {item.attention.block!r}: "
        "if memory ran out, use --workers 1"
    )


def serve(receive: Callable[[], tuple[Item, str]], answer: Callable[[bytes], object]) -> None:
    """A worker's loop until EOFError: an item in, a file in the store and a line of JSON out."""
    import traceback

    while True:
        try:
            item, path = receive()
        except EOFError:
            return
        try:
            measured = measure(item)
            write_measured(Path(path), measured)
            reply: list[Any] = ["done", measured.bytes_read]
        except UserError as error:
            reply = ["error", str(error)]
        except MemoryError:
            reply = [
                "error",
                f"{public_name(item.spec.path)}: too little memory for block "
                f"{item.attention.block!r}: use fewer --workers",
            ]
        except Exception:
            reply = ["crash", traceback.format_exc()]
        answer(json.dumps(reply).encode() + b"\n")
