"""Curves that the page shows with their values: spectra, and drift of long rollouts.

A chart is plain data: places on the x axis, and series of values with their bounds. The browser
draws it; without a script the figure beside it says the same.

Shapes: L layers, k singular values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.errors import UserError
from mla_study.report.folders import find
from mla_study.report.joining import SPECTRA as COLUMNS
from mla_study.study import staleness
from mla_study.study.notebooks import Project, discover
from mla_study.study.plots import COLOURS, NULL_COLOUR
from mla_study.study.runs import read_result, round_significant

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 5
SPECTRA, DRIFT = "fig1_spectra", "fig_drift"
NAMES = {"minilm": "MiniLM", "smollm2": "SmolLM2"}
METRICS = {
    "iou": ("IoU of the sprite", ""),
    "colour_kept": ("Share of frames that keep the colour", ""),
    "velocity_error": ("Velocity error", "pixels a frame"),
    "phase_error": ("Distance from the true path", "pixels"),
}
LOOKS = {"dense": "", "activation": "green", "spectral": "blue", "spectral-raw": "purple",
         "random": "vermillion"}  # fmt: skip
_CYCLE = ("blue", "vermillion", "green", "purple", "orange", "sky")


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        colour: empty: that of the text.
        values, low, high: a value a place on the x axis; None where there is none.
    """

    name: str
    colour: str
    values: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    dash: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis.

    Attributes:
        figure: whose interactive sibling it is.
        source: file below the project that the values are from.
    """

    id: str
    figure: str
    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    series: tuple[Series, ...]
    source: str
    run: str
    x_log: bool = False
    y_log: bool = False


def charts(project: Project, more: Iterable[Path] = ()) -> list[Chart]:
    """All charts whose tables are there.

    Args:
        more: folders of a user's results, whose spectra join.

    Raises:
        UserError: a table is not what its record says.
    """
    return [*spectra(project, more), *drift(project)]


def spectra(project: Project, more: Iterable[Path] = ()) -> list[Chart]:
    """Normalised singular values and energy of [W_K; W_V], median and extremes of layers."""
    place = project.data / SPECTRA
    if not place.is_dir() or SPECTRA not in {figure.id for figure in discover(project)}:
        return []
    result = read_result(place)
    found: dict[str, np.ndarray] = dict(_spectra(result.tables["spectra"]))
    for root in more:
        for folder in find(root):
            try:
                tables = read_result(folder).tables
            except UserError:
                continue  # the list of results says what is wrong with it
            if "spectra" in tables and set(tables["spectra"].columns) >= COLUMNS:
                found |= _spectra(tables["spectra"], f"{folder.name}: ")
    figure = next(figure for figure in discover(project) if figure.id == SPECTRA)
    null = staleness.load_module(figure, project).gaussian_curves(768, 384)
    shapes = {sigma.shape[1] for sigma in found.values()} | {null.shape[1]}
    x = sorted({round((i + 1) / n, 6) for n in shapes for i in range(n)})
    kinds = {
        "sigma": ("Singular values", "σᵢ / σ₁", lambda s: s / s[:, :1], True),
        "energy": ("Energy of the first k directions", "E(k)", _energy, False),
    }
    made: list[Chart] = []
    for kind, (title, label, change, log) in kinds.items():
        series = [
            _banded(name, COLOURS[_CYCLE[number % len(_CYCLE)]], x, change(sigma), "inputs" in name)
            for number, (name, sigma) in enumerate(found.items())
        ]
        series.append(_banded("Gaussian matrix (null)", NULL_COLOUR, x, change(null)))
        made.append(
            Chart(
                f"spectra-{kind}", SPECTRA, f"{title} of [K; V], median of layers", "i / n", label,
                tuple(x), tuple(series), f"results/data/{SPECTRA}/spectra.parquet",
                result.run_hash[:12], y_log=log,
            )
        )  # fmt: skip
    return made


def _spectra(table: pd.DataFrame, before: str = "") -> dict[str, np.ndarray]:
    """Singular values [L, k] of the joint operator by name, and of the same on real inputs."""
    mine = table[(table["attention"] == "self") & (table["operator"] == "kv")]
    found: dict[str, np.ndarray] = {}
    for gauge, told in (("raw", ""), ("weighted-raw", " on its inputs")):
        for label, rows in mine[mine["gauge"] == gauge].groupby("checkpoint", sort=False):
            name = before + NAMES.get(str(label), Path(str(label)).name) + told
            wide = rows.pivot_table(index="layer", columns="index", values="sigma")
            found[name] = wide.dropna(axis=1).to_numpy()
    return {name: sigma for name, sigma in found.items() if sigma.size}


def _energy(sigma: np.ndarray) -> np.ndarray:
    square = np.cumsum(np.square(sigma), axis=-1)
    return square / square[:, -1:]


def _banded(
    name: str, colour: str, x: Sequence[float], values: np.ndarray, dash: bool = False
) -> Series:
    """Median and extremes over rows [L, k] at the places i / k among ``x``."""
    count = values.shape[1]
    at = {round((i + 1) / count, 6): i for i in range(count)}
    three = [np.median(values, axis=0), values.min(axis=0), values.max(axis=0)]
    spread = [
        tuple(float(row[at[place]]) if place in at else None for place in x)
        for row in (round_significant(line, DIGITS) for line in three)
    ]
    return Series(name, colour, *spread, dash=dash)


def drift(project: Project) -> list[Chart]:
    """Scores of long rollouts, window by window: students at 10x and 100x the training length."""
    place = project.data / "study_drift"
    figure = next((figure for figure in discover(project) if figure.id == DRIFT), None)
    if not place.is_dir() or figure is None:
        return []
    result = read_result(place)
    table = staleness.load_module(figure, project).curves(result.table)
    made: list[Chart] = []
    for metric, (title, unit) in METRICS.items():
        mine = table[table["metric"] == metric]
        x = tuple(sorted(set(mine["second"])))
        series = [
            _over_time(f"{student}, {clips}x", _colour(str(student)), x, rows, int(str(clips)) > 10)
            for (student, clips), rows in mine.groupby(["student", "clips"], sort=False)
        ]
        if series:
            made.append(
                Chart(
                    f"drift-{metric.replace('_', '-')}", DRIFT, title, "seconds of video",
                    unit or "share", x, tuple(series), "results/data/study_drift/table.parquet",
                    result.run_hash[:12], x_log=True,
                )
            )  # fmt: skip
    return made


def _over_time(
    name: str, colour: str, x: Sequence[float], rows: pd.DataFrame, dash: bool
) -> Series:
    held = {row["second"]: row for row in round_significant(rows, DIGITS).to_dict("records")}
    value = tuple(_number(held.get(place), 0) for place in x)
    low = tuple(_number(held.get(place), -1) for place in x)
    high = tuple(_number(held.get(place), 1) for place in x)
    return Series(name, colour, value, low, high, dash)


def _number(row: Mapping[Any, Any] | None, errors: int) -> float | None:
    """The value of a row, so many standard errors away."""
    if row is None or not math.isfinite(row["value"]):
        return None
    away = errors * row["se"] if errors else 0.0
    return float(f"{row['value'] + away:.{DIGITS}g}") if math.isfinite(away) else None


def _colour(student: str) -> str:
    name = LOOKS.get(student, "orange")
    return COLOURS[name] if name else ""


def plain(chart: Chart) -> dict[str, Any]:
    """What the browser draws from."""
    return {
        "xLabel": chart.x_label, "yLabel": chart.y_label, "xLog": chart.x_log, "yLog": chart.y_log,
        "x": chart.x,
        "series": [
            {
                "name": one.name, "colour": one.colour, "dash": one.dash, "values": one.values,
                "low": one.low, "high": one.high,
            }
            for one in chart.series
        ],
    }  # fmt: skip
