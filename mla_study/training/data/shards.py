"""A folder of tensors made once: sharded safetensors that an interruption leaves complete.

Tensors are filed under a key that says what they were made of. One process adds at a time; others
wait, and then find what it made.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from torch import Tensor

from mla_study.errors import UserError
from mla_study.study.runs import atomic_write

_GLOB = "shard-*.safetensors"


class Shards:
    """Tensors by key, in files ``shard-00000.safetensors`` and so on.

    Args:
        folder: made when the first tensor comes.
        limit: bytes of a shard.
        seconds: a shard is written after this time at the latest; a kill loses no more.

    Raises:
        UserError: a shard that cannot be read.
    """

    def __init__(self, folder: Path, limit: int = 2**28, seconds: float = 60.0) -> None:
        self.folder = folder
        self.limit = limit
        self.seconds = seconds
        self._where: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        self._held: dict[str, Tensor] = {}
        self._since = 0.0
        self.scan()

    def __contains__(self, key: str) -> bool:
        return key in self._where or key in self._held

    def __len__(self) -> int:
        return len(self._where) + len(self._held)

    def scan(self) -> None:
        """Find what other processes have added."""
        from safetensors import SafetensorError, safe_open

        for path in sorted(self.folder.glob(_GLOB)):
            if path in self._files:
                continue
            try:
                self._files[path] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{path} is damaged ({error}): delete it, and what it held is made anew"
                ) from None
            self._where.update(dict.fromkeys(self._files[path].keys(), path))

    def read(self, key: str) -> Tensor:
        """The tensor of a key that is there, on the CPU."""
        held = self._held.get(key)
        return self._files[self._where[key]].get_tensor(key) if held is None else held

    @contextlib.contextmanager
    def adding(self) -> Generator[None]:
        """The only place for :meth:`put`; what was put is written at its end, whatever ends it.

        Raises:
            UserError: the folder cannot be written.
        """
        with alone(self.folder):
            self.scan()
            for left in self.folder.glob(".shard-*.tmp*"):  # of a process that was killed
                left.unlink(missing_ok=True)
            self._since = time.monotonic()
            try:
                yield
            finally:
                self._flush()

    def put(self, key: str, tensor: Tensor) -> None:
        """Add a tensor; :meth:`read` gives it from now on."""
        self._held[key] = tensor.detach().cpu().contiguous()
        full = sum(t.nbytes for t in self._held.values()) >= self.limit
        if full or time.monotonic() - self._since >= self.seconds:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        held, self._held, self._since = self._held, {}, time.monotonic()
        if not held:
            return
        last = max((int(path.stem.split("-")[1]) for path in self._files), default=-1)
        target = self.folder / f"shard-{last + 1:05d}.safetensors"

        def save(path: Path) -> None:
            from safetensors import SafetensorError

            try:
                save_file(held, path)
            except SafetensorError as error:  # how it reports a full disk
                raise OSError(str(error)) from error

        atomic_write(target, save)
        self.scan()


@contextlib.contextmanager
def alone(folder: Path) -> Generator[None]:
    """Hold a folder's lock: one process of this machine, or of its shared file system, at a time.

    A folder that may only be read has no lock: nothing can be added there either.
    """
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except (ImportError, OSError):
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
