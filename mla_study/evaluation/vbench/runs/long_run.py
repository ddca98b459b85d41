"""A run of the long mode: videos are cut into clips, clips are scored, scores are averaged.

Every score is one of a clip and is kept as such (table ``clips``), so that change along the videos
is a curve (table ``drift``). Upstream's way of cutting and averaging and the corrected average of
the same clips stand beside each other (table ``averages``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.long import averages as long
from mla_study.evaluation.vbench.long.configs import TABLES
from mla_study.evaluation.vbench.prompts import Entry
from mla_study.evaluation.vbench.runs import counts, tables, videos
from mla_study.evaluation.vbench.runs.drive import Job
from mla_study.evaluation.vbench.runs.long_tables import (
    Clip,
    averages,
    clip_table,
    drift_table,
    video_rows,
)
from mla_study.evaluation.vbench.runs.plan import (
    STATIC_FILTER,
    Question,
    base_of,
    make_plan,
    subjects,
    version_of,
    wanted_videos,
)
from mla_study.evaluation.vbench.runs.scoring import (
    FLICKER,
    LISTED,
    Finished,
    Gathered,
    LongOptions,
    Request,
    Say,
    all_given,
    answer,
    incomplete,
    kept,
    protocol_of,
    unscored,
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
SAID = 8
"""Notes on videos that are printed; all are kept."""
CLIPS = "clips"
"""Folder of a run's clips; the user's own folder is only read."""


def run_long(
    request: Request, given: Gathered, seen: Sequence[Video], suite: Mapping[str, Entry],
    suite_hash: str | None, store: Scores, say: Say, progress: bool,
) -> Finished:  # fmt: skip
    """Cut, score and average; see :func:`run.run`.

    Args:
        given: all videos. seen: those of this shard.
    """
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
    wanted = {
        scorer: wanted_videos(scorer, suite if standard else {}, "long") for scorer in scorers
    }
    why = {
        scorer: [*incomplete(request, given, scorer, asked[scorer], wanted[scorer]),
                 *_short(asked[scorer])]
        for scorer in scorers
    }  # fmt: skip
    problems = [*given.problems, *_notes(lengths, asked, options.exact, say)]
    if standard and suite:
        every = {prompt: n for mine in wanted.values() for prompt, n in mine.items()}
        problems += counts.absent(given.videos, every, suite)
    pairs_wanted = {pair for mine in lengths.values() for pair in mine.items()}
    clips, failures = _split(request, seen, pairs_wanted, store, say, progress)
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
    for scorer in scorers:
        scored = sum(question.scorer == scorer for question, _ in held)
        why[scorer] += unscored(len(of_scorer[scorer]) - scored, "clip")
    static, more = _static(request, of_scorer, suite, store, say, progress)
    failures += more
    pairs, more = _clip_to_clip(request, of_scorer, plan.weights, store, say, progress)
    failures += more
    table = clip_table(held, of_scorer, static)
    found = averages(table, pairs, options, standard, static is not None)
    best: Validity = "invalid" if plan.random else "full"
    shown = video_rows(found[options.exact], table, seen)
    count: dict[str, int | None] = {
        scorer: sum(wanted[scorer].values()) or all_given(given, scorer) for scorer in scorers
    }
    table_ = tables.score_table(
        shown, scorers, count, model=request.model, mode=request.mode, validity=best, why=why
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
        problems.append(Problem("averages", note, False))
    frames = {
        "table": table_, "videos": shown, "clips": table, "averages": long.side_by_side(found),
        "drift": drift_table(table, request.model, table_),
    }  # fmt: skip
    if frames["drift"].empty:
        del frames["drift"]
    problems += failures
    record = write(request, frames, seen, protocol, plan.random, problems)
    return Finished(table_, shown, record, request.out, failures, stopped, problems)


def _short(mine: Sequence[Video]) -> list[str]:
    """A clause on videos that are too short for the long mode; none where there are none."""
    short = sum(video.seconds < long.SHORTEST for video in mine)
    if not short:
        return []
    last = "videos last" if len(mine) > 1 else "video lasts"
    return [f"{short} of {len(mine)} {last} less than the {long.SHORTEST:g} s of a long video"]


def _notes(
    lengths: Mapping[str, Mapping[str, float]], asked: Mapping[str, Sequence[Video]], exact: bool,
    say: Say,
) -> list[Problem]:  # fmt: skip
    """What is odd about videos in long mode, each said once."""
    found: dict[str, Problem] = {}
    for scorer, mine in lengths.items():
        for video in asked[scorer]:
            seconds = mine[video.name]
            for note in long.notes_of(video.name, video.frames, video.rate, seconds, exact):
                what = note.removeprefix(f"{video.name} ")
                found.setdefault(note, Problem(video.name, what, False))
    for note in [*found][:SAID]:
        say(note)
    if len(found) > SAID:
        say(f"{len(found) - SAID} more notes on videos stand in {LISTED}")
    return list(found.values())


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
) -> tuple[dict[str, bool] | None, list[Problem]]:  # fmt: skip
    """Which clips are static, by content (None where nobody asked), and those that failed."""
    if not request.static_filter or FLICKER not in of_scorer:
        return None, []
    asked = {STATIC_FILTER: [clip.video for clip in of_scorer[FLICKER]]}
    plan = make_plan([STATIC_FILTER], asked, suite, request.where)
    _, failures = answer(plan.questions, request, store, say, progress)
    judged = kept(plan.questions, store)
    return {q.video.sha256: found.value >= 0.5 for q, found in judged}, failures


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
