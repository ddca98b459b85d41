"""Files that appear complete or not at all, several at once."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from mla_study.errors import UserError

# What this package writes into a folder of weights; an older set must not stay beside a newer one.
_OURS = re.compile(
    r"(?:diffusion_pytorch_model|model)"
    r"(?:(?:-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index\.json|\.pt)"
)


def occupied(folder: Path) -> list[str]:
    """Weight files and config that already lie in a folder, under the names written here."""
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if _OURS.fullmatch(p.name) or p.name == "config.json"]
    return sorted(names)


def drop_stages(folder: Path) -> None:
    """Remove what killed processes were writing into ``folder``; for a folder of one job alone."""
    for left in folder.glob(f".{escape(folder.name)}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def staged(folder: Path, last: Sequence[str] = (), stale: Sequence[str] = ()) -> Generator[Path]:
    """A folder to write into; what lies there is moved into ``folder`` when the block ends well.

    Args:
        folder: where the files are wanted; made if absent, then in one step.
        last: names to be moved after all others.
        stale: names to be removed from ``folder`` before the others arrive.

    Raises:
        UserError: something cannot be written (no space, no permission); nothing is left behind.
    """
    existed = folder.is_dir()
    place = folder if existed else folder.parent
    # os.getpid: two processes that save to one place do not meet.
    stage = place / f".{folder.name}.{os.getpid()}.tmp"
    made: list[Path] = []
    try:
        for parent in reversed([place, *place.parents]):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        stage.mkdir()
        yield stage
        files = sorted(stage.iterdir(), key=lambda p: (p.name in last, p.name))
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if existed:
            for name in set(stale) - {file.name for file in files}:
                (folder / name).unlink(missing_ok=True)
            for file in files:
                file.replace(folder / file.name)
            stage.rmdir()
        else:
            stage.rename(folder)
        made.clear()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): free some space, or choose "
            "another folder"
        ) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
