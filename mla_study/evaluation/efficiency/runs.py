"""Whole measurements: what ``mla-study bench step``, ``rollout`` and ``gpu`` run and write.

Example::

    mla-study bench rollout --scale quarter --repeats 3 --no-write
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
import torch

from mla_study.errors import UserError
from mla_study.evaluation.efficiency import attribution, rollout_bench
from mla_study.evaluation.efficiency.attribution import READINGS, Factor
from mla_study.evaluation.efficiency.calibrate import check, inputs
from mla_study.evaluation.efficiency.ceilings import Ceilings
from mla_study.evaluation.efficiency.rollout_bench import NOT_COUNTED, RANDOM, UNITS, Kind
from mla_study.evaluation.efficiency.variants import Scale, Variant, full, quarter, small
from mla_study.evaluation.goals import Goal, Row, say, show
from mla_study.evaluation.timing import Spread, Times, clock_of, interleaved, threads
from mla_study.kernels.latent_attention import FORMS
from mla_study.kernels.latent_attention.calibrations import device_key
from mla_study.kernels.latent_attention.cost import Form, Shape, costs, dense_cost
from mla_study.study.notebooks import Project
from mla_study.study.runs import Validity, atomic_write, write_result

ScaleName = Literal["small", "quarter", "full"]
Reading = Literal["beside", "within", "both"]
PROGRAM = "bench"
MODULES = (
    "mla_study.evaluation.efficiency.attribution",
    "mla_study.evaluation.efficiency.rollout_bench",
    "mla_study.evaluation.efficiency.variants",
)
_READING: Mapping[str, str] = dict(zip(("beside", "within"), READINGS, strict=True))
KERNEL_GOAL = Goal(">=", 0.7)
FPS_GOAL, FAST_FPS_GOAL = 57.0, 100.0
"""At 15600 keys on an H100, batch 1, DiT only: exact in bf16 (its FLOPs bound it at 77; the paper
reports 27), and with fp8 projections, graphs and no clean pass."""


@dataclass(frozen=True)
class Measured:
    """Tables of one measurement and what its notes say."""

    scale: Scale
    table: pd.DataFrame
    factors: pd.DataFrame
    repeats: pd.DataFrame
    tops: Ceilings
    config: dict[str, Any]
    seconds: float

    def write(self, folder: Path, validity: Validity = "full") -> None:
        """As a result folder."""
        scale = self.scale
        hardware = device_key(scale.device)
        one = "" if scale.where.type == "cuda" else ", one thread, CPU seconds of the process"
        write_result(
            folder,
            {"table": self.table, "factors": self.factors, "repeats": self.repeats},
            config=self.config,
            inputs={},
            seed=0,
            modules=MODULES,
            provenance="measured",
            validity=validity,
            units={**UNITS, "value": "ratio of seconds, turn by turn"},
            notes=[
                f"{hardware}{one}",
                f"{scale.name}: {scale.note}, {scale.dtype}, "
                f"{scale.config.latent_size[0]}x{scale.config.latent_size[1]} latents, "
                f"{len(scale.config.flow.denoise_steps)} denoising passes a chunk",
                NOT_COUNTED,
                RANDOM,
                rollout_bench.told(self.tops),
            ],
            observed={"hardware": hardware, "measuring_s": self.seconds},
        )


def scale_of(name: ScaleName) -> Scale:
    """The scale of that name.

    Raises:
        UserError: ``full`` without a GPU.
    """
    if name == "full":
        if not torch.cuda.is_available():
            raise UserError(
                "the scale 'full' (Wan 1.3B, 480x832) is measured on a GPU, and torch sees none: "
                "give --scale quarter"
            )
        return full("cuda")
    return quarter() if name == "quarter" else small(quarter())


def run(
    scale: Scale,
    reading: Reading,
    kinds: Sequence[Kind],
    repeats: int,
    clip_repeats: int = 0,
) -> Measured:
    """Measure all variants of one or both readings of the window; rows are printed."""
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}, but it must be at least 1")
    if clip_repeats < 0:
        raise UserError(f"--clips is {clip_repeats}, but it must be 0 or more")
    names = list(_READING) if reading == "both" else [reading]
    wanted: list[Factor] = []
    for name in names:
        wanted += attribution.factors(scale, _READING[name])
    variants = attribution.variants_of(wanted)
    shown = [
        factor.after.name for factor in wanted if factor.name.startswith("layout, reconstruct")
    ]
    clips = list(dict.fromkeys([variants[0].name, *(f.before.name for f in wanted), *shown]))
    begun = time.perf_counter()
    table, times, tops = rollout_bench.measure(
        variants, scale, kinds, repeats, clip_repeats, clips if scale.where.type == "cpu" else None,
        lambda told: say(PROGRAM, told),
    )  # fmt: skip
    spent = time.perf_counter() - begun
    for row in table.to_dict("records"):
        print(rollout_bench.line(cast("dict[str, Any]", row)), flush=True)
    found = attribution.rows_of(wanted, scale, times, tops)
    for row in found.to_dict("records"):
        print(attribution.line(cast("dict[str, Any]", row)), flush=True)
    if scale.name == "wan-1.3b":
        show(goals(table))
    print(f"{scale.name}: {scale.note}; {NOT_COUNTED}; {RANDOM}", flush=True)
    config = {
        "scale": scale, "readings": [_READING[name] for name in names], "kinds": list(kinds),
        "repeats": repeats, "clip_repeats": clip_repeats,
    }  # fmt: skip
    return Measured(scale, table, found, raw(times), tops, config, spent)


def raw(times: Mapping[Kind, Times]) -> pd.DataFrame:
    """Every turn: kind, variant, turn, seconds."""
    rows = [
        {"kind": kind, "variant": name, "turn": turn, "seconds": value}
        for kind, taken in times.items()
        for name, values in taken.seconds.items()
        for turn, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["kind", "variant", "turn", "seconds"])


def goals(table: pd.DataFrame) -> list[Row]:
    """Frames a second beside their goals, at 15600 keys; of an absent variant no row."""
    chunks = table[(table["kind"] == "chunk") & (table["status"] == "ok")]
    chunks = chunks[(chunks["keys"] == 15600) & (chunks["batch"] == 1)]
    eight = chunks["how"].str.contains("fp8")
    exact = chunks[~eight & chunks["clean_pass"] & (chunks["storage"] == chunks["dtype"])]
    fast = chunks[eight & ~chunks["clean_pass"]]
    rows: list[Row] = []
    for held, name, goal in (
        (exact, "FPS, exact bf16, batch 1", FPS_GOAL),
        (fast, "FPS, fp8, graph, no clean pass", FAST_FPS_GOAL),
    ):
        if len(held):
            best = held.sort_values("fps").iloc[-1]
            setting = f"{best['variant']}, limit {best['limit_fps']:.3g}, {NOT_COUNTED}"
            rows.append(Row(name, float(best["fps"]), "FPS", setting, Goal(">=", goal)))
    return rows


@torch.no_grad()
def kernel_goal(
    shape: Shape,
    device: torch.device,
    repeats: int = 30,
    form: Form = "absorbed_triton",
    backend: str = "CUDNN_ATTENTION",
) -> Row:
    """FLOP/s of a form of latent attention over those of dense SDPA, same queries and keys.

    A form that is wrong gets no number.

    Args:
        backend: of ``torch.nn.attention.SDPBackend``.

    Raises:
        UserError: the form is wrong.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    given = inputs(shape, device)
    reason = check(form, given, shape.dtype)
    if reason is not None:
        raise UserError(f"{form} gets no number: {reason}")
    q, k, v = (
        torch.randn(shape.batch, shape.heads, n, shape.d_head, device=device).to(given[0].dtype)
        for n in (shape.queries, shape.keys, shape.keys)
    )

    def sdpa() -> object:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    calls = {"form": lambda: FORMS[form](*given), "sdpa": sdpa}
    times = interleaved(calls, repeats, 3, clock_of(device))
    mine, theirs = costs(shape)[form].flops, dense_cost(shape).flops
    share = Spread.of(
        [mine / a / (theirs / b) for a, b in zip(*(times.seconds[n] for n in calls), strict=True)]
    )
    setting = f"{shape.queries} queries, {shape.keys} keys, {shape.dtype}"
    return Row.of(f"{form} / {backend.lower()}, FLOP/s", share, "ratio", setting, KERNEL_GOAL)


