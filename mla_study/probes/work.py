"""Measure many attention blocks: one process a core, one BLAS thread each, every block kept on disk.

Each finished block is a file in a store, written under a temporary name and renamed, so that a run
that was interrupted or killed goes on where it was, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from mla_study.checkpoints.operators import Attention
from mla_study.checkpoints.reader import Checkpoint, OpenSpec, open_checkpoint
from mla_study.errors import UserError
from mla_study.probes.layer import (
    Request,
    Spectrum,
    measure_attention,
    subspace_of,
    subspace_rank,
)
from mla_study.probes.spectrum import measures

# below this much arithmetic a second process costs more than it brings (about two seconds a core)
_PARALLEL_FLOPS = 6e10
_THREADS = {
    name: "1"
    for name in (
        "OPENBLAS_NUM_THREADS",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    )
}


@dataclass(frozen=True)
class Item:
    """One block of one checkpoint to measure; ``covariance`` is (file, key) of its inputs' C."""

    spec: OpenSpec
    fingerprint: str
    attention: Attention
    request: Request
    covariance: tuple[str, str] | None = None

    def key(self, salt: str) -> str:
        """Name of the item's result in a store: all that the result depends on."""
        parts = {role: asdict(part) for role, part in self.attention.parts.items()}
        text = json.dumps(
            [
                salt,
                asdict(self.spec),
                self.fingerprint,
                self.attention.block,
                self.attention.layout,
                parts,
                dict(self.attention.norms),
                None if self.attention.heads is None else asdict(self.attention.heads),
                asdict(self.request),
                None if self.covariance is None else [*self.covariance, _stamp(self.covariance[0])],
            ],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def cost(self) -> float:
        """Rough floating-point operations, to decide whether workers pay."""
        sizes = [(p.m, p.n) for p in self.attention.parts.values()]
        return sum(12.0 * min(m, n) ** 2 * max(m, n) for m, n in sizes)


def _stamp(path: str) -> list[int]:
    stat = Path(path).stat()
    return [stat.st_size, stat.st_mtime_ns]


@dataclass
class Measured:
    """What a block gave: spectra, their measures, and sha256 of the values that were read."""

    spectra: list[Spectrum]
    metrics: list[dict[str, float]]
    digests: dict[str, str]
    bytes_read: int = 0
    basis: np.ndarray | None = None  # [n, k], where a subspace was asked for


@dataclass
class Store:
    """A folder of finished blocks; ``salt`` stands for the code that measures them."""

    folder: Path
    salt: str = ""
    _cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def path(self, item: Item) -> Path:
        """Where the block's result lies or will lie."""
        return self.folder / f"{item.key(self.salt)}.npz"

    def save(self, item: Item, measured: Measured) -> None:
        """Write one result atomically; UserError when the disk is full or not writable."""
        write_measured(self.path(item), measured)

    def load(self, item: Item) -> Measured:
        """Read one result back; a damaged file raises :class:`ValueError`."""
        return read_measured(self.path(item))

    def holds(self, item: Item) -> bool:
        """Whether a readable result is there."""
        if not self.path(item).exists():
            return False
        try:
            self.load(item)
        except (ValueError, OSError, KeyError, EOFError):
            return False
        return True


def write_measured(path: Path, measured: Measured) -> None:
    """Atomic npz of one block's result."""
    meta = {
        "spectra": [{k: v for k, v in vars(s).items() if k != "sigma"} for s in measured.spectra],
        "metrics": measured.metrics,
        "digests": measured.digests,
        "bytes_read": measured.bytes_read,
    }
    buffer = io.BytesIO()
    arrays = {f"s{i}": s.sigma for i, s in enumerate(measured.spectra)}
    if measured.basis is not None:
        arrays["basis"] = measured.basis
    text = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez(buffer, meta=text, **arrays)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path.parent} cannot be written ({error.strerror}): free it") from None


def read_measured(path: Path) -> Measured:
    """Read what :func:`write_measured` wrote."""
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as data:
            meta = json.loads(bytes(data["meta"]))
            spectra = [Spectrum(sigma=data[f"s{i}"], **m) for i, m in enumerate(meta["spectra"])]
            basis = data["basis"] if "basis" in data else None
    except (zipfile.BadZipFile, TypeError) as error:
        raise ValueError(str(error)) from None
    return Measured(spectra, meta["metrics"], meta["digests"], meta["bytes_read"], basis)


