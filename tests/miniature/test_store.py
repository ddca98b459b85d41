"""A plan in processes: order, interruptions, failures; with workers that only leave a mark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mla_study.errors import UserError
from mla_study.miniature.plan import Node, Plan
from mla_study.miniature.store import DONE, Store

WORKER = """
import json, sys, time, threading, os
from pathlib import Path
told = json.loads(sys.stdin.readline())
def watch():
    sys.stdin.read(); os._exit(1)
threading.Thread(target=watch, daemon=True).start()
folder = Path(told["folder"])
for needed in told["needs"].values():
    assert (Path(needed) / "done.json").exists(), needed
with open(folder.parent / "order.txt", "a") as file:
    file.write(told["name"] + "\\n")
time.sleep(told["settings"].get("sleep", 0))
if told["settings"].get("fail") and not (folder.parent / "mended").exists():
    sys.exit("it broke")
(folder / "done.json").write_text(json.dumps({"name": told["name"], "cpu_s": 1.0}))
"""
SLEEPY = Plan(
    [Node("a", "teacher", {}), Node("b", "convert", {"sleep": 60}, {"teacher": "a"})],
)


def store(folder: Path, workers: int = 2) -> Store:
    folder.mkdir(exist_ok=True)
    script = folder / "worker.py"
    script.write_text(WORKER)
    return Store(folder / "store", folder / "codec", None, workers, (sys.executable, str(script)))


def test_every_node_comes_after_what_it_needs_and_once(tmp_path: Path) -> None:
    plan = Plan(
        [
            Node("a", "teacher", {}),
            *(Node(f"b{n}", "convert", {"n": n}, {"teacher": "a"}) for n in range(4)),
            Node("c", "convert", {}, {"start": "b1", "other": "b3"}),
        ]
    )
    held, said = store(tmp_path), list[str]()
    held.run(plan, said.append, progress=False)
    order = (held.folder / "order.txt").read_text().split()
    assert sorted(order) == sorted(plan.nodes) and order[0] == "a" and order[-1] == "c"
    held.run(plan, said.append, progress=False)
    assert (held.folder / "order.txt").read_text().split() == order
    assert said == ["6 of 6 pieces of work are done already"]
    assert held.record(plan, "c")["cpu_s"] == 1.0


def test_a_failure_names_itself_and_the_rest_stays(tmp_path: Path) -> None:
    plan = Plan([Node("a", "teacher", {}), Node("b", "convert", {"fail": 1}, {"teacher": "a"})])
    held = store(tmp_path)
    with pytest.raises(
        UserError, match=r"b ended with exit code 1: it broke.*goes on with the rest"
    ):
        held.run(plan, print, progress=False)
    assert held.done(plan, "a") and not held.done(plan, "b")
    (held.folder / "mended").touch()
    held.run(plan, print, progress=False)
    assert held.done(plan, "b")
    assert (held.folder / "order.txt").read_text().split() == ["a", "b", "b"]


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    held = store(tmp_path)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom miniature.test_store import SLEEPY, store\n"
        f"store(Path({str(tmp_path)!r})).run(SLEEPY, print, progress=False)\n"
    )
    paths = f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"
    process = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": paths}
    )
    order = held.folder / "order.txt"
    deadline = time.monotonic() + 60
    while not (order.exists() and "b" in order.read_text().split()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match="in use by another run"):
        held.run(SLEEPY, print, progress=False)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pattern = str(tmp_path / "worker.py")
    while subprocess.run(["pgrep", "-f", pattern], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (held.place(SLEEPY, "b") / DONE).exists()
    assert json.loads((held.place(SLEEPY, "a") / DONE).read_text())["name"] == "a"
