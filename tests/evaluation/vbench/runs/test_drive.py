"""Workers end with the run that started them, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from vbench_runs import write_clip

from mla_study.evaluation.vbench.needs.environment import WORKER

ROOT = Path(__file__).resolve().parents[4]
RUN = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import pytest
from vbench_runs import run_fake
with pytest.MonkeyPatch.context() as patch:
    from mla_study.evaluation.vbench.runs import plan
    patch.setattr(plan.weights, "require", lambda *_, **__: None)
    run_fake(patch, Path({clips!r}), Path({out!r}), ("temporal_flickering", "imaging_quality"),
             devices=("cpu", "cpu"))
"""
START = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        # one that has ended and was not waited for is a zombie
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_that_compute_end_with_the_run(tmp_path: Path, how: signal.Signals) -> None:
    clips, pids = tmp_path / "clips", tmp_path / "pids"
    clips.mkdir()
    pids.mkdir()
    for number in range(2):
        write_clip(clips / f"clip-{number}.mp4", seed=number)
    code = RUN.format(tests=str(ROOT / "tests"), clips=str(clips), out=str(tmp_path / "out"))
    surroundings = {**os.environ, "FAKE_SLEEP": "300", "FAKE_PIDS": str(pids)}
    run = subprocess.Popen([sys.executable, "-c", code], env=surroundings)
    try:
        wait_for(lambda: len(list(pids.iterdir())) == 2)
        workers = [int(file.name) for file in pids.iterdir()]
        assert all(map(alive, workers))
        run.send_signal(how)
        run.wait(20)
        wait_for(lambda: not any(map(alive, workers)), 5)
    finally:
        run.kill()
        run.wait()


@pytest.mark.parametrize(
    "command", [[str(WORKER)], ["-m", "mla_study.evaluation.vbench.native"]], ids=["VBench", "ours"]
)
def test_true_workers_end_with_what_started_them(tmp_path: Path, command: list[str]) -> None:
    request = tmp_path / "request.json"
    os.mkfifo(request)
    driver = subprocess.Popen([sys.executable, "-c", START, sys.executable, *command, str(request)])
    try:
        # this goes on when the worker has come to read its request
        with request.open("w"):
            children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
            (worker,) = map(int, children)
            assert alive(worker)
            driver.kill()
            driver.wait()
            wait_for(lambda: not alive(worker), 5)
    finally:
        driver.kill()
        driver.wait()
