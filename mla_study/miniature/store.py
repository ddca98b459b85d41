"""Runs a plan's nodes in processes of one thread each, and keeps what they gave by its key.

A store is a folder; each node has one inside, named by the node and its key. Finished nodes are
taken as they are, so that the same call goes on after an interruption and two plans share work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.miniature.plan import Node, Plan

DONE = "done.json"
MODEL = "model.safetensors"
LOG = "log.parquet"
VIDEOS = "videos.parquet"
FRAMES = "frames.safetensors"
SAID = "said.txt"
STEP_SECONDS = {
    "flow": 0.2, "teacher_forcing": 0.2, "consistency": 0.35, "distribution_matching": 1.3
}  # fmt: skip
"""CPU seconds of a step of the miniature's own stages on one thread, with what the study looks at
along the way."""
COSTS = {"convert": 3.0, "teacher": 1.0, "untrained": 1.0}
"""CPU seconds of nodes that do not follow from their settings, for the time left."""

Say = Callable[[str], object]


@dataclass
class Store:
    """Results of nodes in ``folder``.

    Attributes:
        teacher, codec: the shipped files.
        workers: processes at a time.
        command: starts one; it reads its task from standard input.
    """

    folder: Path
    codec: Path
    teacher: Path | None = None
    workers: int = 2
    command: Sequence[str] = (sys.executable, "-m", "mla_study.miniature.work")
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def place(self, plan: Plan, name: str) -> Path:
        """The folder of a node."""
        return self.folder / plan.folder(name)

    def done(self, plan: Plan, name: str) -> bool:
        """Whether a node is finished."""
        return (self.place(plan, name) / DONE).exists()

    def record(self, plan: Plan, name: str) -> Mapping[str, Any]:
        """What a finished node says of itself."""
        return json.loads((self.place(plan, name) / DONE).read_text())

    def run(self, plan: Plan, say: Say, progress: bool = True) -> None:
        """Do what is not done yet.

        Raises:
            UserError: a node failed (it and its reason are named; the others' results stay), or the
                store is in use.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self.folder):
            waiting = [node for node in plan if not self.done(plan, node.name)]
            kept = len(plan) - len(waiting)
            if kept:
                say(f"{kept} of {len(plan)} pieces of work are done already")
            bar = _bar(plan, waiting) if progress else None
            try:
                self._drain(plan, waiting, bar)
            finally:
                for process in self._running.values():
                    process.terminate()
                for process in self._running.values():
                    process.wait()
                    _close(process)
                self._running.clear()
                if bar is not None:
                    bar.close()

    def _drain(self, plan: Plan, waiting: list[Node], bar: Any) -> None:
        while waiting or self._running:
            for node in list(waiting):
                if len(self._running) >= self.workers:
                    break
                if all(self.done(plan, name) for name in node.needs.values()):
                    waiting.remove(node)
                    self._running[node.name] = self._start(plan, node)
            if bar is not None:
                bar.set_postfix_str(", ".join(sorted(self._running)), refresh=False)
            time.sleep(0.05)
            for name, process in list(self._running.items()):
                if process.poll() is None:
                    continue
                del self._running[name]
                if process.returncode or not self.done(plan, name):
                    raise UserError(self._failure(plan, name, process.returncode))
                _close(process)
                if bar is not None:
                    bar.update(_cost(plan.nodes[name]))

    def _start(self, plan: Plan, node: Node) -> subprocess.Popen[bytes]:
        folder = self.place(plan, node.name)
        folder.mkdir(parents=True, exist_ok=True)
        told = {
            "name": node.name,
            "kind": node.kind,
            "settings": node.settings,
            "about": node.about,
            "folder": str(folder),
            "needs": {role: str(self.place(plan, name)) for role, name in node.needs.items()},
            "teacher": None if self.teacher is None else str(self.teacher),
            "codec": str(self.codec),
        }
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        # in a group of its own: Ctrl-C reaches us alone, and we end the workers
        with (folder / SAID).open("wb") as said:
            process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=os.environ | threads,
                start_new_session=True,
            )
        assert process.stdin is not None
        # stays open: a worker ends when we do, however we end
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
        return process

    def _failure(self, plan: Plan, name: str, code: int) -> str:
        said = (self.place(plan, name) / SAID).read_text(errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        return (
            f"{name} ended with exit code {code}: {last} (all it said is in "
            f"{self.place(plan, name) / SAID}); the same command goes on with the rest"
        )


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _cost(node: Node) -> float:
    if node.kind == "judge":
        trial = node.settings["trial"]
        return 0.03 * trial["videos"] * trial["clips"]
    if node.kind == "train":
        stage = node.settings["stage"]
        return STEP_SECONDS[stage["objective"]] * stage["steps"]
    return COSTS[node.kind]


def _bar(plan: Plan, waiting: list[Node]) -> Any:
    from tqdm import tqdm

    total = sum(map(_cost, plan))
    left = sum(map(_cost, waiting))
    form = "{l_bar}{bar}| [{elapsed} < {remaining}] {postfix}"
    return tqdm(total=total, initial=total - left, desc="study", bar_format=form)


class _lock:
    """A store is used by one run at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"

    def __enter__(self) -> None:
        import fcntl

        self.file = self.path.open("a")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.path.parent} is in use by another run: wait for it, or give another --store"
            ) from None

    def __exit__(self, *error: object) -> None:
        self.file.close()