def bench(
    kinds: Sequence[Kind], name: ScaleName, reading: Reading, repeats: int, clips: int, write: bool
) -> int:
    """Measure, print, and write ``results/data/bench_{step|rollout}_{scale}_{reading}``."""
    scale = scale_of(name)
    with threads(1):
        made = run(scale, reading, kinds, repeats, clips)
    if name == "full" and "step" in kinds:
        window = READINGS[_READING["within" if reading == "within" else "beside"]]
        shape = Variant(window, latent=True, form="absorbed_triton").shape(scale)
        show([kernel_goal(shape, scale.where)])
    if write:
        what = "rollout" if "chunk" in kinds else "step"
        folder = Project.find().data / f"bench_{what}_{name}_{reading}"
        made.write(folder)
        say(PROGRAM, f"wrote {folder}")
    return 0


# on a GPU, piece by piece

PIECES: Mapping[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", "--device", "cuda", "--dtypes", "bf16"),
    "attention": ("bench", "attention", "--device", "cuda", "--width", "full", "--dtypes", "bf16"),
    "step": ("bench", "step", "--scale", "full", "--reading", "beside"),
    "step-within": ("bench", "step", "--scale", "full", "--reading", "within"),
    "rollout": ("bench", "rollout", "--scale", "full", "--reading", "beside"),
    "rollout-within": ("bench", "rollout", "--scale", "full", "--reading", "within"),
    "memory": ("bench", "memory"),
    "batch": ("bench", "batch"),
}
"""Piece -> what follows ``mla-study``; the rates come first, for the forms of all others."""


