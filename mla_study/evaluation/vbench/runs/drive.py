"""Worker processes, fed one video at a time: what each is busy with is known when it dies.

A worker computes one scorer and has its model loaded once. It is told of videos by lines of JSON on
its standard input and answers by lines on its standard output; the protocol stands in ``worker``.
Several slots work at a time. A free slot takes the scorer with most left that no other slot has,
or else helps with the one that has most left.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.runs.store import Scored

SCHEMA = 1
DEATHS = 2
"""Workers that may die at one scorer without having scored a video before it is given up."""
GRACE = 10.0  # seconds


@dataclass(frozen=True)
class Job:
    """One video for one scorer; ``id`` comes back with the answer, ``more`` is the scorer's own."""

    id: str
    path: Path
    name: str
    prompt: str | None = None
    auxiliary: Mapping[str, Any] | None = None
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def line(self) -> str:
        """As it is told to a worker."""
        told = {
            **self.more, "id": self.id, "path": str(self.path), "name": self.name,
            "prompt": self.prompt, "auxiliary": self.auxiliary,
        }  # fmt: skip
        return json.dumps(told) + "\n"


@dataclass(frozen=True)
class Launch:
    """How a scorer's worker is started: command, environment, folder, and its request."""

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    request: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What became of a job: a score, or the reason why there is none."""

    scorer: str
    job: Job
    scored: Scored | None
    reason: str = ""


class Drive:
    """Work through jobs; see :func:`drive`."""

    def __init__(
        self, jobs: Mapping[str, Sequence[Job]], launch: Callable[[str, str], Launch],
        devices: Sequence[str], logs: Path,
    ) -> None:  # fmt: skip
        self.left = {scorer: deque(mine) for scorer, mine in jobs.items() if mine}
        self.launch, self.devices, self.logs = launch, devices, logs
        self.answers: queue.Queue[Answer | BaseException | None] = queue.Queue()
        self.stopped: dict[str, str] = {}
        self.at_work: dict[str, int] = {}
        self.deaths: dict[str, int] = {}
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.over = False

    def slot(self, device: str) -> None:
        """Take scorers until nothing is left to take."""
        try:
            while (scorer := self._take()) is not None:
                try:
                    self._serve(scorer, device)
                finally:
                    with self.lock:
                        self.at_work[scorer] -= 1
        except BaseException as error:
            self.answers.put(error)
        else:
            self.answers.put(None)

    def _take(self) -> str | None:
        with self.lock:
            open_ = [s for s, mine in self.left.items() if mine and s not in self.stopped]
            fresh = [scorer for scorer in open_ if not self.at_work.get(scorer)]
            # loading a model for the very last video of another slot's gains nothing
            shared = [s for s in open_ if len(self.left[s]) > 1]
            pick = max(fresh or shared, key=lambda s: len(self.left[s]), default=None)
            if pick is None or self.over:
                return None
            self.at_work[pick] = self.at_work.get(pick, 0) + 1
            return pick

    def _next(self, scorer: str) -> Job | None:
        with self.lock:
            mine = self.left[scorer]
            return mine.popleft() if mine and not self.over else None

    def _stop(self, scorer: str, reason: str) -> None:
        with self.lock:
            self.stopped.setdefault(scorer, reason)

    def _serve(self, scorer: str, device: str) -> None:
        """One worker, from its start to the end of the jobs or its own.

        It ends with the thread that started it, hence with this process too.
        """
        launch = self.launch(scorer, device)
        name = f"{scorer.replace('[', '-').rstrip(']')}-{device.replace(':', '')}"
        self.logs.mkdir(parents=True, exist_ok=True)
        request = self.logs / f"{name}.{threading.get_ident()}.json"
        request.write_text(json.dumps(dict(launch.request)))
        log = self.logs / f"{name}.log"
        try:
            with log.open("a") as errors:
                worker = subprocess.Popen(
                    [*launch.command, str(request)], stdin=subprocess.PIPE, text=True, bufsize=1,
                    stdout=subprocess.PIPE, stderr=errors, cwd=launch.folder,
                    env=dict(launch.environment), start_new_session=True,
                )  # fmt: skip
            with self.lock:
                self.running.add(worker)
            try:
                self._talk(scorer, worker, log)
            finally:
                with self.lock:
                    self.running.discard(worker)
                _end(worker)
        finally:
            request.unlink(missing_ok=True)

    def _talk(self, scorer: str, worker: subprocess.Popen[str], log: Path) -> None:
        assert worker.stdin is not None and worker.stdout is not None
        said = _read(worker.stdout)
        if said is None or said.get("event") != "ready":
            reason = str((said or {}).get("reason") or _why(worker, log))
            self._stop(scorer, reason)
            return
        patches = list(said.get("patches") or ())
        while (job := self._next(scorer)) is not None:
            try:
                worker.stdin.write(job.line())
                worker.stdin.flush()
                said = _read(worker.stdout)
            except BrokenPipeError:
                said = None
            if self.over:
                return
            if said is None or said.get("event") == "error":
                reason = str((said or {}).get("reason") or _why(worker, log))
                self.answers.put(Answer(scorer, job, None, reason))
                with self.lock:
                    deaths = self.deaths[scorer] = self.deaths.get(scorer, 0) + 1
                if deaths >= DEATHS:
                    self._stop(scorer, f"{deaths} workers ended in a row, the last: {reason}")
                return
            if said.get("event") == "failed":
                self.answers.put(Answer(scorer, job, None, str(said.get("reason"))))
                continue
            with self.lock:
                self.deaths[scorer] = 0
            self.answers.put(Answer(scorer, job, _scored(said, patches)))

    def end(self) -> None:
        """End all workers at once."""
        with self.lock:
            self.over = True
            running = list(self.running)
        for worker in running:
            worker.kill()


def drive(
    jobs: Mapping[str, Sequence[Job]], launch: Callable[[str, str], Launch],
    devices: Sequence[str], logs: Path, take: Callable[[Answer], None],
) -> dict[str, str]:  # fmt: skip
    """Do all jobs with a slot a device (name one twice for two processes on it).

    Args:
        launch: scorer, device -> how its worker is started.
        logs: folder for what workers print.
        take: called in this thread with each answer; what it raises ends the run.

    Returns:
        Scorer -> why it stopped; jobs of it that were not begun have no answer.
    """
    work = Drive(jobs, launch, devices, logs)
    slots = [threading.Thread(target=work.slot, args=(d,), daemon=True) for d in devices]
    for slot in slots:
        slot.start()
    busy = len(slots)
    try:
        while busy:
            answer = work.answers.get()
            if answer is None:
                busy -= 1
            elif isinstance(answer, BaseException):
                raise answer
            else:
                take(answer)
    finally:
        work.end()
        for slot in slots:
            slot.join(GRACE)
    return work.stopped


def _read(lines: Iterable[str]) -> dict[str, Any] | None:
    """The next object of a worker; None: it has ended."""
    for line in lines:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and "event" in said:
            return said
    return None


def _scored(said: Mapping[str, Any], patches: Sequence[str]) -> Scored:
    try:
        return Scored(
            float(said["value"]), float(said["terms"]), int(said["frames"]),
            bool(said.get("counted", True)), float(said.get("seconds", 0.0)),
            float(said.get("rss_mib", 0.0)), {**(said.get("more") or {}), "patches": list(patches)},
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"a worker's answer cannot be read ({error}): {said}") from None


def _why(worker: subprocess.Popen[str], log: Path) -> str:
    """How a worker ended without saying so."""
    try:
        code = worker.wait(GRACE)
    except subprocess.TimeoutExpired:
        return f"its worker stopped answering (see {log})"
    if code == -signal.SIGKILL:
        return "its worker was killed, most likely for want of memory: use fewer --workers"
    if code < 0:
        return f"its worker was ended by {signal.Signals(-code).name} (see {log})"
    tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"its worker ended with code {code}: {tail[-1].strip() if tail else f'see {log}'}"


def _end(worker: subprocess.Popen[str]) -> None:
    """Let a worker finish by the end of its input, or end it."""
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        worker.wait(GRACE)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
