"""A run of the long mode: videos are cut into clips, clips are scored, scores are averaged.

Every score is one of a clip and is kept as such (table ``clips``), so that change along the videos
is a curve (table ``drift``). Upstream's way of cutting and averaging and the corrected average of
the same clips stand beside each other (table ``averages``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import SUBSTITUTES
from mla_study.evaluation.vbench.long import averages as long
from mla_study.evaluation.vbench.long.configs import TABLES
from mla_study.evaluation.vbench.prompts import Entry
from mla_study.evaluation.vbench.runs import tables, videos
from mla_study.evaluation.vbench.runs.drive import Job
from mla_study.evaluation.vbench.runs.plan import (
    STATIC_FILTER,
    Question,
    base_of,
    make_plan,
    subjects,
    version_of,
)
from mla_study.evaluation.vbench.runs.scoring import (
    FLICKER,
    Finished,
    LongOptions,
    Request,
    Say,
    answer,
    kept,
    protocol_of,
    save_problems,
    weights_mode,
    write,
)
from mla_study.evaluation.vbench.runs.store import Key, Scored, Scores
from mla_study.evaluation.vbench.runs.videos import Problem, Video
from mla_study.study.runs import Validity, json_sha256

if TYPE_CHECKING:
    import pandas as pd

    from mla_study.evaluation.vbench.prompts import Entry
SPLIT, FIRST_FRAMES, CLIP_TO_CLIP = "long.split", "long.first_frames", "long.clip2clip"
CLIPS = "clips"
"""Folder of a run's clips; the user's own folder is only read."""


@dataclass(frozen=True)
class Clip:
    """A clip as a video of its own, and where in which video it lies."""

    video: Video
    source: Video
    part: str
    start_s: float
    stop_s: float


def run_long(
    request: Request, seen: Sequence[Video], suite: Mapping[str, Entry], suite_hash: str | None,
    store: Scores, say: Say, progress: bool,
) -> Finished:  # fmt: skip
    """Cut, score and average; see :func:`run.run`."""
    options = request.long
    assert options is not None
    standard = all(video.prompt in suite for video in seen)
    asked = {
        scorer: subjects(scorer, "long" if standard else "custom", seen, suite)
        for scorer in request.scorers
    }
    scorers = [scorer for scorer in request.scorers if asked[scorer]]
    if not scorers:
        raise UserError(f"no video in {request.place} is of a prompt of {request.scorers[0]}")
    lengths = {
        scorer: {
            video.name: _seconds(options, scorer, suite.get(video.prompt or ""), standard)
            for video in asked[scorer]
        }
        for scorer in scorers
    }
    for scorer, mine in lengths.items():
        for video in asked[scorer]:
            for note in long.notes_of(
                video.name, video.frames, video.rate, mine[video.name], options.exact
            ):
                say(note)
        break
    wanted = {pair for mine in lengths.values() for pair in mine.items()}
    clips, failures = _split(request, seen, wanted, store, say, progress)
    of_scorer = {
        scorer: [clip for video in asked[scorer]
                 for clip in clips.get((video.name, lengths[scorer][video.name]), ())]
        for scorer in scorers
    }  # fmt: skip
    plan = make_plan(
        scorers, {s: [clip.video for clip in mine] for s, mine in of_scorer.items()}, suite,
        request.where, weights_mode(request),
    )  # fmt: skip
    stopped, more = answer(plan.questions, request, store, say, progress)
    failures += more
    held = kept(plan.questions, store)
    static = _static(request, of_scorer, suite, store, say, progress)
    pairs, more = _clip_to_clip(request, of_scorer, plan.weights, store, say, progress)
    failures += more
    table = clip_table(held, of_scorer, static)
    found = averages(table, pairs, options, standard, static is not None)
    best: Validity = "invalid" if plan.random else "full"
    shown = _video_rows(found[options.exact], table, seen)
    counts: dict[str, int | None] = {scorer: len(asked[scorer]) for scorer in scorers}
    scored = tables.score_table(
        shown, scorers, counts, model=request.model, mode=request.mode, validity=best
    )
    protocol = replace(
        protocol_of(request, seen, suite_hash if standard else None, plan, held),
        static_filter=static is not None,
        long_configs=f"{options.configs.source} ({options.configs.sha256[:12]})",
        aggregation="upstream's" if options.exact else "corrected",
        clip_to_clip=("DINOv2 and DreamSim" if options.dev else "not compared"),
    )  # fmt: skip
    for note in dict.fromkeys(note for result in found.values() for note in result.notes):
        say(note)
    frames = {
        "table": scored, "videos": shown, "clips": table, "averages": long.side_by_side(found),
        "drift": drift_table(table, request.model, plan.random),
    }  # fmt: skip
    if frames["drift"].empty:
        del frames["drift"]
    save_problems(request.out / "problems.csv", failures)
    record = write(request, frames, seen, protocol, plan.random)
    return Finished(scored, shown, record, request.out, failures, stopped)


def _seconds(options: LongOptions, scorer: str, entry: Entry | None, standard: bool) -> float:
    dimension = base_of(scorer)
    if dimension not in options.configs.clip_seconds:
        dimension = "temporal_flickering"  # extras look at clips of the usual length
    members = entry.dimensions if standard and entry is not None else None
    return options.configs.seconds(dimension, options.exact, members)


def _split(
    request: Request, seen: Sequence[Video], wanted: set[tuple[str, float]], store: Scores,
    say: Say, progress: bool,
) -> tuple[dict[tuple[str, float], list[Clip]], list[Problem]]:  # fmt: skip
    """Clips of each video for each length; those that are there already are taken."""
    options = request.long
    assert options is not None
    by_name = {video.name: video for video in seen}
    asked: dict[tuple[str, float], Question] = {}
    for name, seconds in sorted(wanted):
        video = by_name[name]
        told = {
            "seconds": seconds, "exact": options.exact, "threshold": long.THRESHOLD,
            "semantic": options.semantic,
        }  # fmt: skip
        key = Key(video.sha256, SPLIT, version_of(SPLIT, {}), json_sha256([told, video.name]))
        folder = request.out / CLIPS / f"{video.sha256[:16]}-{key.question[:8]}"
        job = Job(
            str(len(asked)), video.path.resolve(), video.name, video.prompt,
            more={**told, "out": str(folder.resolve())},
        )  # fmt: skip
        asked[video.name, seconds] = Question(SPLIT, video, key, job)
    lost = [asked_ for asked_ in asked.values() if not _clips_there(store.get(asked_.key))]
    for question_ in lost:
        store.forget(question_.key)
    _, failures = answer(list(asked.values()), request, store, say, progress)
    made: dict[tuple[str, float], list[Clip]] = {}
    for pair, question_ in asked.items():
        scored = store.get(question_.key)
        if scored is not None:
            made[pair] = _clips_of(question_.video, scored, store)
    return made, failures


def _clips_there(scored: Scored | None) -> bool:
    return scored is not None and all(Path(c["path"]).is_file() for c in scored.more["clips"])


def _clips_of(source: Video, scored: Scored, store: Scores) -> list[Clip]:
    made = list[Clip]()
    for clip in scored.more["clips"]:
        path = Path(clip["path"])
        facts = store.seen(path)
        if facts is None:
            facts = videos.look(path)
            if "problem" in facts:
                raise UserError(f"{path} {facts['problem']}: delete {path.parent} and run again")
            store.see(path, facts)
        video = Video(
            path, path.name, **facts, prompt=source.prompt, index=source.index, told=source.told
        )
        made.append(Clip(video, source, clip["part"], clip["start_s"], clip["stop_s"]))
    return made


def _static(
    request: Request, of_scorer: Mapping[str, Sequence[Clip]], suite: Mapping[str, Entry],
    store: Scores, say: Say, progress: bool,
) -> dict[str, bool] | None:  # fmt: skip
    """Which clips are static, by content; None where nobody asked."""
    if not request.static_filter or FLICKER not in of_scorer:
        return None
    asked = {STATIC_FILTER: [clip.video for clip in of_scorer[FLICKER]]}
    plan = make_plan([STATIC_FILTER], asked, suite, request.where)
    answer(plan.questions, request, store, say, progress)
    return {q.video.sha256: found.value >= 0.5 for q, found in kept(plan.questions, store)}


def _clip_to_clip(
    request: Request, of_scorer: Mapping[str, Sequence[Clip]],
    hashes: Mapping[str, Mapping[str, str]], store: Scores, say: Say, progress: bool,
) -> tuple[pd.DataFrame, list[Problem]]:  # fmt: skip
    """Scores of the first frames of all clips of a part, for the two dimensions that have them."""
    import pandas as pd

    options = request.long
    assert options is not None
    rows, failures = list[dict[str, Any]](), list[Problem]()
    for dimension in [name for name in TABLES if name in of_scorer and options.dev]:
        parts: dict[tuple[str, str], list[Clip]] = {}
        for clip in of_scorer[dimension]:
            parts.setdefault((clip.source.name, clip.part), []).append(clip)
        firsts = list[Question]()
        for number, ((_, part), mine) in enumerate(parts.items()):
            if len(mine) < 2:
                continue
            paths = [str(clip.video.path) for clip in mine]
            content = [clip.video.sha256 for clip in mine]
            told = {"fps": float(mine[0].video.rate), "exact": options.exact}
            out = mine[0].video.path.parent / f"{part}.first.mp4"
            version = version_of(FIRST_FRAMES, {})
            key = Key(json_sha256(content), FIRST_FRAMES, version, json_sha256(told))
            job = Job(
                str(number), mine[0].source.path.resolve(), f"{part}.mp4",
                more={**told, "clips": paths, "out": str(out)},
            )  # fmt: skip
            firsts.append(Question(FIRST_FRAMES, mine[0].source, key, job))
            scored = store.get(key)
            if scored is not None and not Path(str(scored.more["path"])).is_file():
                store.forget(key)
        failures += answer(firsts, request, store, say, progress)[1]
        scorer = f"{CLIP_TO_CLIP}.{dimension}"
        version = version_of(scorer, hashes[dimension])
        asked = list[Question]()
        for first, made in kept(firsts, store):
            key = Key(first.key.sha256, scorer, version, json_sha256({}))
            path = Path(str(made.more["path"]))
            job = Job(first.job.id, path, path.name, more={"part": Path(first.job.name).stem})
            asked.append(Question(scorer, first.video, key, job))
        failures += answer(asked, request, store, say, progress)[1]
        rows += [
            {
                "video": q.video.name, "part": q.job.more["part"], "dimension": dimension,
                "value": found.value, "extractor": found.more.get("extractor", ""),
            }
            for q, found in kept(asked, store)
        ]  # fmt: skip
    return pd.DataFrame(
        rows, columns=["video", "part", "dimension", "value", "extractor"]
    ), failures


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


def _video_rows(found: long.LongScores, clips: pd.DataFrame, seen: Sequence[Video]) -> pd.DataFrame:
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
    table = pd.DataFrame(rows)
    if len(table):
        table["index"] = table["index"].astype("Int64")
    return table


def drift_table(clips: pd.DataFrame, model: str, random: bool) -> pd.DataFrame:
    """:func:`long.drift` with the model's name: model, scorer, second, value, low, high, videos."""
    drift = long.drift(clips).rename(
        columns={"dimension": "scorer", "seconds": "second", "mean": "value"}
    )
    drift.insert(0, "model", model)
    worth = [
        "invalid" if random else "substitute" if scorer in SUBSTITUTES else "full"
        for scorer in drift["scorer"]
    ]
    return drift.assign(validity=worth)
