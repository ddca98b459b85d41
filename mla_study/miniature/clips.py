"""Frames of a study's videos as rows of a table, and a user's own videos as the same rows.

A row is a video: whose it is, its prompt, and some of its frames at even times, the first and the
last among them, side by side in one PNG.

Shapes: n kept frames of F, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from mla_study.config import from_dict, mini
from mla_study.errors import UserError
from mla_study.miniature.judge import Trial
from mla_study.miniature.plan import Node, Plan, Variant
from mla_study.miniature.store import FRAMES, Store

if TYPE_CHECKING:
    import pandas as pd

Pixels = UInt8[np.ndarray, "n H W 3"]
KEPT = {1: 6, 10: 8, 100: 10}
"""Length in training lengths -> frames kept."""
PROMPTS = 4
INITS = ("activation", "spectral", "spectral-raw", "random")
STAGES = ("teacher", "cd", "dmd")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
LARGEST = 256
"""Pixels of the longer side to which a user's frames are reduced."""
_RUNS = ("teacher", *(Variant(init).name for init in (None, *INITS)))
_ABOUT = ("run", "variant", "init", "d_c", "d_rope", "seed", "stage", "clips", "condition")


def shown_nodes(plan: Plan) -> list[Node]:
    """Judgements of seed 0 whose videos are worth showing: the teacher, and the main students'."""
    return [
        node
        for node in plan
        if node.kind == "judge"
        and node.about["run"] in _RUNS
        and node.about["stage"] in STAGES
        and node.about["condition"] in ("plain", "plain-s0")
    ]


def videos_of(
    plan: Plan, store: Store, node: Node
) -> tuple[list[str], UInt8[np.ndarray, "B F H W 3"]]:
    """Prompts and frames of the first videos of a finished judgement.

    Raises:
        UserError: its frames are not there.
    """
    from safetensors.numpy import load_file

    file = store.place(plan, node.name) / FRAMES
    if not file.exists():
        raise UserError(f"{file} is missing: remove its folder, and the same study makes it anew")
    frames = load_file(file)["frames"]
    captions = from_dict(node.settings["trial"], Trial).captions
    return [str(caption) for caption in captions[: len(frames)]], frames


