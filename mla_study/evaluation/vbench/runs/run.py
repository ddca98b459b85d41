"""A run: look at the videos, score what has no score yet, and write the tables.

Everything that was scored is kept at once (:mod:`store`), so that a killed run goes on, and tables
are made from what is kept: the same for any number of workers, shards and interruptions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import SAMPLES
from mla_study.evaluation.vbench.prompts import INFO, Entry, read_suite, text_sha256
from mla_study.evaluation.vbench.runs import counts, tables, videos
from mla_study.evaluation.vbench.runs.long_run import run_long
from mla_study.evaluation.vbench.runs.origin import origin_of
from mla_study.evaluation.vbench.runs.plan import (
    STATIC_FILTER,
    make_plan,
    preflight,
    subjects,
    wanted_videos,
)
from mla_study.evaluation.vbench.runs.scoring import (
    FLICKER,
    LISTED,
    Finished,
    Gathered,
    Request,
    Say,
    all_given,
    answer,
    bar,
    incomplete,
    kept,
    protocol_of,
    save_problems,
    unscored,
    weights_mode,
    write,
)
from mla_study.evaluation.vbench.runs.store import Scores, locked
from mla_study.evaluation.vbench.runs.videos import Problem, Video
from mla_study.study.runs import Validity

UNFILTERED = "moving videos were not left out, as the protocol demands"
_SHARD = re.compile(r"shard-\d+-of-\d+")


def run(request: Request, say: Say, progress: bool = True) -> Finished:
    """Score the videos and write ``table``, ``videos`` and ``problems`` with a ``run.json``.

    Raises:
        UserError: no videos, a bad one (all are named in ``problems.csv``), weights that are not
            there, a folder in use or within that of the videos.
    """
    place, whole = request.place.resolve(), request.out.resolve()
    if place == whole or place in whole.parents:
        raise UserError(
            f"--out {request.out} lies in the videos' own folder {request.place}, which is only "
            "read: give one outside"
        )
    preflight(request.scorers, request.where, weights_mode(request))
    if request.place.exists():
        origin_of(request.place, request.prompts, request.extended)  # may contradict each other
    out = request.out if request.shard is None else request.out / shard_name(*request.shard)
    with locked(out):
        store = Scores(out)
        try:
            return _run(replace(request, out=out), store, say, progress)
        finally:
            store.close()


def shard_name(index: int, count: int) -> str:
    """Folder of a shard below the run's."""
    return f"shard-{index}-of-{count}"


def gather(request: Request, store: Scores, say: Say, progress: bool) -> Gathered:
    """The videos, after the table of what is wrong has been written.

    Raises:
        UserError: none, or bad ones without ``skip_bad``.
    """
    for other in (*request.take, *shards_in(request.out)):
        count = store.absorb(other)
        if count:
            say(f"{count} scores were taken over from {other}")
    found = videos.find(request.place, request.prompts)
    if passed := videos.passed_over(request.place):
        say(passed)
    with bar(len(found), "videos looked at", progress) as tick:
        seen, problems = videos.examine(found, store.seen, store.see, progress=lambda _: tick())
    untold = sum(told is None for told in found.values())
    if untold:
        what = f"tells nothing of {untold} of the {len(found)} videos: they have no prompt"
        table = request.prompts or videos.table_beside(request.place)
        problems.append(Problem(table.name if table else "", what, False))
    bad = [problem for problem in problems if problem.fatal]
    listed = request.out / LISTED
    save_problems(listed, problems)
    if bad and not request.skip_bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{bad[0].name} {bad[0].what}{more}: {listed} has them all; mend or remove them, or "
            "go on without them by --skip-bad"
        )
    if not seen:
        raise UserError(f"{request.place} holds no video that can be scored: see {listed}")
    if bad:
        say(f"{len(bad)} of {len(found)} videos are skipped: {listed}")
    good = {video.path for video in seen}
    return Gathered(seen, [told for path, told in found.items() if path not in good], problems)


def shards_in(out: Path) -> list[Path]:
    """Folders of shards below a run's."""
    if not out.is_dir():
        return []
    return sorted(folder for folder in out.iterdir() if _SHARD.fullmatch(folder.name))


def suite_of(request: Request) -> tuple[dict[str, Entry], str | None]:
    """VBench's prompts with the hash of their file; nothing in custom mode."""
    if request.mode == "custom" or request.where.environment is None:
        return {}, None
    (path,) = request.where.environment.root.glob(f"lib/python3.*/site-packages/vbench/{INFO}")
    return read_suite(path), text_sha256(path)


