"""The tables of a run of the long mode: clips, what their averages are over, change with time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_study.evaluation.vbench.long import averages as long
from mla_study.evaluation.vbench.runs import tables
from mla_study.evaluation.vbench.runs.plan import Question
from mla_study.evaluation.vbench.runs.scoring import LongOptions
from mla_study.evaluation.vbench.runs.store import Scored
from mla_study.evaluation.vbench.runs.videos import Video

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Clip:
    """A clip as a video of its own, and where in which video it lies."""

    video: Video
    source: Video
    part: str
    start_s: float
    stop_s: float


def clip_table(
    held: Sequence[tuple[Question, Scored]], of_scorer: Mapping[str, Sequence[Clip]],
    static: Mapping[str, bool] | None,
) -> pd.DataFrame:  # fmt: skip
    """A row a clip and scorer: video, prompt, index, clip, start_s, stop_s, dimension, value."""
    import pandas as pd

    places = {
        (scorer, clip.video.path): clip for scorer, mine in of_scorer.items() for clip in mine
    }
    rows = list[dict[str, Any]]()
    for asked, found in held:
        clip = places[asked.scorer, asked.video.path]
        if not found.counted:
            continue
        rows.append(
            {
                "video": clip.source.name, "prompt": clip.source.prompt,
                "index": clip.source.index, "clip": asked.video.path.stem,
                "start_s": clip.start_s, "stop_s": clip.stop_s, "dimension": asked.scorer,
                "value": found.value, "terms": found.terms, "frames": found.frames,
                "static": static is None or static.get(asked.video.sha256, False),
            }
        )  # fmt: skip
    table = pd.DataFrame(
        rows, columns=["video", "prompt", "index", "clip", "start_s", "stop_s", "dimension",
                       "value", "terms", "frames", "static"],
    )  # fmt: skip
    table["index"] = table["index"].astype("Int64")
    return table


def averages(
    clips: pd.DataFrame, pairs: pd.DataFrame, options: LongOptions, standard: bool, static: bool
) -> dict[bool, long.LongScores]:
    """Upstream's average (True) and the corrected one (False) of the same clips."""
    return {
        exact: long.long_scores(
            clips, pairs, options.configs, exact, dev=options.dev, standard=standard, static=static
        )
        for exact in (True, False)
    }


def video_rows(found: long.LongScores, clips: pd.DataFrame, seen: Sequence[Video]) -> pd.DataFrame:
    """What the average is over, in the columns of :func:`tables.video_table`."""
    import pandas as pd

    by_name = {video.name: video for video in seen}
    frames = clips.groupby(["video", "dimension"])["frames"].sum()
    rows = [
        {
            "video": row["video"], "sha256": by_name[row["video"]].sha256,
            "prompt": by_name[row["video"]].prompt, "index": by_name[row["video"]].index,
            "scorer": row["dimension"], "value": row["value"], "terms": 1.0, "counted": True,
            "frames": int(frames[row["video"], row["dimension"]]),
            "video_s": by_name[row["video"]].seconds, "clip": row["clip"],
            "in_clip": row["in_clip"], "clip_to_clip": row["clip_to_clip"],
            "mapped": row["mapped"],
        }
        for row in found.videos.to_dict("records")
    ]  # fmt: skip
    table = pd.DataFrame(
        rows, columns=[*tables.VIDEO_COLUMNS, "clip", "in_clip", "clip_to_clip", "mapped"]
    )
    table["index"] = table["index"].astype("Int64")
    return table


def drift_table(clips: pd.DataFrame, model: str, scored: pd.DataFrame) -> pd.DataFrame:
    """:func:`long.drift` with the model's name: model, scorer, second, value, low, high, videos.

    Args:
        scored: of :func:`tables.score_table`; a scorer's curve is worth what its score is.
    """
    drift = long.drift(clips).rename(
        columns={"dimension": "scorer", "seconds": "second", "mean": "value"}
    )
    drift.insert(0, "model", model)
    worth = dict(zip(scored["scorer"], scored["validity"], strict=True))
    return drift.assign(validity=[worth.get(scorer, "invalid") for scorer in drift["scorer"]])
