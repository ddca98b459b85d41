"""Where bytes come from: a local file, or a remote one that is read by range."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mla_study.errors import UserError

OnBytes = Callable[[int], None]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_PIECE = 1 << 30  # one preadv moves at most 2 GiB on Linux


@runtime_checkable
class ByteSource(Protocol):
    """Random access to the bytes of one file.

    ``path`` re-opens it (:func:`open_bytes`), ``name`` is what an error message calls it (no
    secrets), ``size`` its length in bytes, ``bytes_read`` what was fetched so far, ``remote``
    whether reading twice costs traffic twice.
    """

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def remote(self) -> bool: ...

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Exactly the bytes ``[start, stop)``; UserError where they cannot be had."""
        ...

    def fingerprint(self) -> str:
        """A cheap identity that changes when the file does: size with mtime or ETag."""
        ...

    def close(self) -> None: ...


def is_remote(path: str) -> bool:
    """Whether the path has a scheme (``https://``, ``hf://``, ...)."""
    return _SCHEME.match(path) is not None


class LocalBytes:
    """A local file read by position, so that one descriptor serves threads and forks alike.

    Pickles as its path: another process opens the file anew. Raises UserError where the path is
    absent, not a regular file, or unreadable.
    """

    remote = False

    def __init__(self, path: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> None:
        self.path = os.fspath(path)
        self.name = self.path
        self.on_bytes = on_bytes
        self.bytes_read = 0
        self._open()

    def _open(self) -> None:
        try:
            status = Path(self.path).stat()
            if stat.S_ISDIR(status.st_mode):
                raise UserError(f"{self.path} is a folder: name a weight file inside it")
            # A pipe or device would block on opening.
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{self.path} is not a regular file: copy it to one first")
            self._file = io.FileIO(self.path)
            status = os.fstat(self._file.fileno())
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist: check the path") from None
        except PermissionError:
            raise UserError(f"{self.path} may not be read: check its permissions") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise UserError(f"{self.path!r} cannot be opened: {error}") from None
        self.size = status.st_size
        self._mtime_ns = status.st_mtime_ns

    def read(self, start: int, stop: int) -> memoryview:
        """Exactly the bytes ``[start, stop)``. Raises UserError where the file ends before."""
        if not 0 <= start <= stop:
            raise ValueError(f"bytes [{start}, {stop}) are not a range")
        buffer = np.empty(stop - start, np.uint8).data
        at = 0
        while at < len(buffer):
            try:
                piece = buffer[at : at + _PIECE]
                count = os.preadv(self._file.fileno(), [piece], start + at)
            except OSError as error:
                raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
            if not count:
                raise UserError(
                    f"{self.path} ends at byte {start + at} where {stop} were expected: "
                    "it is truncated or was changed while being read; copy it again"
                )
            at += count
            self.bytes_read += count
            if self.on_bytes is not None:
                self.on_bytes(count)
        return buffer

    def fingerprint(self) -> str:
        """``size-mtime_ns``."""
        return f"{self.size}-{self._mtime_ns}"

    def close(self) -> None:
        self._file.close()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_file"]
        state["on_bytes"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
