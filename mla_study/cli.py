"""The two commands, ``rank-probe`` and ``mla-study``: each subcommand is a thin call.

Nothing heavy is imported before a subcommand runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mla_study.commands.bench import Bench
from mla_study.commands.cache_error import CacheError
from mla_study.commands.checkpoint import Checkpoint
from mla_study.commands.claims import Claims
from mla_study.commands.dispatch import Calibrate, Dispatch
from mla_study.commands.generate import Generate
from mla_study.commands.latentize import Latentize
from mla_study.commands.latents import Latents
from mla_study.commands.mask import Mask
from mla_study.commands.plan import Plan
from mla_study.commands.report import Report
from mla_study.commands.study import Study
from mla_study.commands.text import Text
from mla_study.commands.train import Train
from mla_study.commands.vae import Vae
from mla_study.commands.vbench import VBench
from mla_study.commands.world import Score, World
from mla_study.errors import EXIT_BAD_INPUT, UserError


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.replace(",", " ").split() if word)


@dataclass(frozen=True)
class RankProbe:
    """Spectra and effective ranks of the attention in a checkpoint, beside their null models.

    A checkpoint is a file (safetensors, .pt/.pth/.bin, GGUF, ONNX), a sharded index, a folder
    (original Wan, diffusers, transformers), hf://org/name[/file], or an https:// address; remote
    safetensors are read by byte range.

    Example, on weights that come with the demo packages: rank-probe demo:minilm --operators kv
    """

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """Checkpoints to probe; demo:minilm and demo:smollm2 name the demo packages' weights."""
    list_operators: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print what was found and what was left out, and why; measure nothing."""
    operators: str = "kv,k,v,composed"
    """Comma-separated: q k v o, joint kv and qkv, per-head qk (W_Q^T W_K) and ov (W_O W_V),
    composed (of latent attention)."""
    gauge: Literal["raw", "balanced", "folded"] = "raw"
    """Scale of the joint operator that the printed table shows; the result holds all three."""
    metrics: str = ""
    """Comma-separated names or patterns to keep (default: all); naming condition takes every
    spectrum from svdvals."""
    heads: int | None = None
    """Query heads, where neither config nor qk-norm says it (for qk and ov)."""
    kv_heads: int | None = None
    """Key/value heads, where shapes do not say it."""
    config: str | None = None
    """A model's config.json: says how many blocks should be there, and the heads."""
    layers: int | None = None
    """Number of blocks that should be there; a missing one is named."""
    map: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """'REGEX -> role' for tensors whose names say nothing, such as
    'mixer\\.(\\d+)\\.key -> k' (cross.k for cross-attention); repeat for each role."""
    weights: str | None = None
    """Which dictionary of a PyTorch file, such as generator_ema."""
    base: str | None = None
    """Dense checkpoint that a LoRA file is merged into; without it the adapter's own product is
    probed."""
    covariance: str | None = None
    """Input covariances (safetensors, see mla_study.probes.activations): adds the weighted gauges
    and the functional errors."""
    source: str | None = None
    """Dense checkpoint whose cut spectrum is a further null of composed operators."""
    compare: tuple[str, str] | None = None
    """Two checkpoints: principal angles and overlap of their row spaces, layer by layer."""
    series: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Checkpoints along training, quoted: 'run/step_*.safetensors' or 'svd=DIR/*'; repeat for a
    second series."""
    step_regex: str | None = None
    """How to read the step from a path of a series (first group)."""
    out: Path | None = None
    """Folder for table.parquet, spectra.parquet and run.json; the same command goes on after an
    interruption."""
    plot: Path | None = None
    """Draw energy curves and ranks into this .pdf, .png or .svg."""
    json: bool = False
    """Print everything as one JSON document on stdout."""
    csv: bool = False
    """Print the tidy table as CSV on stdout."""
    workers: int | None = None
    """Processes (default: as many as cores where there is enough to do)."""
    seed: int = 0
    """Seed of the null models."""

    def run(self) -> int:
        """Probe, report, and return the exit code."""
        from mla_study.probes.rank_probe import Options
        from mla_study.study import probe_report
        from mla_study.study.probe_plots import check_plot_path, plot_probe, writable
        from mla_study.study.probing import Job, execute, list_operators, print_json

        if self.json and self.csv:
            raise UserError("--json and --csv both want stdout: give one, and --out for the tables")
        job = Job(self.paths, self.series, self.step_regex, self.compare)
        options = Options(
            operators=_words(self.operators),
            metrics=_words(self.metrics),
            heads=self.heads,
            kv_heads=self.kv_heads,
            layers=self.layers,
            config=self.config,
            weights=self.weights,
            base=self.base,
            maps=self.map,
            covariance=self.covariance,
            source=self.source,
            seed=self.seed,
        )
        workers = _at_least_one("--workers", self.workers)
        if self.plot is not None:
            check_plot_path(self.plot)
            writable(self.plot)
        if self.list_operators:
            reports = list_operators(job, options)
            if self.json:
                print_json([probe_report.describe(r) for r in reports])
            else:
                print(probe_report.listing(reports))
            return 0
        probed, run = execute(job, options, self.out, workers)
        if self.plot is not None:
            plot_probe(probed.table, probed.spectra, self.plot, self.gauge, run)
        if self.json:
            print_json(probe_report.document(probed, run, self.gauge))
        elif self.csv:
            probed.table.to_csv(sys.stdout, index=False)
        else:
            print(probe_report.text_table(probed, self.gauge))
            print(f"class {run['provenance']}, {run['validity']}, run {run['run_hash'][:12]}")
        if self.json or self.csv:
            for line in probe_report.warn_lines(probed.reports):
                print(line, file=sys.stderr)
        for place in (self.out, self.plot):
            if place is not None:
                print(f"wrote {place}", file=sys.stderr)
        return 0


def _at_least_one(option: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UserError(f"{option} is {value}, but it must be at least 1")
    return value


@dataclass(frozen=True)
class Figures:
    """Draw the figures that are stale into results/figures (PDF, PNG and SVG).

    Example: mla-study figures --fig fig1 --params layers=4
    """

    fig: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-f"])] = ()
    """Figures to draw, by name or its beginning (default: all)."""
    params: tuple[str, ...] = ()
    """name=value for the notebook's parameters."""
    force: bool = False
    """Draw also what is not stale."""
    list_only: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Only list: id, class of its data, stale or not, title."""
    jobs: int = 2
    """Notebooks at a time."""

    def run(self) -> int:
        """Run the notebooks."""
        from mla_study.study.figures import parse_assignments, run_figures

        return run_figures(
            [name for given in self.fig for name in _words(given)],
            force=self.force,
            params=parse_assignments(self.params),
            jobs=self.jobs,
            list_only=self.list_only,
        )


@dataclass(frozen=True)
class Data:
    """Measure the committed tables of results/data anew.

    Example: mla-study data --fig fig1
    """

    fig: tuple[str, ...] = ()
    """Figures whose tables are measured (default: all)."""

    def run(self) -> int:
        """Measure."""
        from mla_study.study.figures import run_data

        return run_data([name for given in self.fig for name in _words(given)])


@dataclass(frozen=True)
class Config:
    """Print a preset as JSON, with its hash on stderr.

    Example: mla-study config wan-1.3b --latent
    """

    preset: tyro.conf.Positional[str]
    """wan-1.3b, wan-14b or mini."""
    latent: bool = False
    """With latent self-attention."""

    def run(self) -> int:
        """Print the preset."""
        from mla_study.config import config_hash, preset, to_json

        config = preset(self.preset, self.latent)
        sys.stdout.write(to_json(config))
        print(f"sha256 {config_hash(config)}", file=sys.stderr)
        return 0


@dataclass(frozen=True)
class BenchProbe:
    """Compare rank-probe's speed with its arithmetic floor and with WeightWatcher, in one run.

    Example: mla-study bench-probe --layers 2 --no-write
    """

    layers: int = 30
    """Layers of the synthetic checkpoint of Wan 1.3B's shape."""
    repeats: int = 3
    """Interleaved repetitions."""
    write: bool = True
    """Write results/data/bench_probe."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.bench_probe import bench_probe

        return bench_probe(self.layers, self.repeats, self.write)


@dataclass(frozen=True)
class BenchModel:
    """Measure the model: against diffusers and dense masks, memory, long rollouts, loading.

    Example: mla-study bench-model --quick
    """

    quick: bool = False
    """Small shapes and few repeats, to try it; nothing is written."""
    write: bool = True
    """Write results/data/bench_model."""

    def run(self) -> int:
        """Run the benchmark."""
        from mla_study.evaluation.bench_model import bench_model

        return bench_model(self.quick, self.write)


Command = (
    Annotated[RankProbe, tyro.conf.subcommand("rank-probe")]
    | Annotated[Checkpoint, tyro.conf.subcommand("checkpoint")]
    | Annotated[Latentize, tyro.conf.subcommand("latentize")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Latents, tyro.conf.subcommand("latents")]
    | Annotated[Text, tyro.conf.subcommand("text")]
    | Annotated[Vae, tyro.conf.subcommand("vae")]
    | Annotated[World, tyro.conf.subcommand("world")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Mask, tyro.conf.subcommand("mask")]
    | Annotated[CacheError, tyro.conf.subcommand("cache-error")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[VBench, tyro.conf.subcommand("vbench")]
    | Annotated[Claims, tyro.conf.subcommand("claims")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Dispatch, tyro.conf.subcommand("dispatch")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Figures, tyro.conf.subcommand("figures")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Config, tyro.conf.subcommand("config")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[BenchProbe, tyro.conf.subcommand("bench-probe")]
    | Annotated[BenchModel, tyro.conf.subcommand("bench-model")]
)


@dataclass(frozen=True)
class Program:
    """The mla_study toolkit: probe attention spectra, and regenerate every figure.

    Example: mla-study rank-probe demo:minilm
    """

    command: Command = field()


def _guarded(prog: str, action: Callable[[], int]) -> int:
    try:
        code = action()
        sys.stdout.flush()
        return code
    except UserError as error:
        from mla_study.probes.names import redact

        message = " ".join(redact(str(error)).split())
        print(f"{prog}: {message}{'' if message.endswith('.') else '.'}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        goes_on = (
            "the same command with --out goes on" if prog == "rank-probe" else "no file is half"
        )
        print(f"{prog}: interrupted; {goes_on}.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print(f"{prog}: out of memory: use fewer --workers or a larger machine.", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{prog}: {error.strerror}{where}: free space or check the rights.", file=sys.stderr)
        return EXIT_BAD_INPUT


_FLAGS: tuple[Any, ...] = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)


def rank_probe_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``rank-probe``; returns the exit code."""
    return _guarded(
        "rank-probe",
        lambda: tyro.cli(RankProbe, prog="rank-probe", args=argv, config=_FLAGS).run(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``mla-study``; returns the exit code."""
    return _guarded(
        "mla-study",
        lambda: tyro.cli(Program, prog="mla-study", args=argv, config=_FLAGS).command.run(),
    )
