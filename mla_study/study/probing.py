"""One run of ``rank-probe``: plan, progress, resumable blocks, result folder, report."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.probes.rank_probe import UNITS, Options, Probed, inspect, probe_sources
from mla_study.probes.series import compare, parse_series, probe_series
from mla_study.probes.table import Source
from mla_study.probes.work import Store
from mla_study.study.runs import Validity, code_hash, run_record, write_result

MODULES = ("mla_study.probes.rank_probe", "mla_study.probes.series")
BLOCKS = ".blocks"


@dataclass(frozen=True)
class Job:
    """What one command line asked for: either paths, or series, or a pair to compare."""

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
        doubled = {p for p in self.paths if self.paths.count(p) > 1}
        if doubled:
            raise UserError(f"{doubled.pop()} is given twice: name each checkpoint once")

    def sources(self) -> list[Source]:
        """The checkpoints to open, in order."""
        if self.series:
            return parse_series(self.series, self.step_regex)
        return [Source(p, p) for p in self.pair or self.paths]


def list_operators(job: Job, options: Options) -> list[Any]:
    """Reports of what would be probed; nothing is measured."""
    return [inspect(source, options)[0] for source in job.sources()]


def execute(
    job: Job, options: Options, out: Path | None = None, workers: int | None = None
) -> tuple[Probed, dict[str, Any]]:
    """Probe, and write ``table.parquet``, ``spectra.parquet`` and ``run.json`` to ``out`` if given.

    Finished blocks are kept in ``out/.blocks`` until the run is complete, so that the same command
    goes on after an interruption and ends with the same bytes.

    Raises:
        UserError: bad input, or a folder that cannot be written.
    """
    from mla_study.study.observe import Stopwatch

    sources = job.sources()
    with _blocks(out) as folder, Stopwatch() as watch:
        store = Store(folder, code_hash(*MODULES))
        with progress_bar() as progress:
            if job.pair is not None:
                probed = compare(sources[0], sources[1], options, store, workers, progress)
            elif job.series:
                probed = probe_series(sources, options, store, workers, progress)
            else:
                probed = probe_sources(sources, options, store, workers, progress)
        record: dict[str, Any] = {
            "config": {"options": asdict(options), "job": asdict(job)},
            "inputs": probed.inputs,
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
    shutil.rmtree(out / BLOCKS, ignore_errors=True)
    return probed, run


def _validity(probed: Probed) -> Validity:
    return "partial" if probed.validity == "partial" else "full"


@contextlib.contextmanager
def _blocks(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="rank-probe-") as folder:
            yield Path(folder)
        return
    try:
        (out / BLOCKS).mkdir(parents=True, exist_ok=True)
        probe = out / BLOCKS / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another") from None
    yield out / BLOCKS


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int, int], None]]:
    """A bar on stderr that vanishes at the end, and is absent where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(unit="block", leave=False, disable=None, file=sys.stderr) as bar:

        def show(finished: int, total: int, read: int) -> None:
            bar.total = total
            bar.set_postfix_str(f"{read / 1e6:.0f} MB read", refresh=False)
            bar.update(finished - bar.n)

        yield show


def print_json(value: object) -> None:
    """One JSON document on stdout, nothing else."""
    json.dump(value, sys.stdout, allow_nan=False)
    sys.stdout.write("\n")
