"""VBench's long mode as arithmetic: where clips begin, how two branches meet, what is averaged.

Nothing here imports VBench. What its environment is asked for, a line a request (``id``, ``path``,
``name`` as always), with what else the line holds and what ``more`` of the answer holds:

``long.split``
    ``options`` {} ; line {"out": DIR, "seconds": float, "exact": bool, "threshold": 35.0,
    "semantic": bool}. ``value`` is the number of clips, and ``more`` {"frames": int, "fps":
    "30000/1001", "clips": [{"path", "clip", "part", "start_s", "stop_s", "frames"}]}. DIR is a
    folder of this request alone; the video itself is only linked there.
``long.first_frames``
    line {"clips": [paths of one part, in order], "out": FILE.mp4, "fps": float, "exact": bool}.
    ``value`` is the number of frames; ``more`` {"path": FILE, or null for a part of one clip}.
``long.clip2clip.subject_consistency``, ``long.clip2clip.background_consistency``
    ``options`` {"dev": bool}; ``path`` is such a FILE. ``value`` the consistency of its frames,
    ``terms`` frames - 1, ``more`` {"extractor": "dinov2" and so on}. Without dev the branch weighs
    nothing: its scores may be left out.

A *part* is a video, or a scene of one that was split at its cuts: ``NAME`` or ``NAME-Scene-0``,
and its clips are ``NAME_000``, ``NAME_001``, ... or ``NAME_full`` where it is shorter than a clip.
Tables: clips have the columns video (file name), prompt, index, clip, start_s, stop_s, dimension,
value, terms and, for the static filter, static; clip-to-clip scores have video, part, dimension,
value, extractor.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import SAMPLES, scale_of
from mla_study.evaluation.vbench.long.clips import (
    NAN,
    SHORTEST,
    clips_of,
    fuse,
    mapped,
    notes_of,
    part_of,
)
from mla_study.evaluation.vbench.long.configs import TABLES, LongConfigs, load_configs
from mla_study.evaluation.vbench.long.drift import drift

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "EXTRACTORS",
    "SHORTEST",
    "THRESHOLD",
    "LongConfigs",
    "LongScores",
    "clips_of",
    "drift",
    "fuse",
    "load_configs",
    "long_scores",
    "mapped",
    "notes_of",
    "part_of",
    "side_by_side",
]

THRESHOLD = 35.0
"""Of PySceneDetect's content detector, upstream's choice."""
STATIC_CLIPS = 5
"""Clips a prompt that upstream's static filter keeps."""
EXTRACTORS = {
    "subject_consistency": {True: "dinov2", False: "dino"},
    "background_consistency": {True: "dreamsim", False: "clip"},
}
"""Features of the clip-to-clip branch, with and without upstream's dev_flag."""
Row = dict[str, Any]


@dataclass(frozen=True)
class LongScores:
    """Scores of the long mode.

    Attributes:
        videos: what the overall score averages: a row a video and dimension; with ``exact`` a row a
            clip (upstream groups by the clip's path), or a name behind the static filter. Columns
            dimension, video, clip, in_clip, clip_to_clip, mapped, value (as the scorer gave it, not
            scaled), clips, terms.
        overall: a row a dimension: value (scaled to 0..1), clips, videos, left_out (videos),
            extractor, in_clip_weight, clip_to_clip_weight.
        notes: sentences on what was left out, and where upstream's code would have stopped.
    """

    videos: pd.DataFrame
    overall: pd.DataFrame
    notes: tuple[str, ...]


@dataclass
class _Mean:
    """One dimension's rows of :attr:`LongScores.videos`, and their mean."""

    rows: list[Row] = field(default_factory=list)
    value: float = NAN
    notes: list[str] = field(default_factory=list)


