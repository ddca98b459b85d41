"""From scores of videos to the tables of a run."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mla_study.evaluation.vbench import scores
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, SUBSTITUTES
from mla_study.evaluation.vbench.runs.plan import Question, base_of
from mla_study.evaluation.vbench.runs.store import Scored
from mla_study.study.runs import Validity, round_significant

if TYPE_CHECKING:
    import pandas as pd

LOWER = ("imaging_quality[niqe]",)
"""Scorers of which less is better."""
COMPOSITES = {
    "quality": tuple(d.name for d in DIMENSIONS.values() if d.group == "quality"),
    "semantic": tuple(d.name for d in DIMENSIONS.values() if d.group == "semantic"),
    "total": tuple(DIMENSIONS),
    "total_mean": tuple(DIMENSIONS),
    "overall_6": scores.OVERALL_6,
}
COLUMNS = (
    "model", "scorer", "dimension", "label", "value", "low", "high", "better", "videos", "prompts",
    "wanted", "validity", "mode", "horizon_s", "why",
)  # fmt: skip
UNITS = {
    "value": "share, as VBench reports it (NIQE and HPSv3 on their own scales)",
    "low": "lower end of the 95 % bootstrap interval over prompts",
    "high": "its upper end",
    "horizon_s": "seconds",
    "terms": "weight of a video in the mean",
    "seconds": "seconds",
    "rss_mib": "MiB",
}
VIDEO_COLUMNS = ("video", "sha256", "prompt", "index", "scorer", "value", "terms", "counted",
                 "frames", "video_s")  # fmt: skip
_ORDER: tuple[Validity, ...] = ("full", "partial", "substitute", "invalid")


def video_table(answered: Iterable[tuple[Question, Scored]]) -> pd.DataFrame:
    """A row a video and scorer, in the order of the questions."""
    import pandas as pd

    rows = [
        {
            "video": asked.video.name, "sha256": asked.video.sha256, "prompt": asked.video.prompt,
            "index": asked.video.index, "scorer": asked.scorer, "value": found.value,
            "terms": found.terms, "counted": found.counted, "frames": found.frames,
            "video_s": asked.video.seconds,
        }
        for asked, found in answered
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=list(VIDEO_COLUMNS))
    table["index"] = table["index"].astype("Int64")
    table["prompt"] = table["prompt"].astype("string").astype(object)
    return table


def score_table(
    videos: pd.DataFrame, scorers: Sequence[str], wanted: Mapping[str, int | None], *,
    model: str, mode: str, validity: Validity = "full",
    why: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """A row a scorer, then the composites that they allow.

    Args:
        videos: of :func:`video_table`. wanted: scorer -> videos that the protocol wants, or None.
        validity: the best that a row may have (``invalid`` for random weights).
        why: scorer -> clauses on what its videos lack, with which it is at most partial.
    """
    import pandas as pd

    lengths = videos.drop_duplicates("video")["video_s"]
    horizon = float(lengths.median()) if len(lengths) else float("nan")
    common = {"model": model, "mode": mode, "horizon_s": round(horizon, 3)}
    rows, raw, drawn = list[dict[str, Any]](), dict[str, float](), {}
    for scorer in scorers:
        mine = videos[(videos["scorer"] == scorer) & videos["counted"].astype(bool)]
        seen = int(videos.loc[videos["scorer"] == scorer, "video"].nunique())
        prompts = mine["prompt"].fillna(mine["video"])
        values, terms = mine["value"].to_numpy(float), mine["terms"].to_numpy(float)
        seed = zlib.crc32(scorer.encode())
        found = scores.bootstrap(scorer, values, terms, prompts, seed=seed)
        if not len(mine):
            continue
        lacking, reasons = wanted.get(scorer), list((why or {}).get(scorer, ()))
        complete = not reasons and (lacking is None or seen >= lacking)
        own: Validity = "full" if complete else "partial"
        own = worst([own, validity, *(["substitute"] if scorer in SUBSTITUTES else [])])
        raw[scorer] = found.value
        drawn[scorer] = scores.resampled(scorer, values, terms, prompts, seed=seed)
        rows.append(
            {
                **common, "scorer": scorer, "dimension": base_of(scorer), "label": label(scorer),
                "value": found.value, "low": found.low, "high": found.high,
                "better": "lower" if scorer in LOWER else "higher",
                "videos": seen, "prompts": found.prompts, "wanted": lacking, "validity": own,
                "why": "; ".join(reasons),
            }
        )  # fmt: skip
    intervals = scores.composite_intervals(
        {name: values for name, values in drawn.items() if name in DIMENSIONS}
    )
    by_name = {row["scorer"]: row for row in rows}
    for name, value in scores.composites(raw).items():
        members = [by_name[member] for member in COMPOSITES[name]]
        low, high = intervals.get(name, (float("nan"), float("nan")))
        rows.append(
            {
                **common, "scorer": name, "dimension": name, "label": label(name), "value": value,
                "low": low, "high": high, "better": "higher",
                "videos": sum(row["videos"] for row in members),
                "prompts": sum(row["prompts"] for row in members),
                "wanted": None, "validity": worst(row["validity"] for row in members),
                "why": _why(members),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for name in ("videos", "prompts", "wanted"):
        table[name] = table[name].astype("Int64")
    return round_significant(table)


def _why(members: Sequence[Mapping[str, Any]]) -> str:
    less = [row["label"] for row in members if row["why"]]
    return f"so {'is' if len(less) == 1 else 'are'} {', '.join(less)}" if less else ""


def worst(validities: Iterable[Validity]) -> Validity:
    """The least of several; ``full`` of none."""
    return _ORDER[max((_ORDER.index(validity) for validity in validities), default=0)]


def label(scorer: str) -> str:
    """A scorer as people read it.

    >>> label("dynamic_degree[raft-small]"), label("overall_6")
    ('dynamic degree [raft-small]', 'Overall (mean of 6)')
    """
    named = {
        "quality": "Quality", "semantic": "Semantic", "total": "Total (4:1)",
        "total_mean": "Total (plain mean)", "overall_6": "Overall (mean of 6)",
        "clip_t": "CLIP-T", "clip_f": "CLIP-F", "hpsv3": "HPSv3",
    }  # fmt: skip
    return named.get(scorer, scorer.replace("_", " ").replace("[", " [").replace("  ", " "))


def text_table(table: pd.DataFrame) -> str:
    """The scores for a terminal."""
    modes = " and ".join(dict.fromkeys(table["mode"]))
    lines = [
        f"{modes and f'{modes} mode':34}{'score':>8}  {'95 % interval':17} {'videos':>12}  validity"
    ]
    for row in table.to_dict("records"):
        wanted = "" if row["wanted"] is None or row["wanted"] != row["wanted"] else row["wanted"]
        count = f"{row['videos']} of {wanted}" if str(wanted).isdigit() else str(row["videos"])
        span = "" if row["low"] != row["low"] else f"{row['low']:.4f} to {row['high']:.4f}"
        note = " (less is better)" if row["better"] == "lower" else ""
        lines.append(
            f"{row['label']:34}{row['value']:>8.4f}  {span:17} {count:>12}  {row['validity']}{note}"
        )
    for row in table.to_dict("records"):
        if row["why"]:
            lines.append(f"{row['label']} ({row['validity']}): {row['why']}")
    return "\n".join(lines)
