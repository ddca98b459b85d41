"""Finished blocks on disk, one file each, so that an interrupted run goes on where it was.

A file is written under a temporary name and renamed: it is complete or absent. Its name is a digest
of all that its content depends on.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import zipfile
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from mla_study.errors import UserError
from mla_study.probes.nulls import NullModel
from mla_study.probes.stacks import Spectrum

_LOCK = ".lock"


@dataclass
class Measured:
    """What a block gave: spectra, their measures, and sha256 of the values that were read."""

    spectra: list[Spectrum]
    metrics: list[dict[str, float]]
    digests: dict[str, str]
    bytes_read: int = 0
    basis: np.ndarray | None = None  # [n, k], where a subspace was asked for
    nulls: dict[int, dict[str, NullModel]] = field(default_factory=dict)
    """Nulls that belong to the block alone (weighted ones), by the number of the spectrum."""


@dataclass(frozen=True)
class Store:
    """A folder of finished blocks; ``salt`` stands for the code that measures them."""

    folder: Path
    salt: str = ""

    def path(self, key: str) -> Path:
        """Where the result of an item with this key lies or will lie."""
        return self.folder / f"{key}.npz"

    def prepare(self) -> None:
        """Make the folder. UserError where that cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def holds(self, key: str) -> bool:
        """Whether a readable result is there."""
        path = self.path(key)
        if not path.exists():
            return False
        try:
            read_measured(path)
        except Exception:  # whatever a damaged archive makes its readers raise
            return False
        return True


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Have a folder of blocks for oneself, without what a killed run left half-written in it.

    Raises:
        UserError: another run works there, or the folder cannot be written.
    """
    handle: IO[bytes] | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / _LOCK).open("wb")
    except OSError as error:
        raise _unwritable(folder, error) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder.parent} is in use by another rank-probe: "
                "wait for it, or choose another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(OSError):
            for left in folder.glob("*.tmp"):
                left.unlink(missing_ok=True)
        yield


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder} cannot be written ({error.strerror or error}): "
        "free some space or choose another folder"
    )


def write_measured(path: Path, measured: Measured) -> None:
    """Atomic npz of one block's result, into a folder that exists; UserError on a full disk."""
    meta = {
        "spectra": [{k: v for k, v in vars(s).items() if k != "sigma"} for s in measured.spectra],
        "metrics": measured.metrics,
        "digests": measured.digests,
        "bytes_read": measured.bytes_read,
        "nulls": measured.nulls,
    }
    buffer = io.BytesIO()
    arrays = {f"s{i}": s.sigma for i, s in enumerate(measured.spectra)}
    if measured.basis is not None:
        arrays["basis"] = measured.basis
    text = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez(buffer, allow_pickle=False, meta=text, **arrays)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _unwritable(path.parent, error) from None


def read_measured(path: Path) -> Measured:
    """Read what :func:`write_measured` wrote.

    Raises:
        OSError, ValueError: the file is absent or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            meta = json.loads(bytes(data["meta"]))
            spectra = [Spectrum(sigma=data[f"s{i}"], **m) for i, m in enumerate(meta["spectra"])]
            basis = data["basis"] if "basis" in data.files else None
        nulls = {
            int(number): {
                null: {metric: (value[0], value[1]) for metric, value in model.items()}
                for null, model in models.items()
            }
            for number, models in meta["nulls"].items()
        }
        return Measured(spectra, meta["metrics"], meta["digests"], meta["bytes_read"], basis, nulls)
    except (zipfile.BadZipFile, TypeError, KeyError, AttributeError, EOFError) as error:
        raise ValueError(str(error)) from None