def long_scores(
    clips: pd.DataFrame, clip_to_clip: pd.DataFrame, configs: LongConfigs, exact: bool, *,
    dev: bool = True, standard: bool = False, static: bool = False, samples: int = SAMPLES,
) -> LongScores:  # fmt: skip
    """From scores of clips to scores of videos and dimensions; the module tells the columns.

    Args:
        exact: average what upstream's code averages: clips, not videos; names cut at their first
            '_'; with ``standard``, without the videos that were split into scenes. Otherwise the
            mean over a video's clips, weighted by terms and fused a part, and then over videos.
        dev: upstream's dev_flag, which brings in the clip-to-clip branch.
        standard: videos are named {prompt}-{index} after VBench's prompts; else one's own.
        static: temporal flickering counts static clips only (column static).
        samples: videos a prompt that upstream looks for (``standard`` and ``exact``).

    Raises:
        UserError: clip-to-clip scores of other features than ``dev`` asks for.
    """
    import pandas as pd

    videos, overall, notes = list[Row](), list[Row](), list[str]()
    for dimension in dict.fromkeys(clips["dimension"].tolist()):
        rows = [
            {**row, "part": part_of(row["clip"])}
            for row in clips[clips["dimension"] == dimension].to_dict("records")
            if math.isfinite(row["value"]) and row["terms"] > 0
        ]
        pairs = _pairs(clip_to_clip, dimension, dev)
        filtered = static and dimension == "temporal_flickering"
        if exact:
            names = {_stem(row["video"]) for row in rows}
            found = [row for row in rows if not standard or _is_found(row, names, samples)]
            mean = _exact(found, dimension, configs, dev, pairs, filtered)
        else:
            mean = _corrected(rows, dimension, configs, dev, pairs, filtered)
        counted = {row["video"] for row in mean.rows}
        gone = sorted(set(clips.loc[clips["dimension"] == dimension, "video"]) - counted)
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            notes.append(f"{dimension}: {gone[0]}{more} left out of the mean")
        notes += [f"{dimension}: {note}" for note in mean.notes]
        fused = dimension in TABLES
        weights = configs.weights(dimension, dev) if fused else (1.0, 0.0)
        videos += [{"dimension": dimension, **row} for row in mean.rows]
        overall.append(
            {
                "dimension": dimension,
                "value": mean.value * scale_of(dimension),
                "clips": sum(row["clips"] for row in mean.rows),
                "videos": len(counted),
                "left_out": len(gone),
                "extractor": EXTRACTORS[dimension][dev] if fused else "",
                "in_clip_weight": weights[0],
                "clip_to_clip_weight": weights[1],
            }
        )
    return LongScores(pd.DataFrame(videos), pd.DataFrame(overall), tuple(notes))


def side_by_side(found: Mapping[bool, LongScores]) -> pd.DataFrame:
    """Upstream's average (``exact``: True) and the corrected one of the same clips, a row a scorer.

    Columns scorer, upstream, corrected, clips, videos, left_out (videos that upstream's code
    loses), extractor, in_clip_weight, clip_to_clip_weight.
    """
    both = found[True].overall.rename(columns={"dimension": "scorer", "value": "upstream"})
    both.insert(2, "corrected", found[False].overall["value"].to_numpy())
    return both


def _pairs(table: pd.DataFrame, dimension: str, dev: bool) -> dict[tuple[str, str], float]:
    """(video, part) -> clip-to-clip score."""
    if dimension not in TABLES or table.empty:
        return {}
    rows = table[table["dimension"] == dimension].to_dict("records")
    wanted = EXTRACTORS[dimension][dev]
    for row in rows:
        if row["extractor"] != wanted:
            raise UserError(
                f"{dimension} of {row['video']} compares clips by {row['extractor']}, but "
                f"{'with' if dev else 'without'} dev_flag it is {wanted}: score it again"
            )
    return {(row["video"], row["part"]): row["value"] for row in rows}


def _corrected(
    rows: Sequence[Row], dimension: str, configs: LongConfigs, dev: bool,
    pairs: dict[tuple[str, str], float], static: bool,
) -> _Mean:  # fmt: skip
    mean, fused = _Mean(), dimension in TABLES
    kept = [row for row in rows if not static or row["static"]]
    for video, own in _grouped(kept, "video").items():
        parts = list[tuple[float, float, float, float, float]]()
        for part, clips in _grouped(own, "part").items():
            terms = float(sum(row["terms"] for row in clips))
            inside = sum(row["value"] * row["terms"] for row in clips) / terms
            alone, other = len(clips) == 1, pairs.get((video, part), NAN)
            value, image = inside, NAN
            if fused and dev and not alone and math.isnan(other):
                mean.notes.append(f"{part} of {video} has no clip-to-clip score")
                parts.clear()
                break
            if fused and not math.isnan(other):
                weights = configs.weights(dimension, dev)
                value, image = fuse(inside, other, weights, configs.tables[dimension], alone)
            parts.append((terms, inside, NAN if alone else other, image, value))
        if parts:
            weights = [part[0] for part in parts]
            inside, other, image, value = (
                _weighted([part[i] for part in parts], weights) for i in range(1, 5)
            )
            mean.rows.append(_told(video, "", inside, other, image, value, len(own), sum(weights)))
    if mean.rows:
        mean.value = sum(row["value"] for row in mean.rows) / len(mean.rows)
    return mean


