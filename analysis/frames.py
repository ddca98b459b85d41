"""What the figures made of video frames share: which rows are drawn, and how.

Rows come from the study's table of frames, or from a folder of videos that the parameter
``videos`` names. A video is a strip of frames at even times; strips of one prompt stand together.
Beside a strip of the miniature's world stands the exact parser's verdict, where the frames shown
allow one (:mod:`analysis.verdicts`).
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.verdicts import verdict
from mla_study.config import mini
from mla_study.errors import UserError
from mla_study.miniature.clips import frames_of, read_folder, video_files
from mla_study.study.plots import COLOURS, PAGE_WIDTH, save_figure, stamp
from mla_study.study.runs import Validity, file_sha256, read_result, run_record
from mla_study.world.scenes import World

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
TABLE = "results/data/study_clips"
_MARGIN, _GAP, _BETWEEN, _LINE = 0.06, 0.1, 0.03, 0.13
_HEAD, _AXIS, _FOOT = 0.24, 0.26, 0.14
_SMALL = 96
_VERDICT, _LETTERS = 0.7, 17  # inches beside a strip, and letters of a line there
_NOTE, _NOTE_LETTERS = 0.085, 185  # inches of a line below the strips, and its letters
_NAMED = 24
"""So many videos that cannot be decoded are named in the figure; the others are counted."""


@dataclass(frozen=True)
class Clips:
    """Rows to draw, and where they are from.

    Attributes:
        rows: of :func:`mla_study.miniature.clips.clips_table`.
        source: in words, for the title.
        notes: sentences that stand below the strips.
    """

    rows: pd.DataFrame
    source: str
    validity: Validity
    run_hash: str
    notes: tuple[str, ...] = ()

    def of(self, rows: pd.DataFrame) -> Clips:
        """The same with some of the rows."""
        return replace(self, rows=rows)


def inputs(videos: str) -> dict[str, Path]:
    """The files of a folder of videos; of '', none."""
    if not videos:
        return {}
    found = video_files(ROOT / videos)
    return {f"{label}/{file.name}": file for label, files in found.items() for file in files}


def opened(videos: str, count: int, figure: str) -> Clips:
    """The study's table, or ``count`` frames of each video of a folder.

    Videos that cannot be decoded are left out: standard error is told, and the figure says so.

    Raises:
        UserError: the table or the folder is missing, or no video can be decoded.
    """
    if not videos:
        found = read_result(ROOT / TABLE)
        return Clips(found.table, "the miniature", found.validity, found.run_hash)
    if count < 1:
        raise UserError(f"count is {count}, but a video is drawn by at least 1 frame")
    place = ROOT / videos
    rows, unread = read_folder(place, count)
    validity: Validity = "partial" if unread else "full"
    run = run_record(
        config={"figure": figure, "frames": count},
        inputs={name: file_sha256(file) for name, file in inputs(videos).items()},
        seed=None,
        modules=(f"analysis.{figure}",),
        provenance="measured",
        validity=validity,
    )
    notes = _left_out(unread, len(unread) + len(rows))
    return Clips(rows, place.resolve().name, validity, run["run_hash"], notes)


def _left_out(unread: Mapping[str, str], videos: int) -> tuple[str, ...]:
    """Tell standard error which videos are left out and why, and give the figure's sentence."""
    if not unread:
        return ()
    told = f"{len(unread)} of {videos} videos cannot be decoded and {_are(unread)} left out"
    print("\n    ".join([f"{told}:", *unread.values()]), file=sys.stderr)
    named = ", ".join(list(unread)[:_NAMED])
    more = len(unread) - _NAMED
    return (f"{told}: {named}{f' and {more} more' if more > 0 else ''}.",)


def _are(several: Mapping[str, str]) -> str:
    return "is" if len(several) == 1 else "are"


