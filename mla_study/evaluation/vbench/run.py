"""A run: look at the videos, score what has no score yet, and write the tables.

Everything that was scored is kept at once (:mod:`store`), so that a killed run goes on, and tables
are made from what is kept: the same for any number of workers, shards and interruptions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench import tables, videos
from mla_study.evaluation.vbench.dimensions import SAMPLES, VERSION
from mla_study.evaluation.vbench.drive import Answer, Job, drive
from mla_study.evaluation.vbench.plan import (
    STATIC_FILTER,
    Mode,
    Place,
    Plan,
    Question,
    base_of,
    launcher,
    make_plan,
    subjects,
    wanted_videos,
)
from mla_study.evaluation.vbench.prompts import INFO, Entry, read_suite, text_sha256, told_by
from mla_study.evaluation.vbench.protocol import Protocol, spread
from mla_study.evaluation.vbench.store import Scored, Scores, locked
from mla_study.evaluation.vbench.videos import Problem, Video
from mla_study.study.runs import Provenance, Validity, atomic_write, write_result

if TYPE_CHECKING:
    import pandas as pd

FLICKER = "temporal_flickering"
MODULES = ("mla_study.evaluation.vbench.run",)
_SHARD = re.compile(r"shard-\d+-of-\d+")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        place: folder of videos, or one video. out: folder of the run.
        prompts: table of prompts. extended: file with the longer prompts that the model was told.
        static_filter: drop moving videos from temporal flickering, as VBench's protocol does; None
            does so where its weights are there.
        devices: one a process. shard: (i, n) does every n-th video from the i-th.
        take: folders of runs whose scores are taken over.
        skip_bad: go on without videos that cannot be scored.
    """

    place: Path
    out: Path
    scorers: tuple[str, ...]
    where: Place
    mode: Mode = "short"
    model: str = ""
    prompts: Path | None = None
    extended: Path | None = None
    static_filter: bool | None = None
    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1
    shard: tuple[int, int] | None = None
    take: tuple[Path, ...] = ()
    skip_bad: bool = False


@dataclass
class Finished:
    """What a run leaves: tables, the run record, and what did not work."""

    table: pd.DataFrame
    videos: pd.DataFrame
    record: Mapping[str, Any]
    folder: Path
    failures: list[Problem] = field(default_factory=list[Problem])
    stopped: dict[str, str] = field(default_factory=dict[str, str])


Say = Callable[[str], None]


def run(request: Request, say: Say, progress: bool = True) -> Finished:
    """Score the videos and write ``table``, ``videos`` and ``problems`` with a ``run.json``.

    Raises:
        UserError: no videos, a bad one (all are named in ``problems.csv``), weights that are not
            there, a folder in use.
    """
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
    plan = make_plan(scorers, asked, suite, request.where, request.mode)
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


def answer(
    questions: Sequence[Question], request: Request, store: Scores, say: Say, progress: bool
) -> tuple[dict[str, str], list[Problem]]:
    """Have workers answer what the store does not hold; scores are kept as they come."""
    open_ = [question for question in questions if store.get(question.key) is None]
    failures = list[Problem]()
    if not open_:
        return {}, failures
    by_job = {(asked.scorer, asked.job.id): asked for asked in open_}
    jobs: dict[str, list[Job]] = {}
    for question in open_:
        jobs.setdefault(question.scorer, []).append(question.job)
    with bar(len(open_), "scores", progress) as tick:

        def take(found: Answer) -> None:
            question = by_job[found.scorer, found.job.id]
            if found.scored is not None:
                store.put(question.key, found.scored)
            else:
                reason = f"{found.scorer}: {found.reason}"
                failures.append(Problem(question.video.name, reason))
                say(f"{question.video.name}: {reason}")
            tick(found.scorer)

        logs = request.out / "logs"
        stopped = drive(jobs, launcher(request.where, request.threads), request.devices, logs, take)
    for scorer, reason in stopped.items():
        say(f"{scorer} was not finished: {reason}")
        failures.append(Problem(scorer, reason))
    return stopped, failures


def kept(questions: Iterable[Question], store: Scores) -> list[tuple[Question, Scored]]:
    """Questions with the answers that the store holds."""
    held = ((question, store.get(question.key)) for question in questions)
    return [(question, found) for question, found in held if found is not None]


def protocol_of(
    request: Request, seen: Sequence[Video], suite_hash: str | None, plan: Plan,
    answered: Iterable[tuple[Question, Scored]],
) -> Protocol:  # fmt: skip
    """What another run must share with this one to be compared."""
    table = request.prompts or (
        videos.table_beside(request.place) if request.place.is_dir() else None
    )
    prompts = suite_hash if suite_hash or table is None else text_sha256(table)
    extended = None if request.extended is None else text_sha256(request.extended)
    counts = Counter(video.prompt for video in seen)
    patches = {patch for _, found in answered for patch in found.more.get("patches", ())}
    return Protocol(
        mode=request.mode, prompts=prompts, extended=extended, extended_by=told_by(extended),
        samples=max(counts.values()), size=spread(f"{v.width}x{v.height}" for v in seen),
        fps=spread(v.fps for v in seen), frames=spread(str(v.frames) for v in seen),
        vbench=VERSION, patches=tuple(sorted(patches)), static_filter=False, long_configs=None,
        aggregation="one process", clip_to_clip=None, weights=plan.weights,
    )  # fmt: skip


def write(
    request: Request, frames: Mapping[str, pd.DataFrame], seen: Sequence[Video],
    protocol: Protocol, random: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write the result; scores by random weights are a null model, never measured."""
    provenance: Provenance = "null-model" if random else "measured"
    table = frames["table"]
    validity = tables.worst(table["validity"]) if len(table) else "invalid"
    notes = ["Metric weights are random: these scores say nothing of the videos."] if random else []
    config = {
        "protocol": protocol, "model": request.model, "scorers": list(request.scorers),
        "shard": request.shard,
    }  # fmt: skip
    return write_result(
        request.out, dict(frames), config=config,
        inputs={video.name: video.sha256 for video in seen}, seed=0, modules=MODULES,
        provenance=provenance, validity=validity, units=tables.UNITS, notes=notes,
        observed={"devices": list(request.devices), "threads": request.threads},
    )  # fmt: skip


def save_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write the table of what is missing or wrong, also when it is empty."""
    text = videos.problem_table(problems).to_csv(index=False, lineterminator="\n")
    atomic_write(path, text.encode())


class bar:
    """A progress bar with time left, or none."""

    def __init__(self, total: int, what: str, shown: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=what, disable=not shown or not total, leave=False)

    def __enter__(self) -> Callable[..., None]:
        return self.tick

    def tick(self, note: str = "") -> None:
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.bar.close()
