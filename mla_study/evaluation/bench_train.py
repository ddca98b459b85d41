"""What training costs: latent against dense, DMD against teacher forcing, and what runs beside it.

Every ratio comes from one interleaved run on one thread, but for that of two processes. Worth
running on a machine that does nothing else::

    mla-study bench train --quick --no-write
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.config import ModelConfig, mini, small
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.bench_memory import small as quarter
from mla_study.evaluation.efficiency.ceilings import ceilings
from mla_study.evaluation.efficiency.train_plan import plan_training
from mla_study.evaluation.goals import Goal, Row, results_name, say, show, write_rows
from mla_study.evaluation.timing import Spread, interleaved, threads
from mla_study.miniature.judge import Trial, judge
from mla_study.miniature.plan import OBSERVED
from mla_study.miniature.watch import Compared, Watch
from mla_study.training.batch import Batch, Data
from mla_study.training.data.opening import world_data
from mla_study.training.loop import Run, Trainer
from mla_study.training.objective import Roles
from mla_study.training.ranks import Ranks, ranks
from mla_study.training.recipe import Stage, stages
from mla_study.training.start import fresh_model
from mla_study.world.shipped import world_codec

PROGRAM = "bench train"
QUARTER_FRAMES = 6
TEACHER_GOAL, TEACHER_SCORE = Goal("<=", 760.0), 0.9
JUDGED = Trial(videos=128, seed=3)
_ALONE = Ranks(0, 1, torch.device("cpu"), False)


@dataclass(frozen=True)
class Noise:
    """Samples of a model's shapes without meaning, the same ones each time: they cost nothing."""

    config: ModelConfig
    frames: int
    _made: dict[int, Batch] = field(default_factory=dict)

    @property
    def null(self) -> Float[Tensor, "1 T E"]:
        """Zeros."""
        return torch.zeros(1, self.config.text_len, self.config.text_dim)

    def batch(self, samples: Sequence[int]) -> Batch:
        """As many as are asked for."""
        count = len(samples)
        if count not in self._made:
            config, make = self.config, torch.Generator().manual_seed(0)
            text = torch.randn(count, config.text_len, config.text_dim, generator=make)
            shape = (count, config.in_channels, self.frames, *config.latent_size)
            latents = torch.randn(*shape, generator=make)
            self._made[count] = Batch(text, latents, ("",) * count)
        return self._made[count]

    def facts(self) -> dict[str, Any]:
        """That it is noise."""
        return {"kind": "noise"}


def stepper(
    stage: Stage,
    config: ModelConfig,
    data: Data,
    teacher: ModelConfig | None = None,
    here: Ranks = _ALONE,
) -> Callable[[], object]:
    """The call of a trainer's next step, of random weights; nothing is written.

    Args:
        teacher: of the objectives that have one.
    """
    given = None if teacher is None else fresh_model(teacher, 1)
    run = Run(stage, Path("unwritten"), fresh_model(config), data, given)
    trainer = Trainer(run, here, progress=False)

    def step() -> None:
        trainer._one_step()  # pyright: ignore[reportPrivateUsage]
        trainer.step = (trainer.step + 1) % stage.steps

    return step


def forcing(
    config: ModelConfig, data: Data, changes: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[], object]:
    """A step of the miniature's teacher forcing, with fields of its stage changed."""
    return stepper(replace(stages("mini")["teacher_forcing"], **changes), config, data)


def against_dense(repeats: int) -> list[Row]:
    """A step of teacher forcing, latent over dense: at mini, and at a quarter of Wan's width."""
    rows: list[Row] = []
    world = world_data(mini(), 0)
    for name, pair, data, changes in (
        ("mini", (mini(), mini(True)), world, dict[str, Any]()),
        (
            "quarter-width Wan, 2 blocks",
            (quarter(False), quarter(True)),
            Noise(quarter(False), QUARTER_FRAMES),
            {"batch": 1, "frames": QUARTER_FRAMES},
        ),
    ):
        dense, latent = (forcing(config, data, changes) for config in pair)
        times = interleaved({"dense": dense, "latent": latent}, repeats, 2)
        noise, sizes = times.noise, pair[0]
        batch, frames = changes.get("batch", 8), changes.get("frames", 12)
        setting = (
            f"{name}, width {sizes.width}, batch {batch}, {frames} frames of "
            f"{sizes.latent_size[0]}x{sizes.latent_size[1]}, "
            f"A/A {noise.low:.3f} to {noise.high:.3f}"
        )
        rows += [
            Row.of("TF step, latent", times.spread("latent"), "CPU s", setting),
            Row.of("TF step, latent / dense", times.ratio("latent", "dense"), "ratio", setting),
        ]
    return rows


