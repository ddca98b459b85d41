"""What short and long runs share: the request, workers' answers kept as they come, the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.evaluation.vbench.dimensions import READ_WHOLE, VERSION
from mla_study.evaluation.vbench.long.configs import LongConfigs
from mla_study.evaluation.vbench.prompts import Told, text_sha256
from mla_study.evaluation.vbench.runs import counts, origin, tables, videos
from mla_study.evaluation.vbench.runs.drive import Answer, Job, drive
from mla_study.evaluation.vbench.runs.plan import (
    Mode,
    Place,
    Plan,
    Question,
    launcher,
    subjects,
    takes_any,
)
from mla_study.evaluation.vbench.runs.protocol import Protocol, spread
from mla_study.evaluation.vbench.runs.store import Scored, Scores
from mla_study.evaluation.vbench.runs.videos import Problem, Video
from mla_study.study.runs import Provenance, atomic_write, write_result

if TYPE_CHECKING:
    import pandas as pd

FLICKER = "temporal_flickering"
LISTED = "problems.csv"
MODULES = ("mla_study.evaluation.vbench.runs.run",)
Say = Callable[[str], None]


@dataclass(frozen=True)
class LongOptions:
    """How the long mode is done.

    Attributes:
        exact: upstream's way of cutting (whole frames a second, re-encoded) and averaging.
        dev: upstream's dev_flag: half of subject and background consistency compares clips.
        semantic: cut at scene changes first.
    """

    configs: LongConfigs
    exact: bool = True
    dev: bool = True
    semantic: bool = False


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
        long: of the long mode.
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
    long: LongOptions | None = None


@dataclass(frozen=True)
class Gathered:
    """The videos of a run.

    Attributes:
        videos: those that can be scored. skipped: what is known of those that cannot.
        problems: of both, and of the table of prompts.
    """

    videos: list[Video]
    skipped: list[Told | None] = field(default_factory=list["Told | None"])
    problems: list[Problem] = field(default_factory=list[Problem])


@dataclass
class Finished:
    """What a run leaves: tables, the run record, what did not work, and all that was odd."""

    table: pd.DataFrame
    videos: pd.DataFrame
    record: Mapping[str, Any]
    folder: Path
    failures: list[Problem] = field(default_factory=list[Problem])
    stopped: dict[str, str] = field(default_factory=dict[str, str])
    problems: list[Problem] = field(default_factory=list[Problem])

    def odd(self) -> str:
        """A line on what is odd or missing, and where it stands; empty where all is well."""
        bad = len({problem.name for problem in self.problems if problem.fatal})
        noted = sum(not problem.fatal for problem in self.problems)
        told = [f"{count} {what}{'s' * (count > 1)}" for count, what in
                ((bad, "failure"), (noted, "note")) if count]  # fmt: skip
        return f"{' and '.join(told)}: {self.folder / LISTED}" if told else ""


def weights_mode(request: Request) -> Mode:
    """Whose weights are needed: those that compare clips only where clips are compared."""
    if request.long is not None:
        return "long" if request.long.dev else "short"
    return request.mode


def cut_short(question: Question, scored: Scored) -> str:
    """A sentence where a scorer got fewer frames of a video than it has; empty where not."""
    frames = question.video.frames
    if question.scorer not in READ_WHOLE or scored.frames >= frames:
        return ""
    return f"VBench's reader got {scored.frames} of {frames} frames: the file is damaged or odd"


def held(question: Question, store: Scores) -> Scored | None:
    """The kept answer to a question, if it is one of the whole video."""
    found = store.get(question.key)
    return None if found is None or cut_short(question, found) else found


def answer(
    questions: Sequence[Question], request: Request, store: Scores, say: Say, progress: bool
) -> tuple[dict[str, str], list[Problem]]:
    """Have workers answer what the store does not hold; scores are kept as they come."""
    open_ = [question for question in questions if held(question, store) is None]
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
            why = found.reason if found.scored is None else cut_short(question, found.scored)
            if found.scored is not None and not why:
                store.put(question.key, found.scored)
            else:
                reason = f"{found.scorer}: {why}"
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
    """Questions with the answers that the store holds, see :func:`held`."""
    found = ((question, held(question, store)) for question in questions)
    return [(question, scored) for question, scored in found if scored is not None]


def all_given(given: Gathered, scorer: str) -> int:
    """How many of the videos that were given a scorer would look at, bad ones and all."""
    skipped = given.skipped if takes_any(scorer) else [told for told in given.skipped if told]
    return len(subjects(scorer, "custom", given.videos, {})) + len(skipped)


def incomplete(
    request: Request, given: Gathered, scorer: str, asked: Sequence[Video], wanted: counts.Wanted
) -> list[str]:
    """Clauses on why a scorer's videos are not all that are wanted, before any is scored."""
    found = list[str]()
    if request.shard is not None:
        found.append(f"only shard {request.shard[0]} of {request.shard[1]} is here")
    elif wanted:
        found += filter(None, [counts.lack(asked, wanted)])
    elif bad := all_given(given, scorer) - len(asked):
        found.append(f"{bad} bad video{'s were' if bad > 1 else ' was'} skipped")
    return found