def _exact(
    rows: Sequence[Row], dimension: str, configs: LongConfigs, dev: bool,
    pairs: dict[tuple[str, str], float], static: bool,
) -> _Mean:  # fmt: skip
    mean = _Mean()
    if not rows:
        mean.notes.append("upstream's code finds no clip and stops")
        return mean
    if static:
        return _exact_static(rows)
    if dimension in TABLES:
        return _exact_fused(rows, dimension, configs, dev, pairs)
    mean.rows = [_of_clip(row) for row in rows]
    mean.value = sum(row["value"] for row in rows) / len(rows)
    return mean


def _exact_fused(
    rows: Sequence[Row], dimension: str, configs: LongConfigs, dev: bool,
    pairs: dict[tuple[str, str], float],
) -> _Mean:  # fmt: skip
    mean = _Mean()
    counts = Counter((row["video"], row["part"]) for row in rows)
    if max(counts.values()) == 1:
        if not dev:
            mean.notes.append("no video has two clips: upstream's code divides by zero and stops")
            return mean
        # nothing to fuse: upstream returns VBench's own mean over the clips
        mean.rows = [_of_clip(row) for row in rows]
        mean.value = _weighted([row["value"] for row in rows], [row["terms"] for row in rows])
        return mean
    lacking = {key for key, count in counts.items() if dev and count > 1 and key not in pairs}
    mean.notes += [
        f"{part} of {video} has no clip-to-clip score" for video, part in sorted(lacking)
    ]
    # by file name alone, as upstream has it: a later part of that name wins
    by_name = {part: value for (_, part), value in pairs.items()}
    weights, table = configs.weights(dimension, dev), configs.tables[dimension]
    for row in rows:
        if (row["video"], row["part"]) in lacking:
            continue
        if not dev:
            mean.rows.append(_of_clip(row))
            continue
        other = by_name.get(row["clip"].split("_")[0], 0.0)
        value, image = fuse(row["value"], other, weights, table, False)
        mean.rows.append({**_of_clip(row), "clip_to_clip": other, "mapped": image, "value": value})
    if mean.rows:
        mean.value = sum(row["value"] for row in mean.rows) / len(mean.rows)
    return mean


def _exact_static(rows: Sequence[Row]) -> _Mean:
    """Behind the static filter alone upstream groups by name: up to the first '_'."""
    mean, kept = _Mean(), dict[str, list[Row]]()
    for row in sorted(rows, key=lambda row: f"{row['part']}/{row['clip']}"):
        prompt = _prompt_of(row["clip"])
        few = len(kept.get(prompt, ())) < STATIC_CLIPS
        if prompt == row["prompt"] and few and row["static"]:
            kept.setdefault(prompt, []).append(row)
    found = [row for own in kept.values() for row in own]
    names = {_stem(row["video"]) for row in rows}
    lost = sorted({row["clip"] for row in found if row["clip"].split("_")[0] not in names})
    if lost or not found:
        why = f"{lost[0]} belongs to no video by its name" if lost else "no clip is static"
        mean.notes.append(f"{why}, so upstream's code stops behind its static filter")
        return mean
    for row in found:
        row["name"] = row["clip"].split("_")[0]
    for own in _grouped(found, "name").values():
        value = sum(row["value"] for row in own) / len(own)
        terms = float(sum(row["terms"] for row in own))
        mean.rows.append(_told(own[0]["video"], "", value, NAN, NAN, value, len(own), terms))
    mean.value = sum(row["value"] for row in mean.rows) / len(mean.rows)
    return mean


def _is_found(row: Row, names: set[str], samples: int) -> bool:
    """Whether upstream's standard mode looks for the clip and takes it for a video's."""
    wanted = {f"{row['prompt']}-{index}" for index in range(samples)}
    return row["part"] in wanted and row["clip"].split("_")[0] in names


def _prompt_of(clip: str) -> str:
    """Prompt that upstream reads in a clip's name: ``PROMPT-0_000`` or ``PROMPT-Scene-0_000``."""
    return re.sub(r"-\d+$", "", re.sub(r"(-Scene-\d+|-\d+)_\d+$", "", clip))


def _of_clip(row: Row) -> Row:
    """A clip's row of :attr:`LongScores.videos`, nothing fused."""
    value = row["value"]
    return _told(row["video"], row["clip"], value, NAN, NAN, value, 1, row["terms"])


def _told(
    video: str, clip: str, inside: float, other: float, image: float, value: float, clips: int,
    terms: float,
) -> Row:  # fmt: skip
    return {
        "video": video, "clip": clip, "in_clip": inside, "clip_to_clip": other, "mapped": image,
        "value": value, "clips": clips, "terms": terms,
    }  # fmt: skip


def _grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean of those that there are."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v)]
    return sum(v * w for v, w in pairs) / sum(w for _, w in pairs) if pairs else NAN


def _stem(video: str) -> str:
    return video.rpartition(".")[0] or video