def beside_forcing(repeats: int) -> list[Row]:
    """At mini, over a step of teacher forcing: an update of DMD, rendering, and the tracker."""
    config, student = mini(), mini(True)
    world = world_data(config, 0)
    held = stages("mini")
    watch, inputs = tracked(student, config, world)
    batch = held["teacher_forcing"].batch
    fresh = iter(range(0, sys.maxsize, batch))

    def render() -> object:
        start = next(fresh)
        return world.batch(range(start, start + batch))

    calls: dict[str, Callable[[], object]] = {
        "step": forcing(student, world),
        "DMD": stepper(held["distribution_matching"], student, world, config),
        "rendering": render,
        "tracker": inputs,
        "watch": watch,
    }
    times = interleaved(calls, repeats, 2)
    noise = times.noise
    setting = f"mini latent, batch {batch}, A/A {noise.low:.3f} to {noise.high:.3f}"
    steps, asked = held["teacher_forcing"].steps, len(OBSERVED["tf"])
    cadence = f"mini latent, asked {asked} times in {steps} steps"

    def added(name: str) -> Spread:
        share = times.ratio(name, "step").scaled(asked / steps)
        return Spread(1 + share.median, 1 + share.low, 1 + share.high)

    return [
        Row.of("DMD update / TF step", times.ratio("DMD", "step"), "ratio", setting),
        Row.of(
            "rendering / TF step", times.ratio("rendering", "step"), "ratio", setting,
            Goal("<=", 0.03),
        ),
        Row.of(
            "TF step, tracker on / off", added("tracker"), "ratio", cadence, Goal("<=", 1.05)
        ),
        Row.of("TF step, tracker and held-out loss on / off", added("watch"), "ratio", cadence),
    ]  # fmt: skip


