"""Videos as VBench's functions get them: under their true name, with frames counted before."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def need(root: str | Path, *parts: str) -> list[str]:
    """Paths of files below the weights folder. :raises ValueError: names those that are missing."""
    paths = [Path(root) / part for part in parts]
    missing = [part for part, path in zip(parts, paths, strict=True) if not path.is_file()]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing in the weights folder {root}")
    return [str(path) for path in paths]


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


def frames_by_cv2(path: str, least: int) -> tuple[int, float]:
    """Frames that OpenCV decodes, and its rate in 1/s; for what VBench reads by OpenCV.

    :raises ValueError: fewer than ``least``.
    """
    import cv2

    video = cv2.VideoCapture(path)
    try:
        count = 0
        while video.isOpened() and video.grab():
            count += 1
        rate = float(video.get(cv2.CAP_PROP_FPS))
    finally:
        video.release()
    _enough(path, count, least)
    return count, rate


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


def _enough(path: str, count: int, least: int) -> None:
    if count == 0:
        raise ValueError(f"{Path(path).name} cannot be read as a video: it gives no frame")
    if count < least:
        frames = "1 frame" if count == 1 else f"{count} frames"
        raise ValueError(f"{Path(path).name} has {frames}, but {least} are needed")
