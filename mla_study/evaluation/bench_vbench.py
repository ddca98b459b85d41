"""What our driver costs beside VBench itself, measured with the scorers that need no large weights.

Videos are made here: noise that moves, 480 x 832 and 81 frames, and tiny ones where the number
counts. Worth running on a machine that does nothing else::

    mla-study bench vbench --quick
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mla_study.errors import UserError
from mla_study.evaluation.goals import Goal, Row, say, show, write_rows
from mla_study.evaluation.timing import Spread, interleaved
from mla_study.evaluation.vbench.needs import environment, weights
from mla_study.evaluation.vbench.runs.plan import Place, launcher

PROGRAM = "bench vbench"
FLICKER, FLOW = "temporal_flickering", "dynamic_degree[raft-small]"
FRAMES = 81
"""Frames of the videos whose overhead is measured: 5 s of Wan2.1."""
_DIRECT = """
import sys
import cv2, torch
cv2.setNumThreads(1)
from vbench.temporal_flickering import cal_score
print("ready", flush=True)
for line in sys.stdin:
    print(repr(cal_score(line.rstrip("\\n"))), flush=True)
"""
_COUNTING = """
import json, sys
sys.path.insert(0, {parent!r})
import cv2, decord, torch
opened = [0]
class Capture(cv2.VideoCapture):
    def __init__(self, *args):
        opened[0] += 1
        super().__init__(*args)
class Reader(decord.VideoReader):
    def __init__(self, *args, **more):
        opened[0] += 1
        super().__init__(*args, **more)
cv2.VideoCapture = Capture
decord.VideoReader = Reader
from {package} import scorers
torch.set_grad_enabled(False)
request = json.load(open({request!r}))
score = scorers.find(request["scorer"])(request)
opened[0] = 0
score({line!r})
print("opened", opened[0])
"""


def write_noise(path: Path, frames: int, size: tuple[int, int], seed: int, fps: int = 8) -> Path:
    """A video of noise that moves three pixels a frame."""
    import av

    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            moved = np.roll(picture, 3 * number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_folder(folder: Path, count: int, frames: int, size: tuple[int, int]) -> Path:
    """``clip-0.mp4``, ``clip-1.mp4``, ..."""
    folder.mkdir()
    for number in range(count):
        write_noise(folder / f"clip-{number}.mp4", frames, size, number)
    return folder


class Asked:
    """A process that answers a line by a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, line: str) -> str:
        """Send a line, and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        """The next line. :raises UserError: the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError("a worker ended before it answered: mla-study vbench doctor says more")
        return line


@contextmanager
def process(command: Sequence[str], variables: Mapping[str, str], cwd: Path) -> Generator[Asked]:
    """A process of one thread with its first line read."""
    limits = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    started = subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd,
        stderr=subprocess.DEVNULL, env={**os.environ, **variables, **limits},
    )  # fmt: skip
    try:
        asked = Asked(started)
        asked.answer()
        yield asked
    finally:
        started.kill()
        started.wait()


@contextmanager
def worker(place: Place, scorer: str, scratch: Path) -> Generator[Asked]:
    """A worker of a scorer, ready."""
    launch = launcher(place, 1)(scorer, "cpu")
    file = scratch / f"{scorer.partition('[')[0]}.json"
    file.write_text(json.dumps(dict(launch.request)))
    with process([*launch.command, str(file)], launch.environment, launch.folder) as asked:
        yield asked


def line_of(video: Path) -> str:
    """A worker's job."""
    return json.dumps({"id": video.name, "path": str(video), "name": video.name, "prompt": None,
                       "auxiliary": None})  # fmt: skip


def overhead(
    place: Place, videos: Sequence[Path], turns: int, starts: int, scratch: Path
) -> list[Row]:
    """A worker beside VBench's function called directly, both warm, on the same videos.

    Two processes of one program differ in speed: all are started ``starts`` times, and a second
    direct one tells by how much.
    """
    assert place.environment is not None
    python = str(place.environment.python)
    variables = environment.variables(place.weights)
    ratios, noise, same = list[float](), list[float](), 0.0
    for _ in range(starts):
        with ExitStack() as stack:
            ours = stack.enter_context(worker(place, FLICKER, scratch))
            direct, twin = (
                stack.enter_context(process([python, "-c", _DIRECT], variables, scratch))
                for _ in range(2)
            )
            same = max(
                same,
                *(
                    abs(
                        float(json.loads(ours.ask(line_of(v)))["value"]) - float(direct.ask(str(v)))
                    )
                    for v in videos
                ),
            )
            times = interleaved(
                {"direct": lambda d=direct: [d.ask(str(v)) for v in videos],
                 "twin": lambda d=twin: [d.ask(str(v)) for v in videos],
                 "worker": lambda w=ours: [w.ask(line_of(v)) for v in videos]},
                turns, 1, "wall",
            )  # fmt: skip
        ratios.append(times.ratio("worker", "direct").median)
        noise.append(times.ratio("twin", "direct").median)
    setting = (
        f"{FLICKER}, {len(videos)} videos of {FRAMES} frames 480 x 832, one thread, models loaded, "
        f"medians of {turns} turns of {starts} starts"
    )
    return [
        Row.of("a video through a worker / VBench's function", Spread.of(ratios), "x", setting,
               Goal("<=", 1.05)),
        Row.of("VBench's function in two processes", Spread.of(noise), "x", setting),
        Row("largest difference of their scores", same, "", setting, Goal("<=", 1e-9)),
    ]  # fmt: skip