def tracked(
    student: ModelConfig, teacher: ModelConfig, data: Data
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls of what the study looks at along a run: all of it, and the ranks alone."""
    from mla_study.probes.tracker import attention_inputs
    from mla_study.training.objective import Roles

    states = [fresh_model(student, seed).state_dict() for seed in (1, 2, 3)]
    source = fresh_model(teacher, 4).state_dict()
    compared = Compared(states[0], source, states[1], {"spectral": states[2]})
    watch = Watch(data, student, compared)
    model = fresh_model(student)
    tracker, few = watch.tracker, watch.few
    assert tracker is not None

    def ranked() -> object:
        return tracker.measure(model, 0, attention_inputs(model, lambda: few(model)))

    return lambda: list(watch(0, Roles(model))), ranked


def together(repeats: int, steps: int) -> list[Row]:
    """Throughput of two processes of one thread each over that of one, in wall time."""
    with _Worker() as first, _Worker() as second:
        gains: list[float] = []
        for turn in range(repeats + 1):
            first.start(steps)
            alone = first.seconds()
            for worker in (first, second):
                worker.start(steps)
            both = [worker.seconds() for worker in (first, second)]
            if turn:
                gains.append(sum(alone / spent for spent in both))
    setting = f"mini latent, {steps} TF steps each, {torch.get_num_threads()} thread a process"
    return [Row.of("two processes / one", Spread.of(gains), "ratio", setting, Goal(">=", 1.8))]


class _Worker:
    """A process that runs so many steps when it is told to."""

    def __enter__(self) -> _Worker:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import work; work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seconds()
        return self

    def start(self, steps: int) -> None:
        """Begin."""
        pipe = cast("IO[str]", self._process.stdin)
        pipe.write(f"{steps}\n")
        pipe.flush()

    def seconds(self) -> float:
        """Wait; wall seconds that it took."""
        line = cast("IO[str]", self._process.stdout).readline()
        if not line:
            raise UserError(f"a process of the benchmark ended with {self._process.wait()}")
        return float(line)

    def __exit__(self, *_: object) -> None:
        cast("IO[str]", self._process.stdin).close()
        self._process.wait()


def work() -> None:
    """Steps of teacher forcing, as many as each line on stdin says; print their seconds."""
    torch.set_num_threads(1)
    step = forcing(mini(True), world_data(mini(), 0))
    step()
    print(0.0, flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - begun, flush=True)


def teacher_time(stage: Stage | None = None, every: int = 200, trial: Trial = JUDGED) -> list[Row]:
    """CPU seconds of the miniature's teacher, trained anew, until .9 of its videos are right.

    It is judged after every so many steps, which does not count. Where it never gets there, the
    row is of the whole training and says what it reached.

    Args:
        stage: of the teacher; by default that of the study.
    """
    stage = stage or stages("mini")["flow"]
    stage = replace(stage, save_every=stage.steps)
    codec, config = world_codec(mini().in_channels), mini()
    judging, right = 0.0, 0.0

    def observe(step: int, roles: Roles) -> list[dict[str, Any]]:
        nonlocal judging, right
        began = time.process_time()
        model = roles.ema or roles.generator
        rows = judge(model, codec, trial, bidirectional=True)
        right = sum(bool(row["all_correct"]) for row in rows) / len(rows)
        judging += time.process_time() - began
        say(PROGRAM, f"teacher, step {step}: {right:.3f} all correct")
        if right >= TEACHER_SCORE:
            raise _ReachedError(step)
        return []

    asked = (*range(every, stage.steps, every), stage.steps)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        run = Run(stage, Path(folder), fresh_model(config, stage.seed), world_data(config, 0),
                  observers=(observe,), observe_at=asked)  # fmt: skip
        trainer = Trainer(run, _ALONE, progress=False)
        began, reached = time.process_time(), stage.steps
        try:
            trainer.train()
        except _ReachedError as told:
            (reached,) = told.args
        spent = time.process_time() - began - judging
    what = f"{right:.3f} of {trial.videos} videos all correct at step {reached} of {stage.steps}"
    name = f"teacher to {TEACHER_SCORE} all-correct" if right >= TEACHER_SCORE else "whole teacher"
    return [Row(name, spent, "CPU s", f"mini, {what}; asked every {every}", TEACHER_GOAL)]


class _ReachedError(Exception):
    """The teacher is good enough; carries the step."""


def on_gpu(repeats: int) -> list[Row]:
    """Share of the measured rate of matrix products that a step of the small preset reaches."""
    config, rows = small(True), list[Row]()
    stage = stages("small")["teacher_forcing"]
    with ranks("cuda", stage.precision) as here:
        top = ceilings(here.device, torch.bfloat16).matmul
        # noise, so that rendering is not part of it
        step = stepper(stage, config, Noise(config, stage.frames), here=here)
        times = interleaved({"step": step}, repeats, 5, "cuda")
        flops = plan_training(stage, config, small(), 1).flops
        shares = Spread.of([flops / spent / top.median for spent in times.seconds["step"]])
        name = torch.cuda.get_device_name(here.device)
        setting = f"small latent, batch {stage.batch}, {name}, {top.median / 1e12:.4g} TF/s matmul"
        rows.append(Row.of("TF step, small", times.spread("step"), "s", setting))
        rows.append(
            Row.of("TF step, small / matmul ceiling", shares, "ratio", setting, Goal(">=", 0.4))
        )
    return rows


def bench_train(quick: bool = False, write: bool = True) -> int:
    """Run everything, print each row as it is measured, write ``results/data/bench_train``.

    Args:
        quick: few repeats, to try it; nothing is written.
    """
    repeats = 2 if quick else 15
    cpu: tuple[tuple[str, Callable[[], list[Row]]], ...] = (
        ("latent against dense", lambda: against_dense(repeats)),
        ("DMD, rendering and tracker", lambda: beside_forcing(repeats)),
        ("two processes", lambda: together(repeats if quick else 7, 3 if quick else 40)),
        *(() if quick else (("teacher", teacher_time),)),
    )
    config = {"repeats": repeats, "threads": 1, "clock": "CPU seconds of the process"}
    _measured("cpu", cpu, config, write and not quick)
    if torch.cuda.is_available():
        gpu = (("small preset", lambda: on_gpu(2 * repeats)),)
        _measured("cuda", gpu, config | {"clock": "device events"}, write and not quick)
    else:
        say(PROGRAM, "no GPU: the rows of the small preset are left out")
    return 0


def _measured(
    device: str,
    parts: Sequence[tuple[str, Callable[[], list[Row]]]],
    config: dict[str, Any],
    write: bool,
) -> None:
    rows: list[Row] = []
    with threads(1):
        for name, part in parts:
            say(PROGRAM, name)
            found = part()
            show(found)
            rows += found
    if write:
        folder = results_name("bench_train", torch.device(device))
        modules = (__name__,)
        say(PROGRAM, f"wrote {write_rows(folder, rows, config=config, modules=modules)}")