def unscored(lost: int, what: str) -> list[str]:
    """A clause on videos or clips without a score; none where there are none."""
    return [f"{lost} {what}{'s have' if lost > 1 else ' has'} no score"] if lost else []


def protocol_of(
    request: Request, seen: Sequence[Video], suite_hash: str | None, plan: Plan,
    answered: Iterable[tuple[Question, Scored]],
) -> Protocol:  # fmt: skip
    """What another run must share with this one to be compared."""
    known = origin.origin_of(request.place, request.prompts, request.extended)
    texts = origin.texts_told(known, seen)
    prompts = suite_hash if suite_hash or known.table is None else text_sha256(known.table)
    sampled = None if prompts or known.records is None else known.records.prompts
    counts = Counter(video.prompt for video in seen)
    patches = {patch for _, found in answered for patch in found.more.get("patches", ())}
    return Protocol(
        mode=request.mode, prompts=prompts, extended=known.extended,
        extended_by=origin.by_whom(known), told=origin.told_sha256(texts), told_texts=texts,
        sampled=sampled,
        samples=max(counts.values()), size=spread(f"{v.width}x{v.height}" for v in seen),
        fps=spread(v.fps for v in seen), frames=spread(str(v.frames) for v in seen),
        vbench=VERSION, patches=tuple(sorted(patches)), static_filter=False, long_configs=None,
        aggregation="one process", clip_to_clip=None, weights=plan.weights,
    )  # fmt: skip


def write(
    request: Request, frames: Mapping[str, pd.DataFrame], seen: Sequence[Video],
    protocol: Protocol, random: bool, problems: Sequence[Problem] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write the result; scores by random weights are a null model, never measured.

    What is missing or wrong is ``problems.csv``, also when it is nothing, and a table of the run.
    """
    save_problems(request.out / LISTED, problems)
    if problems:
        frames = {**frames, "problems": videos.problem_table(problems)}
    provenance: Provenance = "null-model" if random else "measured"
    table = frames["table"]
    validity = tables.worst(table["validity"]) if len(table) else "invalid"
    notes = ["Metric weights are random: these scores say nothing of the videos."] if random else []
    config = {
        "protocol": protocol, "model": request.model, "scorers": list(request.scorers),
        "shard": request.shard,
    }  # fmt: skip
    known = origin.origin_of(request.place, request.prompts, request.extended)
    sampling = origin.sampling_facts(known, seen)
    return write_result(
        request.out, dict(frames), config=config,
        inputs={video.name: video.sha256 for video in seen}, seed=0, modules=MODULES,
        provenance=provenance, validity=validity, units=tables.UNITS, notes=notes,
        observed={
            "devices": list(request.devices), "threads": request.threads, "sampling": sampling,
        },
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
