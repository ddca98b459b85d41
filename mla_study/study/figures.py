"""The driver behind ``make figures`` and ``make data``: draw what is stale, and only that.

Each stale notebook runs in a worker process (:mod:`mla_study.study.notebook_worker`) that writes
into a scratch folder; what came out is moved into place when the notebook has run to its end, so
that a failed or interrupted run changes nothing. What a figure no longer draws, as its data are
gone, is removed (:mod:`mla_study.study.former`).

Example::

    mla-study figures --fig fig1
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_study.errors import EXIT_BAD_INPUT, UserError
from mla_study.study import former, staleness
from mla_study.study import notebook_worker as worker
from mla_study.study.notebooks import (
    OUT_DIR,
    Figure,
    Project,
    check_parameters,
    discover,
    parse_assignments,
    select,
)
from mla_study.study.runs import file_sha256, read_record

EXIT_INTERRUPTED = 130
STAMPS = ".stamps"
GRACE = 5.0  # seconds between asking a worker to stop and ending it

__all__ = ["Project", "locked", "parse_assignments", "run_data", "run_figures", "stamp_file"]


@dataclass
class _Job:
    figure: Figure
    values: dict[str, Any]
    parts: dict[str, str]
    reason: str
    said: list[str] = field(default_factory=list[str])
    error: str = ""


def run_figures(
    figs: Sequence[str] = (),
    *,
    force: bool = False,
    params: Mapping[str, object] | None = None,
    jobs: int = 2,
    list_only: bool = False,
    project: Project | None = None,
) -> int:
    """Draw the figures whose code, data, parameters or outputs changed since they were drawn.

    :param figs: ids or their beginnings (``fig1``); none means all whose data are there.
    :param force: draw even what is up to date.
    :param params: notebook parameters, as text or typed; each must be known to a chosen figure.
    :param jobs: notebooks run at a time.
    :param list_only: print id, state, class and title of each, and draw nothing.
    :return: 0, or 2 where a figure met bad input, 1 where one failed otherwise, 130 interrupted.
    :raises UserError: unknown figure or parameter, or a named one whose data are missing;
        before anything runs.
    """
    project = project or Project.find()
    chosen = select(discover(project), figs)
    given = dict(params or {})
    check_parameters(chosen, given)
    if OUT_DIR in given:
        project = Project(project.root, Path(str(given.pop(OUT_DIR))).resolve())
    if list_only:
        return _list(chosen, project, given)
    absent: list[Figure] = []
    if not figs:
        reasons = {
            figure.id: staleness.absent(figure, project, figure.values(given)) for figure in chosen
        }
        for name, reason in reasons.items():
            if reason:
                _print(f"  {name}: skipped, as it is drawn from {reason}")
        absent = [figure for figure in chosen if reasons[figure.id]]
        chosen = [figure for figure in chosen if not reasons[figure.id]]
    with locked(project):
        for figure in absent:
            file = stamp_file(project, figure)
            for line in former.withdraw(file, project.figures, figure.values(given)):
                _print(f"  {figure.id}: {line}")
        cache = staleness.HashCache(project.figures / STAMPS / "inputs.json")
        looked = [_look(figure, project, given, cache, force) for figure in chosen]
        cache.save()
        stale = [job for job in looked if job.reason]
        if not stale:
            _print(f"figures: all {len(looked)} up to date in {project.figures}")
            return 0
        _print(f"figures: {len(stale)} of {len(looked)} to draw")
        return _Runner(project, stale, jobs).run()


def run_data(figs: Sequence[str] = (), *, project: Project | None = None) -> int:
    """Measure the committed tables of ``results/data`` anew: each module's ``measure(data_dir)``.

    :raises UserError: unknown figure, a named one that measures nothing, or what measuring met.
    """
    project = project or Project.find()
    chosen = select(discover(project), figs)
    measuring = [figure for figure in chosen if "measure" in figure.functions]
    if figs and len(measuring) < len(chosen):
        without = next(figure.id for figure in chosen if figure not in measuring)
        raise UserError(
            f"{without} has no table of its own to measure: it is drawn from what is there."
        )
    for figure in measuring:
        started = time.monotonic()
        _print(f"data: measuring {figure.id}")
        staleness.load_module(figure, project).measure(project.data)
        _print(f"data: {figure.id} measured in {time.monotonic() - started:.1f} s")
    if not measuring:
        _print("data: no figure measures a table of its own")
    return 0


class _Runner:
    """The stale figures, a few workers at a time, and what the reader sees of it."""

    def __init__(self, project: Project, stale: list[_Job], jobs: int) -> None:
        self._project = project
        self._stale = stale
        self._jobs = max(1, jobs)
        self._workers: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._stopping = False
        self._done = 0
        self._at: dict[str, str] = {}

    def run(self) -> int:
        pool = ThreadPoolExecutor(self._jobs)
        before = signal.getsignal(signal.SIGTERM)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main:
            signal.signal(signal.SIGTERM, _interrupt)
        try:
            codes = list(pool.map(self._draw, self._stale))
        except KeyboardInterrupt:
            self._stop()
            self._print(
                f"Interrupted: {self._done} of {len(self._stale)} figures were drawn, "
                "the others are as they were; the same command goes on."
            )
            return EXIT_INTERRUPTED
        finally:
            pool.shutdown(cancel_futures=True)
            if in_main:
                signal.signal(signal.SIGTERM, before)
        failed = {code for code in codes if code}
        if not failed:
            return 0
        return EXIT_BAD_INPUT if failed == {worker.BAD_INPUT} else worker.FAILED

    def _draw(self, job: _Job) -> int:
        started = time.monotonic()
        scratch = self._project.figures / f".{job.figure.id}.drawing"
        notebooks = self._project.figures / "notebooks"
        executed = notebooks / f"{job.figure.id}.ipynb"
        failed = notebooks / f"{job.figure.id}.failed.ipynb"
        temporary = scratch / "executed" / executed.name
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            temporary.parent.mkdir(parents=True)
            notebooks.mkdir(parents=True, exist_ok=True)
            self._show(job, "starting")
            code = self._execute(job, scratch, temporary)
            if code == worker.NO_START and not self._stopping:
                self._show(job, "the kernel did not start; once more")
                code = self._execute(job, scratch, temporary)
            if self._stopping:
                return EXIT_INTERRUPTED
            if code == worker.DONE and not any(file.is_file() for file in scratch.iterdir()):
                code, job.error = worker.FAILED, f"it wrote no file into its {OUT_DIR}"
            if code == worker.DONE:
                outputs = self._place(job, scratch, temporary, executed)
                failed.unlink(missing_ok=True)
                for text in job.said:
                    self._print(f"  {job.figure.id}: {text}")
                seconds = time.monotonic() - started
                self._print(f"  {job.figure.id}: {', '.join(outputs)} in {seconds:.1f} s")
                self._done += 1
                return code
            kept = ""
            if temporary.exists():
                temporary.replace(failed)
                kept = f" (executed notebook: {failed})"
            self._print(f"  {job.figure.id} failed: {job.error or 'the worker died'}{kept}")
            return code if code in (worker.FAILED, worker.BAD_INPUT) else worker.FAILED
        except (OSError, UserError) as error:
            self._print(f"  {job.figure.id} failed: {error}")
            return worker.BAD_INPUT
        finally:
            self._at.pop(job.figure.id, None)
            shutil.rmtree(scratch, ignore_errors=True)

    def _execute(self, job: _Job, scratch: Path, executed: Path) -> int:
        request = {
            "notebook": str(job.figure.notebook),
            "executed": str(executed),
            "parameters": {**job.values, OUT_DIR: str(scratch)},
            "root": str(self._project.root),
        }
        job.said, job.error = [], ""
        with self._guard:
            if self._stopping:
                return EXIT_INTERRUPTED
            # A session of its own: Ctrl-C at the terminal reaches this process alone.
            process = subprocess.Popen(
                [sys.executable, "-m", worker.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._workers.add(process)
        assert process.stdin and process.stdout and process.stderr
        noise: list[str] = []
        reader = threading.Thread(target=lambda: noise.extend(process.stderr or ()), daemon=True)
        reader.start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request))
            process.stdin.close()
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                self._hear(job, json.loads(line))
        code = process.wait()
        reader.join()
        self._workers.discard(process)
        if code and not job.error and noise:
            job.error = noise[-1].strip()
        return code

    def _hear(self, job: _Job, message: Mapping[str, Any]) -> None:
        if "error" in message:
            error = str(message["error"])
            if message.get("kind") == "UserError":
                error = error.partition(": ")[2]
            elif message.get("cell") is not None:
                error = f"cell {message['cell']}: {error}"
            job.error = error
        elif "said" in message:
            job.said.append(str(message["said"]))
        elif "cell" in message:
            self._show(job, f"cell {message['cell']} of {message['of']}")

    def _place(self, job: _Job, scratch: Path, temporary: Path, executed: Path) -> list[str]:
        """Move what was drawn to its place; the stamp last, so that a cut leaves it stale."""
        stamp = stamp_file(self._project, job.figure)
        drawn = sorted(file for file in scratch.iterdir() if file.is_file())
        kept = {file.name for file in drawn}
        for line in former.remove(self._project.figures, read_record(stamp), kept):
            self._print(f"  {job.figure.id}: {line}")
        stamp.unlink(missing_ok=True)
        text = temporary.read_text(encoding="utf-8")
        temporary.write_text(text.replace(str(scratch), str(self._project.figures)))
        temporary.replace(executed)
        outputs: dict[str, str] = {}
        for file in drawn:
            outputs[file.name] = file_sha256(file)
            file.replace(self._project.figures / file.name)
        staleness.write_stamp(stamp, job.parts, outputs)
        return list(outputs)

    def _stop(self) -> None:
        with self._guard:
            self._stopping = True
            workers = list(self._workers)
        for process in workers:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for process in workers:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _show(self, job: _Job, where: str) -> None:
        self._at[job.figure.id] = where
        if sys.stderr.isatty():
            now = "; ".join(f"{name} {where}" for name, where in list(self._at.items()))
            line = f"  {self._done} of {len(self._stale)} done; {now}"
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\033[K{line[:width]}")
            sys.stderr.flush()
        elif where == "starting":
            _print(f"  {job.figure.id}: drawing ({job.reason})")

    @staticmethod
    def _print(line: str) -> None:
        _print(f"\r\033[K{line}" if sys.stderr.isatty() else line)


def _look(
    figure: Figure,
    project: Project,
    given: Mapping[str, object],
    cache: staleness.HashCache,
    force: bool = False,
) -> _Job:
    values = figure.values(given)
    parts = staleness.key_parts(figure, project, values, cache)
    stamp = read_record(stamp_file(project, figure))
    reason = staleness.why_stale(stamp, parts, project.figures)
    return _Job(figure, values, parts, reason or ("forced" if force else ""))


def _list(figures: Sequence[Figure], project: Project, given: Mapping[str, object]) -> int:
    cache = staleness.HashCache(project.figures / STAMPS / "inputs.json")
    rows = [("figure", "state", "class", "title")]
    for figure in figures:
        try:
            state = _look(figure, project, given, cache).reason or "up to date"
        except UserError as error:
            state = f"cannot be drawn: {error}"
        rows.append((figure.id, state, " + ".join(figure.provenance), figure.title))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[3]]).rstrip())
    return 0


def stamp_file(project: Project, figure: Figure) -> Path:
    """Where the stamp of a figure lies, see :mod:`mla_study.study.staleness`."""
    return project.figures / STAMPS / f"{figure.id}.json"


@contextlib.contextmanager
def locked(project: Project) -> Generator[None]:
    """One driver at a time in an output folder; a second one waits."""
    folder = project.figures / STAMPS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _print(f"figures: another run draws into {project.figures}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
