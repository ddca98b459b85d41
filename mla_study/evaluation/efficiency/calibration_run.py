"""The run behind ``mla-study calibrate``: all dtypes, the printed verdict, and the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mla_study.evaluation.efficiency.calibrate import calibrate
from mla_study.evaluation.goals import Goal, Row, results_name, say, show, write_rows
from mla_study.evaluation.timing import threads as on_threads
from mla_study.kernels.latent_attention import calibrations
from mla_study.kernels.latent_attention.cost import Calibration
from mla_study.rollout.setup import usable_device
from mla_study.study.probe_plots import writable
from mla_study.study.runs import atomic_write

PROGRAM = "calibrate"


def run_calibration(
    dtypes: Sequence[str],
    threads: int = 1,
    device: str = "cpu",
    quick: bool = False,
    write: bool = True,
    out: Path | None = None,
) -> Path | None:
    """Calibrate each dtype, print rates and how often the choice is right, write what is asked for.

    Entries of the file for other dtypes and threads stay.

    Returns:
        The calibration file, or None where nothing was written.

    Raises:
        UserError: no such device, a file of another device, or nothing can be written there.
    """
    where = usable_device(device)
    name = calibrations.device_key(device)
    place = calibrations.FOLDER / calibrations.file_name(name) if out is None else out
    if write:
        writable(place)
    kept = calibrations.read(place, name) if place.exists() and write else []
    say(PROGRAM, f"{name}, {threads} threads")
    made: list[Calibration] = []
    rows: list[Row] = []
    fitted: list[pd.DataFrame] = []
    checked: list[pd.DataFrame] = []
    with on_threads(threads):
        for dtype in dtypes:
            rates, points, choices = calibrate(
                dtype, where, quick, 3 if quick else 5, lambda line: say(PROGRAM, line)
            )
            mine = _rows(rates, choices)
            show(mine)
            rows += mine
            made.append(rates)
            fitted.append(points.assign(threads=threads))
            checked.append(choices.assign(threads=threads))
    if not write or (quick and out is None):
        return None
    fresh = {(entry.dtype, entry.threads) for entry in made}
    entries = [entry for entry in kept if (entry.dtype, entry.threads) not in fresh] + made
    atomic_write(place, calibrations.to_text(entries).encode())
    calibrations.find.cache_clear()
    if not quick:
        more = {"points": pd.concat(fitted), "choices": pd.concat(checked)}
        write_rows(
            results_name("calibration", where),
            rows,
            config={"dtypes": list(dtypes), "threads": threads, "device": name},
            modules=("mla_study.evaluation.efficiency.calibration_run",),
            more=more,
            notes=[
                "random weights and inputs: speed does not depend on values",
                "attention of one layer, without its projections",
            ],
        )
    return place


def _rows(rates: Calibration, choices: pd.DataFrame) -> list[Row]:
    setting = f"{rates.dtype}, {rates.threads} threads"
    regret = float(choices["regret"].mean() - 1)
    return [
        Row("matrix product", rates.gemm / 1e9, "GF/s", f"{setting}, fitted"),
        Row("attention, reconstruct", rates.reconstruct.attention / 1e9, "GF/s", setting),
        Row("attention, absorbed", rates.absorbed.attention / 1e9, "GF/s", setting),
        Row("memory", rates.bandwidth / 1e9, "GB/s", f"{setting}, copy of 128 MB"),
        Row("residual of the fit", rates.residual, "rms log", f"{setting}, {rates.points} times"),
        Row(
            "choice within 5 % of the better form",
            float(choices["right"].mean()),
            "share",
            f"{setting}, {len(choices)} shapes that were not fitted",
            Goal(">=", 0.95),
        ),
        Row("mean time lost by the choice", regret, "share", setting),
    ]
