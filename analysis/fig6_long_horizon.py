"""Fig. 6: two variants along a hundred times the training length.

The same prompts by the dense and a latent student. Drawn from the study's table of frames, or from
the folder of videos that the parameter ``videos`` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import frames
from mla_study.study.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "fig6_long_horizon"
TITLE = "Two variants along 100 times the training length"
PROVENANCE = ("measured",)
DATA = ("results/data/study_clips",)
INSTEAD = ("videos",)


def INPUTS(videos: str = "") -> Mapping[str, Path]:
    """The user's videos."""
    return frames.inputs(videos)


def draw(
    out_dir: str, videos: str = "", variants: str = "", times: int = 100, prompts: int = 3,
    count: int = 10,
) -> Figure:  # fmt: skip
    """Draw and save ``fig6_long_horizon.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        videos: folder of videos to draw in place of the study's; see
            :func:`mla_study.miniature.clips.read_folder`.
        variants: two names with a comma between them, of inits or dense ('': dense,activation), or
            of sub-folders ('': the first two).
        times: length in training lengths, of the study.
        prompts: how many, at most.
        count: frames of a user's video.

    Raises:
        UserError: neither the table nor the videos, no such variant, or no prompt that all have.
    """
    clips = frames.opened(videos, count, ID)
    names = frames.listed(variants)
    if videos:
        names = names or frames.names(clips.rows)[:2]
    else:
        clips = frames.of_length(clips, times)
        names = names or ["dense", "activation"]
    rows = frames.chosen(clips.rows, names, prompts)
    with style():
        return frames.draw_strips(
            clips.of(rows), out_dir, ID, f"Along long rollouts: {clips.source}"
        )
