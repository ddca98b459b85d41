"""One run of ``rank-probe``: plan, progress, resumable blocks, result folder."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.probes.names import public_name, redact
from mla_study.probes.rank_probe import UNITS, Options, Probed, Report, inspect, probe_sources
from mla_study.probes.series import compare, parse_series, probe_series
from mla_study.probes.store import locked
from mla_study.probes.table import Source
from mla_study.probes.work import Store, closing
from mla_study.study.demo import resolve
from mla_study.study.runs import Validity, code_hash, file_sha256, run_record, write_result

if TYPE_CHECKING:
    import pandas as pd

MODULES = ("mla_study.probes.rank_probe", "mla_study.probes.series")
BLOCKS = ".blocks"
_LEFT = re.compile(r"^\.(table|spectra|run)\.\d+\.tmp\.(parquet|json)$")
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Job:
    """What one command line asked for: either paths, or series, or a pair to compare.

    Raises:
        UserError: none or several of these, or a checkpoint twice.
    """

    paths: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    step_regex: str | None = None
    pair: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        modes = [bool(self.paths), bool(self.series), self.pair is not None]
        if sum(modes) == 0:
            raise UserError("nothing to probe: give a checkpoint, for example `rank-probe FILE`")
        if sum(modes) > 1:
            raise UserError(
                "give either paths, or --series (with its pattern quoted), or --compare A B"
            )
        if self.step_regex is not None and not self.series:
            raise UserError("--step-regex reads the steps of --series: give both")
        names = [public_name(path) for path in self.pair or self.paths]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{name} is given twice: name each checkpoint once")
            if not name:
                raise UserError("a path is empty: give a weight file, an index or a folder")

    def sources(self) -> list[Source]:
        """The checkpoints to open, in order, labelled as they were given."""
        if self.series:
            return parse_series(self.series, self.step_regex)
        return [Source(resolve(p), public_name(p)) for p in self.pair or self.paths]


def list_operators(job: Job, options: Options) -> list[Report]:
    """Reports of what would be probed; nothing is measured."""
    reports: list[Report] = []
    for source in job.sources():
        report, checkpoint = inspect(source, options)
        checkpoint.close()
        reports.append(report)
    return reports


def probe(
    *paths: str | Path,
    out: str | Path | None = None,
    workers: int | None = 1,
    **options: Any,
) -> pd.DataFrame:
    """Probe checkpoints and return the tidy table, as ``rank-probe`` does.

    Args:
        paths: files, indices, folders, ``hf://`` or ``https://`` addresses, ``demo:minilm``.
        out: folder for ``table.parquet``, ``spectra.parquet`` and ``run.json``; the same call goes
            on there after an interruption.
        workers: processes (default 1: everything happens in this one; None: as many as pay).
        options: fields of :class:`~mla_study.probes.rank_probe.Options`, such as
            ``operators="kv,qk"`` or ``heads=12``.

    Returns:
        DataFrame with the columns checkpoint, series, step (Int64), layer (int64), attention,
        operator, head (int64, -1: none), gauge, metric, value (float64), null, null_value, null_se
        (float64), m, n (int64), method, provenance: a row an operator, gauge, metric and null.

    Raises:
        UserError: a sentence that names file, tensor and remedy.

    Example::

        from mla_study import probe
        frame = probe("model.safetensors")
    """
    job = Job(tuple(str(path) for path in paths))
    folder = None if out is None else Path(out)
    return execute(job, Options.of(**options), folder, workers)[0].table


def execute(
    job: Job, options: Options, out: Path | None = None, workers: int | None = None
) -> tuple[Probed, dict[str, Any]]:
    """Probe, and write ``table.parquet``, ``spectra.parquet`` and ``run.json`` to ``out`` if given.

    Finished blocks are kept in ``out/.blocks`` until the run is complete, so that the same command
    goes on after an interruption and ends with the same bytes.

    Returns:
        what was probed, and the run record.

    Raises:
        UserError: bad input, or a folder that cannot be written.
    """
    from mla_study.study.observe import Stopwatch

    sources = job.sources()
    with _blocks(out) as folder, Stopwatch() as watch, closing():
        store = Store(folder, code_hash(*MODULES))
        with progress_bar() as progress:
            if job.pair is not None:
                probed = compare(sources[0], sources[1], options, store, workers, progress)
            elif job.series:
                probed = probe_series(sources, options, store, workers, progress)
            else:
                probed = probe_sources(sources, options, store, workers, progress)
        record: dict[str, Any] = {
            "config": _public({"options": asdict(options), "job": asdict(job)}),
            "inputs": {**probed.inputs, **_files(options)},
            "seed": options.seed,
            "modules": MODULES,
            "provenance": "measured",
            "validity": _validity(probed),
            "units": UNITS,
            "notes": probed.notes,
            "observed": {**watch.observed(), "bytes_read": probed.bytes_read},
        }
        if out is None:
            return probed, run_record(**record)
        tables = {"table": probed.table, "spectra": probed.spectra}
        run = write_result(out, tables, **record)
        shutil.rmtree(folder, ignore_errors=True)
    return probed, run


def _validity(probed: Probed) -> Validity:
    return "partial" if probed.validity == "partial" else "full"


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _files(options: Options) -> dict[str, str]:
    """sha256 of the files besides checkpoints that a result depends on."""
    given = {"--config": options.config, "--covariance": options.covariance}
    return {
        f"{option} {path}": file_sha256(path)
        for option, path in given.items()
        if path is not None and Path(path).is_file()
    }


@contextlib.contextmanager
def _blocks(out: Path | None) -> Generator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="rank-probe-") as folder:
            yield Path(folder)
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    with locked(out / BLOCKS):
        for left in out.iterdir():
            if _LEFT.match(left.name):
                left.unlink(missing_ok=True)
        yield out / BLOCKS


@contextlib.contextmanager
def progress_bar() -> Generator[Progress]:
    """A bar on stderr that vanishes at the end, and is absent where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(unit="block", leave=False, disable=None, file=sys.stderr, mininterval=0) as bar:

        def show(finished: int, total: int, read: int) -> None:
            bar.total = total
            bar.set_postfix_str(f"{read / 1e6:.0f} MB read", refresh=False)
            bar.update(finished - bar.n)

        yield show


def print_json(value: object) -> None:
    """One JSON document on stdout, nothing else."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
