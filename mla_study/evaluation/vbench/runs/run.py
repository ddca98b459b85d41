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
from mla_study.evaluation.vbench.runs import tables, videos
from mla_study.evaluation.vbench.runs.long_run import run_long
from mla_study.evaluation.vbench.runs.origin import origin_of
from mla_study.evaluation.vbench.runs.plan import (
    STATIC_FILTER,
    base_of,
    make_plan,
    preflight,
    subjects,
    wanted_videos,
)
from mla_study.evaluation.vbench.runs.scoring import (
    FLICKER,
    Finished,
    Request,
    Say,
    answer,
    bar,
    kept,
    protocol_of,
    save_problems,
    weights_mode,
    write,
)
from mla_study.evaluation.vbench.runs.store import Scores, locked
from mla_study.evaluation.vbench.runs.videos import Problem, Video
from mla_study.study.runs import Validity

_SHARD = re.compile(r"shard-\d+-of-\d+")


def run(request: Request, say: Say, progress: bool = True) -> Finished:
    """Score the videos and write ``table``, ``videos`` and ``problems`` with a ``run.json``.

    Raises:
        UserError: no videos, a bad one (all are named in ``problems.csv``), weights that are not
            there, a folder in use.
    """
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


def gather(request: Request, store: Scores, say: Say, progress: bool) -> list[Video]:
    """The videos that can be scored, after the table of what is wrong has been written.

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
    bad = [problem for problem in problems if problem.fatal]
    listed = request.out / "problems.csv"
    save_problems(listed, problems)
    if bad and not request.skip_bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{bad[0].name} {bad[0].what}{more}: {listed} has them all; mend or remove them, or "
            "go on without them by --skip-bad"
        )
    if not seen:
        raise UserError(f"{request.place} holds no video that can be scored: see {listed}")
    return seen


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
    seen = gather(request, store, say, progress)
    suite, suite_hash = suite_of(request)
    mine = seen if request.shard is None else seen[request.shard[0] :: request.shard[1]]
    if request.long is not None:
        return run_long(request, mine, suite, suite_hash, store, say, progress)
    asked = {name: subjects(name, request.mode, mine, suite) for name in request.scorers}
    nothing = [name for name, has in asked.items() if not has]
    if len(nothing) == len(asked):
        raise UserError(
            f"no video in {request.place} is of a prompt that {', '.join(nothing[:3])} look at: "
            "names must be {prompt}-{index}.mp4, or give --prompts; any clips: --mode custom"
        )
    problems = [Problem(n, "no video of its prompts: left out", False) for n in nothing]
    scorers = [name for name in request.scorers if asked[name]]
    filtered = _static(request, asked, suite, store, say, progress)
    lacking = _lacking(seen, suite, scorers, filtered)
    plan = make_plan(scorers, asked, suite, request.where, weights_mode(request))
    stopped, failures = answer(plan.questions, request, store, say, progress)
    answered = kept(plan.questions, store)
    protocol = replace(
        protocol_of(request, seen, suite_hash, plan, answered), static_filter=filtered
    )
    wanted = {name: len(asked[name]) for name in scorers}
    for name in scorers if suite else ():
        complete = base_of(name) == FLICKER and filtered and not lacking
        # of a complete set the filter may leave fewer
        wanted[name] = wanted[name] if complete else sum(wanted_videos(name, suite).values())
    folder = request.out
    shown = tables.video_table(answered)
    best: Validity = "invalid" if plan.random else "full"
    table = tables.score_table(
        shown, scorers, wanted, model=request.model, mode=request.mode, validity=best
    )
    save_problems(folder / "problems.csv", [*problems, *lacking, *failures])
    if lacking:
        say(f"{len(lacking)} prompts or names lack something: {folder / 'problems.csv'}")
    written = write(request, {"table": table, "videos": shown}, seen, protocol, plan.random)
    return Finished(table, shown, written, folder, failures, stopped)


def _static(
    request: Request, asked: dict[str, list[Video]], suite: Mapping[str, Entry], store: Scores,
    say: Say, progress: bool,
) -> bool:  # fmt: skip
    """Drop moving videos from temporal flickering, and keep five a prompt; whether that was done.

    Raises:
        UserError: it was asked for, and its weights are not there.
    """
    if request.mode != "short" or not asked.get(FLICKER) or request.static_filter is False:
        return False
    try:
        plan = make_plan([STATIC_FILTER], {STATIC_FILTER: asked[FLICKER]}, suite, request.where)
    except UserError as error:
        if request.static_filter:
            raise
        say(f"temporal flickering is scored on all videos, moving ones too, as {error}")
        return False
    answer(plan.questions, request, store, say, progress)
    held: dict[str | None, list[Video]] = {}
    for question, found in kept(plan.questions, store):
        if found.value >= 0.5:
            held.setdefault(question.video.prompt, []).append(question.video)
    asked[FLICKER] = [
        video
        for group in held.values()
        for video in sorted(group, key=lambda v: v.index or 0)[:SAMPLES]
    ]
    say(f"{len(asked[FLICKER])} of {len(plan.questions)} videos are static enough")
    return True


def _lacking(
    seen: Sequence[Video], suite: Mapping[str, Entry], scorers: Sequence[str], filtered: bool
) -> list[Problem]:
    if not suite:
        return []
    wanted: dict[str, int] = {}
    for name in scorers:
        for prompt, count in wanted_videos(name, suite, filtered).items():
            wanted[prompt] = max(count, wanted.get(prompt, 0))
    return videos.absent(seen, wanted, list(suite))