def _run(request: Request, store: Scores, say: Say, progress: bool) -> Finished:
    given = gather(request, store, say, progress)
    suite, suite_hash = suite_of(request)
    if suite:
        seen, doubles = counts.without_doubles(given.videos)
        given = replace(given, videos=seen, problems=[*given.problems, *doubles])
    seen, shard = given.videos, request.shard
    mine = seen if shard is None else seen[shard[0] :: shard[1]]
    if request.long is not None:
        return run_long(request, given, mine, suite, suite_hash, store, say, progress)
    wanted = {name: wanted_videos(name, suite) for name in request.scorers}
    asked = {name: subjects(name, request.mode, mine, suite) for name in request.scorers}
    for name, has in asked.items():
        asked[name] = counts.taken(has, wanted[name]) if wanted[name] else has
    nothing = [name for name, has in asked.items() if not has]
    if len(nothing) == len(asked):
        raise UserError(
            f"no video in {request.place} is of a prompt that {', '.join(nothing[:3])} look at: "
            "names must be {prompt}-{index}.mp4, or give --prompts; any clips: --mode custom"
        )
    problems = [Problem(n, "no video of its prompts: left out", False) for n in nothing]
    scorers = [name for name in request.scorers if asked[name]]
    why = {name: incomplete(request, given, name, asked[name], wanted[name]) for name in scorers}
    lacking = _lacking(seen, suite, [wanted[name] for name in scorers])
    filtered, failures = _static(request, asked, suite, why, store, say, progress)
    plan = make_plan(scorers, asked, suite, request.where, weights_mode(request))
    stopped, more = answer(plan.questions, request, store, say, progress)
    failures += more
    answered = kept(plan.questions, store)
    protocol = replace(
        protocol_of(request, seen, suite_hash, plan, answered), static_filter=filtered
    )
    count = dict[str, int | None]()
    for name in scorers:
        scored = sum(question.scorer == name for question, _ in answered)
        why[name] += unscored(len(asked[name]) - scored, "video")
        count[name] = sum(wanted[name].values()) or all_given(given, name)
        if name == FLICKER and filtered:
            # of a complete set the filter may leave fewer
            count[name] = SAMPLES * len(wanted[name]) if why[name] else len(asked[name])
    shown = tables.video_table(answered)
    best: Validity = "invalid" if plan.random else "full"
    table = tables.score_table(
        shown, scorers, count, model=request.model, mode=request.mode, validity=best, why=why
    )
    found = [*given.problems, *problems, *lacking, *failures]
    frames = {"table": table, "videos": shown}
    written = write(request, frames, seen, protocol, plan.random, found)
    return Finished(table, shown, written, request.out, failures, stopped, found)


def _static(
    request: Request, asked: dict[str, list[Video]], suite: Mapping[str, Entry],
    why: Mapping[str, list[str]], store: Scores, say: Say, progress: bool,
) -> tuple[bool, list[Problem]]:  # fmt: skip
    """Drop moving videos from temporal flickering, and keep five a prompt.

    Returns:
        whether that was done (if not, ``why`` gets a clause), and the videos that failed there.

    Raises:
        UserError: it was asked for, and its weights are not there.
    """
    if request.mode != "short" or not asked.get(FLICKER):
        return False, []
    if request.static_filter is False:
        why[FLICKER].append(UNFILTERED)
        return False, []
    try:
        plan = make_plan([STATIC_FILTER], {STATIC_FILTER: asked[FLICKER]}, suite, request.where)
    except UserError as error:
        if request.static_filter:
            raise
        say(f"temporal flickering is scored on all videos, moving ones too, as {error}")
        why[FLICKER].append(UNFILTERED)
        return False, []
    _, failures = answer(plan.questions, request, store, say, progress)
    held: dict[str | None, list[Video]] = {}
    judged = kept(plan.questions, store)
    for question, found in judged:
        if found.value >= 0.5:
            held.setdefault(question.video.prompt, []).append(question.video)
    if len(judged) < len(plan.questions):
        why[FLICKER].append(
            f"the static filter judged {len(judged)} of {len(plan.questions)} videos"
        )
    asked[FLICKER] = [
        video
        for group in held.values()
        for video in sorted(group, key=lambda v: v.index or 0)[:SAMPLES]
    ]
    say(f"{len(asked[FLICKER])} of {len(plan.questions)} videos are static enough")
    if not asked[FLICKER]:
        what = f"none of {len(plan.questions)} videos is static enough: it has no score"
        failures.append(Problem(FLICKER, what, False))
    return True, failures


def _lacking(
    seen: Sequence[Video], suite: Mapping[str, Entry], wanted: Sequence[counts.Wanted]
) -> list[Problem]:
    if not suite:
        return []
    most: dict[str, int] = {}
    for each in wanted:
        for prompt, count in each.items():
            most[prompt] = max(count, most.get(prompt, 0))
    return counts.absent(seen, most, suite)