@lru_cache(maxsize=2)
def _opened(spec: OpenSpec, fingerprint: str) -> Checkpoint:
    del fingerprint  # part of the cache key: a file that changed is opened again
    return open_checkpoint(spec)


@lru_cache(maxsize=2)
def _covariance(path: str, key: str) -> np.ndarray:
    from mla_study.probes.activations import load_covariance, sqrt_psd

    return sqrt_psd(load_covariance(path)[key])


def measure(item: Item) -> Measured:
    """Measure one block in this process."""
    checkpoint = _opened(item.spec, item.fingerprint)
    before = checkpoint.bytes_read
    root = None if item.covariance is None else _covariance(*item.covariance)
    try:
        spectra, digests = measure_attention(checkpoint, item.attention, item.request, root)
    except np.linalg.LinAlgError as error:
        raise UserError(
            f"{item.spec.path}: the spectrum of block {item.attention.block!r} did not converge "
            f"({error}): check the weights there"
        ) from None
    metrics = [measures(s.sigma, s.n) for s in spectra]
    k = item.request.subspace
    basis = None
    if k:
        rank = subspace_rank(item.attention) if k < 0 else k
        basis = subspace_of(checkpoint, item.attention, rank)
    return Measured(spectra, metrics, digests, checkpoint.bytes_read - before, basis)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One BLAS thread: faster than many on a busy machine, and the same bits everywhere."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def default_workers() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def run(
    items: Sequence[Item],
    store: Store,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Measure every item that the store does not hold yet.

    ``progress(finished, bytes)`` is called after each block. Raises the first UserError that a block
    raised; what was finished stays in the store.
    """
    todo = [item for item in items if not store.holds(item)]
    for _ in range(len(items) - len(todo)):
        if progress:
            progress(1, 0)
    cost = sum(item.cost() for item in todo)
    if workers is None:
        workers = default_workers() if cost > _PARALLEL_FLOPS else 1
    workers = min(workers, len(todo))
    if workers <= 1:
        with one_thread():
            for item in todo:
                measured = measure(item)
                store.save(item, measured)
                if progress:
                    progress(1, measured.bytes_read)
        return
    _run_processes(todo, store, workers, progress)


def _run_processes(
    todo: Sequence[Item],
    store: Store,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
    # the large ones first, so that no core waits for a late one
    for item in sorted(todo, key=lambda i: -i.cost()):
        waiting.put(item)
    for _ in range(workers):
        waiting.put(None)
    answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    children = [_start() for _ in range(workers)]
    for child in children:
        threading.Thread(target=_feed, args=(child, waiting, answers, store), daemon=True).start()
    try:
        finished = 0
        while finished < len(todo):
            kind, value = answers.get()
            if kind == "error":
                raise UserError(value)
            if kind == "crash":
                raise RuntimeError(value)
            finished += 1
            if progress:
                progress(1, value)
    finally:
        for child in children:
            child.kill()
            child.wait()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mla_study.probes.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_THREADS, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def _feed(
    child: subprocess.Popen[bytes],
    waiting: queue.SimpleQueue[Item | None],
    answers: queue.SimpleQueue[tuple[str, Any]],
    store: Store,
) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    while (item := waiting.get()) is not None:
        try:
            pickle.dump((item, str(store.path(item))), child.stdin)
            child.stdin.flush()
            kind, value = json.loads(child.stdout.readline() or b'["crash", null]')
        except (OSError, ValueError):
            kind, value = "crash", None
        if kind == "crash":
            code = child.poll()
            value = value or (
                f"a worker ended (code {code}) at block {item.attention.block!r} of "
                f"{item.spec.path}; too little memory? try --workers 1"
            )
        answers.put((kind, value))
        if kind != "done":
            return


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """The worker's loop: an item in, a file in the store and one line of JSON out."""
    import traceback

    while True:
        try:
            item, path = pickle.load(requests)
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
                f"{item.spec.path}: too little memory for block {item.attention.block!r}: "
                "use fewer --workers",
            ]
        except Exception:
            reply = ["crash", traceback.format_exc()]
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
