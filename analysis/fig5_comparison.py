"""Fig. 5: the same prompt, a row a variant.

Teacher, dense student and latent students by init, clips of the training length. Drawn from the
study's table of frames, or from the folder of videos that the parameter ``videos`` names. Beside a
row of the miniature's world stands the exact parser's verdict on the frames shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import frames
from mla_study.study.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "fig5_comparison"
TITLE = "The same prompts, a row a variant: teacher, dense, latent by init"
PROVENANCE = ("measured",)
DATA = ("results/data/study_clips",)
INSTEAD = ("videos",)


def INPUTS(videos: str = "") -> Mapping[str, Path]:
    """The user's videos."""
    return frames.inputs(videos)


def draw(
    out_dir: str, videos: str = "", variants: str = "", stage: str = "dmd", times: int = 1,
    prompts: int = 4, count: int = 6,
) -> Figure:  # fmt: skip
    """Draw and save ``fig5_comparison.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        videos: folder of videos to draw in place of the study's; see
            :func:`mla_study.miniature.clips.read_folder`.
        variants: names with commas between them, of inits, teacher and dense, or of sub-folders;
            '' takes all.
        stage: of the study's students: cd or dmd.
        times: length in training lengths, of the study.
        prompts: how many, at most.
        count: frames of a user's video.

    Raises:
        UserError: neither the table nor the videos, no such variant, or no prompt that all have.
    """
    clips = frames.opened(videos, count, ID)
    if not videos:
        clips = frames.of_length(clips, times, stage)
    rows = frames.chosen(clips.rows, frames.listed(variants), prompts)
    after = "" if videos else f" after {stage.upper()}"
    with style():
        return frames.draw_strips(
            clips.of(rows), out_dir, ID, f"Same prompts, a row a variant{after}: {clips.source}", 2
        )