def decodes(place: Place, video: Path, scorers: Sequence[str], scratch: Path) -> list[Row]:
    """How often VBench's code opens a video for a dimension."""
    rows = list[Row]()
    for scorer in scorers:
        launch = launcher(place, 1)(scorer, "cpu")
        file = scratch / "counting.json"
        file.write_text(json.dumps(dict(launch.request)))
        code = _COUNTING.format(
            parent=str(environment.WORKER.parent), package=environment.WORKER.name,
            request=str(file), line=json.loads(line_of(video)),
        )  # fmt: skip
        done = subprocess.run(
            [launch.command[0], "-c", code], env=dict(launch.environment), cwd=launch.folder,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        counts = [x for x in done.stdout.splitlines() if x.startswith("opened ")]
        if not counts:
            raise UserError(f"{scorer} could not be counted: {done.stderr.strip()[-300:]}")
        rows.append(
            Row("times a video is opened for a dimension", float(counts[-1].split()[1]), "", scorer)
        )
    return rows


def run_once(
    place: Place, videos: Path, out: Path, workers: int, dimensions: Sequence[str],
    threads: int = 1,
) -> float:  # fmt: skip
    """Wall seconds of ``mla-study vbench run`` as at a prompt."""
    assert place.environment is not None
    command = [
        sys.executable, "-m", "mla_study", "vbench", "run", str(videos), "--mode", "custom",
        "--dimensions", *dimensions, "--out", str(out), "--weights", str(place.weights),
        "--environment", str(place.environment.root), "--device", "cpu", "--workers", str(workers),
        "--trust-weights", "--threads", str(threads),
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    spent = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"a run of the benchmark failed: {done.stderr.strip()[-300:]}")
    return spent


def scaling(place: Place, count: int, turns: int, scratch: Path) -> list[Row]:
    """One worker beside two, interleaved; starting workers and loading models included."""
    videos = write_folder(scratch / "flows", count, 8, (192, 320))
    spent: dict[tuple[int, int], list[float]] = {(1, 1): [], (2, 1): [], (1, 2): []}
    for turn in range(turns):
        for pair in list(spent) if turn % 2 else reversed(list(spent)):
            workers, threads = pair
            out = scratch / f"scaling-{turn}-{workers}-{threads}"
            spent[pair].append(run_once(place, videos, out, workers, [FLOW], threads))
    setting = f"{FLOW}, {count} videos of 8 frames 192 x 320, start and loading included"

    def over(first: tuple[int, int], second: tuple[int, int]) -> Spread:
        return Spread.of([a / b for a, b in zip(spent[first], spent[second], strict=True)])

    return [
        Row.of("one worker / two, of one thread each, wall time", over((1, 1), (2, 1)), "x",
               setting, Goal(">=", 1.7)),
        Row.of("one worker of two threads / two of one", over((1, 2), (2, 1)), "x", setting),
    ]  # fmt: skip


def repeats(place: Place, count: int, turns: int, scratch: Path) -> list[Row]:
    """A second run over a finished folder, as at a prompt."""
    videos, out = write_folder(scratch / "many", count, 4, (64, 96)), scratch / "finished"
    run_once(place, videos, out, 2, [FLICKER])
    again = Spread.of([run_once(place, videos, out, 2, [FLICKER]) for _ in range(turns)])
    setting = f"{count} videos, Python's start included"
    return [Row.of("a second run over a finished folder", again, "s", setting, Goal("<", 3.0))]


def memory(place: Place, count: int, scratch: Path) -> list[Row]:
    """Peak memory of one worker over many clips, against that after the first tenth."""
    folder = write_folder(scratch / "few", 10, 16, (240, 416))
    videos = sorted(folder.iterdir())
    peaks = list[float]()
    with worker(place, FLICKER, scratch) as asked:
        for number in range(count):
            answer: dict[str, Any] = json.loads(asked.ask(line_of(videos[number % len(videos)])))
            peaks.append(float(answer["rss_mib"]))
    growth = peaks[-1] - peaks[count // 10]
    setting = f"{FLICKER}, clips of 16 frames 240 x 416, peak {peaks[-1]:.0f} MiB"
    return [
        Row(f"growth of a worker's peak memory, clips {count // 10} to {count}", growth, "MiB",
            setting, Goal("<=", 20.0))
    ]  # fmt: skip


def bench_vbench(quick: bool = False, write: bool = True) -> int:
    """Measure, print, and write ``results/data/bench_vbench`` unless ``quick``.

    Raises:
        UserError: no environment of VBench, or no RAFT-small.
    """
    place = Place(weights.weights_folder(), environment.find_environment(), trust=True)
    weights.require([FLOW], place.weights, trust=True)
    rows = list[Row]()
    scratch = Path(tempfile.mkdtemp(prefix="bench-vbench-"))
    try:
        big = write_folder(scratch / "big", 2, FRAMES, (480, 832))
        videos = sorted(big.iterdir())
        parts: dict[str, Callable[[], list[Row]]] = {
            "overhead": lambda: overhead(
                place, videos, 2 if quick else 5, 1 if quick else 8, scratch
            ),
            "decodes": lambda: decodes(place, videos[0], [FLICKER, FLOW], scratch),
            "second run": lambda: repeats(place, 5 if quick else 100, 1 if quick else 5, scratch),
            "memory": lambda: memory(place, 20 if quick else 500, scratch),
            "workers": lambda: scaling(place, 2 if quick else 48, 1 if quick else 3, scratch),
        }
        for name, part in parts.items():
            say(PROGRAM, name)
            found = part()
            show(found)
            rows += found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if write and not quick:
        folder = write_rows(
            "bench_vbench", rows, config={"threads": 1},
            modules=("mla_study.evaluation.bench_vbench",),
        )  # fmt: skip
        say(PROGRAM, f"wrote {folder}")
    return 0