def clips_table(plan: Plan, store: Store, prompts: int = PROMPTS) -> pd.DataFrame:
    """A row a video of :func:`shown_nodes`, the first few prompts of each.

    Columns: what describes the node (``run`` .. ``stage``, ``clips``, ``condition``), ``prompt``,
    ``fps``, ``frames`` (numbers of those kept, from 0), ``png`` (see :func:`frames_of`).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for node in shown_nodes(plan):
        about = {name: node.about[name] for name in _ABOUT}
        told, videos = videos_of(plan, store, node)
        numbers = even(videos.shape[1], KEPT.get(about["clips"], max(KEPT.values())))
        for prompt, video in list(zip(told, videos, strict=True))[:prompts]:
            rows.append(clip_row(about, prompt, mini().fps, numbers, video[numbers]))
    return pd.DataFrame(rows)


def even(frames: int, count: int) -> list[int]:
    """``count`` numbers from 0 to ``frames`` - 1 at even times, fewer where there are fewer.

    >>> even(12, 6), even(3, 5)
    ([0, 2, 4, 7, 9, 11], [0, 1, 2])
    """
    if frames <= count:
        return list(range(frames))
    return [int(number) for number in np.round(np.linspace(0, frames - 1, count))]


def clip_row(
    about: Mapping[str, Any], prompt: str, fps: float, numbers: Sequence[int], frames: Pixels
) -> dict[str, Any]:
    """A row of :func:`clips_table`."""
    from PIL import Image

    sink = io.BytesIO()
    side_by_side = np.ascontiguousarray(frames.transpose(1, 0, 2, 3)).reshape(len(frames[0]), -1, 3)
    Image.fromarray(side_by_side).save(sink, format="PNG", compress_level=9)
    kept = {"prompt": prompt, "fps": float(fps), "frames": list(numbers), "png": sink.getvalue()}
    return {**about, **kept}


def frames_of(row: Mapping[str, Any]) -> Pixels:
    """The kept frames of a row, uint8 RGB.

    Raises:
        UserError: its PNG does not hold as many frames as the row says.
    """
    from PIL import Image

    try:
        wide = np.asarray(Image.open(io.BytesIO(row["png"])).convert("RGB"))
        return wide.reshape(len(wide), len(row["frames"]), -1, 3).transpose(1, 0, 2, 3)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the frames of {row['run']}, '{row['prompt']}', cannot be read ({error}): "
            "make the table anew by `make study-full`"
        ) from None


def read_folder(folder: Path, count: int) -> tuple[pd.DataFrame, dict[str, str]]:
    """A user's videos as rows of :func:`clips_table`, ``count`` frames of each.

    Args:
        folder: its sub-folders are the variants and their files the prompts; a folder without
            sub-folders of videos is one variant. Names are the labels, ``_`` read as a space.

    Returns:
        the rows, and ``variant/file`` of each video that cannot be decoded -> why.

    Raises:
        UserError: no such folder, no video in it, or none that can be decoded.
    """
    import pandas as pd

    found = video_files(folder)
    rows: list[dict[str, Any]] = []
    unread: dict[str, str] = {}
    for label, files in found.items():
        about = {"run": label, "variant": label, "init": "none", "d_c": 0, "d_rope": 0,
                 "seed": 0, "stage": "", "clips": 0, "condition": ""}  # fmt: skip
        for file in files:
            try:
                fps, numbers, frames = read_frames(file, count)
            except UserError as error:
                unread[f"{label}/{file.name}"] = str(error)
                continue
            rows.append(clip_row(about, file.stem.replace("_", " "), fps, numbers, frames))
    if not rows:
        first = next(iter(unread.values()))
        raise UserError(f"of {len(unread)} videos in {folder} none can be decoded: {first}")
    return pd.DataFrame(rows), unread


def video_files(folder: Path) -> dict[str, list[Path]]:
    """Label -> video files of a folder, see :func:`read_folder`.

    Raises:
        UserError: no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one that holds videos")

    def videos(place: Path) -> list[Path]:
        files = (f for f in place.iterdir() if f.is_file() and not f.name.startswith("."))
        return sorted(f for f in files if f.suffix.lower() in VIDEO_SUFFIXES)

    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {place.name: files for place in inside if (files := videos(place))}
    found = found or ({folder.resolve().name: flat} if (flat := videos(folder)) else {})
    if not found:
        raise UserError(
            f"{folder} holds no video, nor do its sub-folders: give files of "
            f"{', '.join(VIDEO_SUFFIXES)}"
        )
    return found


def read_frames(file: Path, count: int) -> tuple[float, list[int], Pixels]:
    """Frames a second of a video, and its frames at even times: their numbers and pixels.

    Raises:
        UserError: it cannot be read.
    """
    from mla_study.rollout.clips import read_clip

    total = sum(piece.shape[1] for piece in read_clip(file))
    numbers = even(total, count)
    kept: list[np.ndarray] = []
    first = 0
    for piece in read_clip(file):
        here = [n - first for n in numbers if first <= n < first + piece.shape[1]]
        kept += [_reduced(frame) for frame in piece[0, here].numpy()]
        first += piece.shape[1]
    if len({frame.shape for frame in kept}) != 1:
        raise UserError(f"{file} changes the size of its frames: give another file")
    return float(_rate(file)), numbers, np.stack(kept)


def _rate(file: Path) -> Fraction:
    import av

    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise UserError(f"{file} does not say its frames a second: give it in another format")
    return rate


def _reduced(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image

    height, width = frame.shape[:2]
    scale = min(1.0, LARGEST / max(height, width))
    if scale == 1.0:
        return frame
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))
