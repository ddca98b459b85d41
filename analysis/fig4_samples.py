"""Fig. 4: frames at even times of long rollouts, several prompts.

A row is one video of one variant, ten times as long as the clips of the training. Drawn from the
study's table of frames, or from the folder of videos that the parameter ``videos`` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import frames
from mla_study.study.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "fig4_samples"
TITLE = "Frames at even times of long rollouts, several prompts"
PROVENANCE = ("measured",)
DATA = ("results/data/study_clips",)
INSTEAD = ("videos",)


def INPUTS(videos: str = "") -> Mapping[str, Path]:
    """The user's videos."""
    return frames.inputs(videos)


def draw(
    out_dir: str, videos: str = "", variant: str = "", times: int = 10, prompts: int = 4,
    count: int = 8,
) -> Figure:  # fmt: skip
    """Draw and save ``fig4_samples.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        videos: folder of videos to draw in place of the study's; see
            :func:`mla_study.miniature.clips.read_folder`.
        variant: of the study an init or dense ('': activation), of videos a sub-folder ('': the
            first).
        times: length in training lengths, of the study.
        prompts: how many, at most.
        count: frames of a user's video.

    Raises:
        UserError: neither the table nor the videos, or no such variant.
    """
    clips = frames.opened(videos, count, ID)
    if not videos:
        clips = frames.of_length(clips, times)
    names = [variant or (frames.names(clips.rows)[0] if videos else "activation")]
    rows = frames.chosen(clips.rows, names, prompts)
    title = f"Long rollouts ({frames.label_of(frames.records(rows)[0], ' ')}): {clips.source}"
    with style():
        return frames.draw_strips(clips.of(rows), out_dir, ID, title, names=False)