def of_length(clips: Clips, times: int, stage: str = "dmd") -> Clips:
    """The study's videos of so many training lengths: of the teacher, and of students of a stage.

    Raises:
        UserError: there are none.
    """
    rows = clips.rows
    held = rows[(rows["clips"] == times) & rows["stage"].isin(["teacher", stage])]
    if held.empty:
        there = sorted(
            {(str(s), int(c)) for s, c in zip(rows["stage"], rows["clips"], strict=True)}
        )
        raise UserError(
            f"there are no frames of {times} training lengths after {stage}: choose from "
            + ", ".join(f"stage={s} times={c}" for s, c in there)
        )
    config, world = mini(), World()
    seconds = world.frames / config.fps
    source = (
        f"{clips.source} (width {config.width}, {config.layers} layers, {world.size} px), "
        f"{times} x the training length of {seconds:g} s"
    )
    return replace(clips, rows=held, source=source)


def listed(names: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries."""
    return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]


def names(rows: pd.DataFrame) -> list[str]:
    """The variants of a table, in its order."""
    return list(dict.fromkeys(name_of(row) for row in records(rows)))


def name_of(row: Mapping[str, Any]) -> str:
    """``teacher``, ``dense``, the init of a latent student, or a folder's name."""
    return str(row["init"] if _is_student(row) else row["variant"])


def label_of(row: Mapping[str, Any], apart: str = "\n") -> str:
    """The same for people."""
    return f"latent,{apart}{row['init']}" if _is_student(row) else str(row["variant"])


def _is_student(row: Mapping[str, Any]) -> bool:
    """Whether it is a latent student of the study, and no folder that is called so."""
    return row["variant"] == "latent" and row["init"] != "none"


def chosen(rows: pd.DataFrame, wanted: Sequence[str], prompts: int) -> pd.DataFrame:
    """The rows of these variants, in this order, of the first prompts that all of them have.

    Args:
        wanted: see :func:`name_of`; none takes all.

    Raises:
        UserError: a variant that is not there, or no prompt that all have.
    """
    import pandas as pd

    there = names(rows)
    wanted = list(wanted) or there
    for name in wanted:
        if name not in there:
            raise UserError(f"there are no frames of '{name}': choose from {', '.join(there)}")
    own = np.array([name_of(row) for row in records(rows)])
    parts = [rows[own == name] for name in wanted]
    shared = [p for p in parts[0]["prompt"] if all(p in set(part["prompt"]) for part in parts)]
    if not shared or prompts < 1:
        raise UserError(
            f"{', '.join(wanted)} have no prompt in common to draw: give files of the same name in "
            "each folder, and prompts of at least 1"
        )
    kept = [part[part["prompt"].isin(shared[:prompts])] for part in parts]
    return pd.concat(kept, ignore_index=True)


def draw_strips(
    clips: Clips, out_dir: str, figure_id: str, title: str, columns: int = 1, names: bool = True
) -> Figure:
    """Draw and save strips, those of one prompt below its text; call it inside ``style()``.

    Args:
        columns: prompts side by side.
        names: whether the variants' names stand beside the strips.
    """
    import matplotlib.pyplot as plt

    rows = records(clips.rows)
    groups = [[r for r in rows if r["prompt"] == p] for p in dict.fromkeys(clips.rows["prompt"])]
    strips = {id(row): _strip(frames_of(row)) for row in rows}
    verdicts = {id(row): verdict(row) for row in rows}
    judged = any(verdicts.values())
    notes = [*clips.notes]
    if judged:
        notes.insert(0, "Beside a row: the exact parser's verdict on the frames shown.")
    lines = [line for note in notes for line in textwrap.wrap(note, _NOTE_LETTERS)]
    alike = len({(tuple(row["frames"]), row["fps"]) for row in rows}) == 1
    # inches, from the upper left corner
    columns = min(columns, len(groups))
    left = 0.05 * max(map(_letters, rows)) + 0.08 if names else 0.0
    right = _VERDICT if judged else 0.0
    wide = (PAGE_WIDTH - 2 * _MARGIN - left - (columns - 1) * _GAP) / columns - right
    strip_high = wide * max(s.shape[0] / s.shape[1] for s in strips.values()) + _BETWEEN
    band = _LINE + strip_high * max(map(len, groups)) + _GAP
    bands = -(-len(groups) // columns)
    foot = _FOOT + _NOTE * len(lines) + (0.05 if lines else 0.0)
    high = _HEAD + bands * band + (_AXIS if alike else 0.0) + foot
    figure = plt.figure(figsize=(PAGE_WIDTH, high))
    figure.set_layout_engine("none")
    figure.text(_MARGIN / PAGE_WIDTH, 1 - 0.15 / high, title, fontsize=7, weight="bold")

    def place(x: float, top: float, height: float) -> Axes:
        low = 1 - (top + height) / high
        return figure.add_axes((x / PAGE_WIDTH, low, wide / PAGE_WIDTH, height / high))

    for index, group in enumerate(groups):
        x = _MARGIN + left + index % columns * (wide + right + _GAP)
        top = _HEAD + index // columns * band + _LINE
        at = x / PAGE_WIDTH, 1 - (top - 0.03) / high
        figure.text(*at, group[0]["prompt"], fontsize=6, style="italic")
        for number, row in enumerate(group):
            axis = place(x, top + number * strip_high, strip_high - _BETWEEN)
            axis.imshow(strips[id(row)], interpolation="none")
            axis.set_anchor("W")
            axis.axis("off")
            if names and index % columns == 0:
                told = label_of(row) + ("" if alike else f"\n{_length(row):.3g} s")
                axis.text(
                    -0.05 / wide, 0.5, told, transform=axis.transAxes, fontsize=6,
                    ha="right", va="center", linespacing=1.05,
                )  # fmt: skip
            if told := verdicts[id(row)]:
                axis.text(
                    1 + 0.05 / wide, 0.5, textwrap.fill(told, _LETTERS), transform=axis.transAxes,
                    fontsize=5, va="center", linespacing=1.1,
                    color="0.35" if told == "all correct" else COLOURS["vermillion"],
                )  # fmt: skip
        if alike and index + columns >= len(groups):
            _times(place(x, top + strip_high * len(group), 0.01), group[0])
    for number, line in enumerate(reversed(lines)):
        figure.text(_MARGIN / PAGE_WIDTH, (_FOOT + number * _NOTE) / high, line, fontsize=5,
                    color="0.25", parse_math=False)  # fmt: skip
    stamp(figure, "measured", clips.validity, clips.run_hash).set_y(0.03 / high)
    save_figure(figure, Path(out_dir) / figure_id)
    return figure


def _letters(row: Mapping[str, Any]) -> int:
    return max(len(line) for line in label_of(row).split("\n"))


def _length(row: Mapping[str, Any]) -> float:
    """Seconds from the first frame to the last."""
    return float(row["frames"][-1]) / float(row["fps"])


def _strip(frames: np.ndarray) -> np.ndarray:
    """Frames [n, H, W, 3] side by side with white between them; small ones' pixels as squares."""
    big = -(-_SMALL // frames.shape[2])
    frames = frames.repeat(big, 1).repeat(big, 2)
    gap = max(1, frames.shape[2] // 24)
    white = np.full((len(frames), frames.shape[1], gap, 3), 255, np.uint8)
    joined = np.concatenate([frames, white], axis=2)
    return joined.transpose(1, 0, 2, 3).reshape(frames.shape[1], -1, 3)[:, :-gap]


def _times(axis: Axes, row: Mapping[str, Any]) -> None:
    """A time axis whose ticks stand below the middles of the frames."""
    count = len(row["frames"])
    gap = 1 / 25
    whole = count + (count - 1) * gap
    middles = [(i * (1 + gap) + 0.5) / whole for i in range(count)]
    seconds = [float(number) / float(row["fps"]) for number in row["frames"]]
    axis.set_xlim(0, 1)
    axis.set_xticks(middles, [f"{second:.3g}" for second in seconds])
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.tick_params(labelsize=6, pad=1.5, length=2)
    axis.set_xlabel("time in the video (s)", labelpad=1)