def bench_gpu(only: Sequence[str] = (), minutes: float = 8.0, again: bool = False) -> int:
    """Run the pieces that are not there yet, each in a process of its own, and keep what it prints.

    After ``minutes`` no further piece starts; the next call goes on. What is kept lies in
    ``results/data/bench_gpu/PIECE.txt``; the pieces write their tables themselves.

    Raises:
        UserError: no GPU, or an unknown piece.
    """
    unknown = [name for name in only if name not in PIECES]
    if unknown:
        raise UserError(f"there is no piece '{unknown[0]}': give some of {', '.join(PIECES)}")
    if not torch.cuda.is_available():
        raise UserError("bench gpu measures a CUDA GPU, and torch sees none here: run it on one")
    folder, begun, failed = Project.find().data / "bench_gpu", time.monotonic(), 0
    for name in only or PIECES:
        place = folder / f"{name}.txt"
        if place.exists() and not again:
            say(PROGRAM, f"{name}: is there ({place})")
            continue
        if time.monotonic() - begun > 60 * minutes:
            say(PROGRAM, f"{name}: not started after {minutes:g} minutes; the same command goes on")
            break
        say(PROGRAM, name)
        code, text = streamed([sys.executable, "-m", "mla_study", *PIECES[name]])
        if code:
            say(PROGRAM, f"{name} ended with {code}; the others go on")
            failed += 1
            continue
        atomic_write(place, text.encode())
    return 1 if failed else 0


def streamed(command: Sequence[str]) -> tuple[int, str]:
    """Run, passing its stdout on line by line; the exit code and that text."""
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            lines.append(text)
    return process.returncode, "".join(lines)
