"""Videos as VBench's functions get them: under their true name, with frames counted before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def need(root: str | Path, *parts: str) -> list[str]:
    """Paths of files below the weights folder. :raises ValueError: names those that are missing."""
    paths = [_place(Path(root), part) for part in parts]
    missing = [part for part, path in zip(parts, paths, strict=True) if not path.is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing in the weights folder {root}")
    return [str(path) for path in paths]


def _place(root: Path, part: str) -> Path:
    """Below the weights folder; stand-ins' files also where MLA_STUDY_ASSETS has real weights."""
    assets, path = os.environ.get("MLA_STUDY_ASSETS"), root / part
    if assets and part.startswith("substitutes/") and not path.is_file():
        return Path(assets) / "weights" / path.name
    return path


@contextmanager
def under_its_name(line: Line) -> Generator[str]:
    """A link to the video in a folder of its own, named as VBench wants it.

    VBench reads actions and prompts off file names, and the kind of file off their ending.

    :raises ValueError: there is no such file, or the name is none of an .mp4 file.
    """
    path, name = Path(line["path"]), str(line.get("name") or Path(line["path"]).name)
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty")
    if Path(name).name != name or not name.endswith(".mp4"):
        raise ValueError(f"{name!r} is no name of an .mp4 file: VBench reads nothing else well")
    folder = Path(tempfile.mkdtemp(prefix="vbench-"))
    try:
        link = folder / name
        link.symlink_to(path.resolve())
        yield str(link)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Counted:
    """Stands in for a function by which VBench reads frames, and remembers how many it gave.

    VBench decodes a video once and hides the number; counting by ourselves would decode it again.
    """

    def __init__(
        self, owner: Any, name: str, least: int, what: str = "frames", side: int = 0
    ) -> None:
        self.read, self.least, self.what, self.side = getattr(owner, name), least, what, side
        self.frames = 0
        setattr(owner, name, self)

    def __call__(self, path: str) -> Any:
        """What VBench reads.

        :raises ValueError: fewer frames than ``least``, or a side of fewer pixels than ``side``.
        """
        try:
            frames = self.read(path)
        except AssertionError:  # VBench asserts that there is a frame
            frames = []
        self.frames = len(frames)
        _enough(path, self.frames, self.least, self.what)
        if self.side:
            height, width = frames[0].shape[-2:]
            if min(height, width) < self.side:
                raise ValueError(
                    f"frames of {width} x {height} are too small for optical flow: it needs "
                    f"{self.side} pixels a side"
                )
        return frames


def frames_by_decord(path: str, least: int = 1) -> int:
    """Frames by decord's reader. :raises ValueError: no video, or fewer than ``least``."""
    import decord

    try:
        count = len(decord.VideoReader(path, num_threads=1))
    except (decord.DECORDError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or ["no reason is given"])[0]
        raise ValueError(f"{Path(path).name} cannot be read as a video: {first}") from error
    _enough(path, count, least)
    return count


def _enough(path: str, count: int, least: int, what: str = "frames") -> None:
    if count == 0:
        raise ValueError(f"{Path(path).name} cannot be read as a video: it gives no frame")
    if count < least:
        told = what.replace("frames", "frame", 1) if count == 1 else what
        raise ValueError(f"{Path(path).name} has {count} {told}, but {least} are needed")
