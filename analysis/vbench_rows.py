"""What the figures of VBench scores share: which measured rows there are, and their small print.

Measured rows are results of ``mla-study vbench run``: every ``results/data/vbench_*`` folder, and
those that the parameter ``runs`` of a notebook names. Random weights make no row. A stand-in for a
dimension, or one scored on fewer videos than VBench wants, keeps its name and validity wherever it
is shown.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd

from analysis import own_results
from mla_study.errors import UserError, counted
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, SUBSTITUTES
from mla_study.evaluation.vbench.runs.tables import COMPOSITES
from mla_study.study.plots import note_results
from mla_study.study.runs import (
    RUN_FILE,
    Provenance,
    Result,
    Validity,
    file_sha256,
    read_result,
    round_significant,
    run_record,
)
from mla_study.study.tables import Column, rules_between, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDERS = "results/data/vbench_*"
LONG = 10.0
"""Seconds from which a video is a long one; VBench's own protocol is of about five."""
HOW = (
    "Score videos by `mla-study vbench run` with --out results/data/vbench_NAME, or name the "
    "folders of runs by the parameter runs."
)
NEEDED = (
    "model", "scorer", "value", "low", "high", "videos", "prompts", "wanted", "validity", "mode",
    "horizon_s",
)  # fmt: skip
KEYS = ["result", "name", "mode", "horizon_s"]
NAMES = {
    "color": "colour",
    "clip_t": "CLIP-T",
    "clip_f": "CLIP-F",
    "hpsv3": "HPSv3",
    "quality": "Quality",
    "semantic": "Semantic",
    "total": "Total (4:1)",
    "total_mean": "Total (plain mean)",
    "overall_6": "Overall (mean of six)",
}
STAND_INS = {"raft-small": "RAFT-small", "niqe": "NIQE, lower is better", "rife": "RIFE"}
_SHOWN = (
    Column("name", "Model"),
    Column("mode", "Mode"),
    Column("horizon_s", "Length\ns", ".3g"),
    Column("scorer", "Score"),
    Column("value", "Value", ".4f"),
    Column("low", "low", ".4f", under="95 % interval"),
    Column("high", "high", ".4f", under="95 % interval"),
    Column("videos", "Videos", ".0f"),
    Column("prompts", "Prompts", ".0f"),
    Column("wanted", "Videos\nwanted", ".0f"),
    Column("validity", "Validity"),
)


@dataclass(frozen=True)
class Ours:
    """Measured rows of all results.

    Attributes:
        table: the rows of each result's table that may be shown, with ``result`` (its folder's
            name) and ``name`` (the model's, with the folder's where two results have it at one
            length).
        drift: the same of the tables of drift.
    """

    results: Mapping[str, Result]
    table: pd.DataFrame
    drift: pd.DataFrame


def folders(runs: str, root: Path) -> dict[str, Path]:
    """Name -> folder of each result that rows are taken from.

    Args:
        runs: folders with commas between them, beside those of ``results/data``.

    Raises:
        UserError: one of them holds no result.
    """
    found = [file.parent for file in sorted(root.glob(f"{FOLDERS}/{RUN_FILE}"))]
    return own_results.named([*found, *own_results.folders(runs, root, "mla-study vbench run")])


def inputs(runs: str, root: Path) -> dict[str, Path]:
    """The files of those results, as ``INPUTS`` of a figure gives them."""
    return own_results.files(folders(runs, root))


def read(runs: str, root: Path) -> Ours:
    """The rows of all results but those of random weights, which standard error is told of.

    Raises:
        UserError: a folder that is no such result.
    """
    results: dict[str, Result] = {}
    tables: list[pd.DataFrame] = []
    drifts: list[pd.DataFrame] = []
    for name, folder in folders(runs, root).items():
        result = read_result(folder)
        if result.provenance != "measured" or result.validity == "invalid":
            print(
                f"{name} is left out: it is {result.provenance}, {result.validity}",
                file=sys.stderr,
            )
            continue
        table = result.tables.get("table", pd.DataFrame())
        for column in NEEDED:
            if column not in table.columns:
                raise UserError(
                    f"{folder} is no result of `mla-study vbench run`: its table has no column "
                    f"'{column}'"
                )
        results[name] = result
        kept = table[(table["validity"] != "invalid") & np.isfinite(table["value"].astype(float))]
        tables.append(kept.assign(result=name))
        if "drift" in result.tables and len(result.tables["drift"]):
            drifts.append(result.tables["drift"].assign(result=name))
    if not tables:
        empty = pd.DataFrame(columns=[*NEEDED, "result", "name"])
        return Ours({}, empty, pd.DataFrame())
    table = pd.concat(tables, ignore_index=True)
    drift = pd.concat(drifts, ignore_index=True) if drifts else pd.DataFrame()
    names = _names(table)
    table["name"] = _named(table, names)
    if not drift.empty:
        drift["name"] = _named(drift, names)
    return Ours(results, table, drift)


def _names(table: pd.DataFrame) -> dict[tuple[str, str], str]:
    """(result, model) -> name, the folder told where another result has the like of it."""
    likes = table[["result", "model", "mode", "horizon_s"]].drop_duplicates()
    shared = likes.duplicated(["model", "mode", "horizon_s"], keep=False)
    names: dict[tuple[str, str], str] = {}
    for row, other in zip(likes.to_dict("records"), shared, strict=True):
        result, model = str(row["result"]), str(row["model"])
        name = f"{model} ({result})" if model and other else model or result
        names[result, model] = name
    return names


def _named(frame: pd.DataFrame, names: Mapping[tuple[str, str], str]) -> list[str]:
    pairs = zip(frame["result"], frame["model"], strict=True)
    return [names.get((str(result), str(model)), str(model)) for result, model in pairs]


def wide(table: pd.DataFrame, scorers: Sequence[str]) -> pd.DataFrame:
    """A row a model and length that has any of the scorers.

    Returns:
        :data:`KEYS`; for each scorer its value, ``_low`` and ``_high`` (NaN where not measured);
        ``videos`` and ``prompts`` (the most of a scorer), ``validity`` (the worst) and ``scored``
        (how many).
    """
    parts = [f"{scorer}{end}" for scorer in scorers for end in ("", "_low", "_high")]
    made: list[dict[str, Any]] = []
    for key, mine in table[table["scorer"].isin(list(scorers))].groupby(
        KEYS, sort=False, dropna=False
    ):
        row = dict(zip(KEYS, key, strict=True)) | dict.fromkeys(parts, float("nan"))
        for held in mine.to_dict("records"):
            for end, column in (("", "value"), ("_low", "low"), ("_high", "high")):
                row[f"{held['scorer']}{end}"] = float(held[column])
        # a composite's are the sum of its parts'
        own = mine[~mine["scorer"].isin(list(COMPOSITES))]
        own = own if len(own) else mine
        row |= {"videos": own["videos"].max(), "prompts": own["prompts"].max()}
        row |= {"validity": worst(mine["validity"]), "scored": len(mine)}
        made.append(row)
    columns = [*KEYS, *parts, "videos", "prompts", "validity", "scored"]
    return pd.DataFrame(made, columns=columns)


def worst(validities: Iterable[str]) -> Validity:
    """The least of them; ``full`` of none."""
    order: tuple[Validity, ...] = get_args(Validity)
    return order[max((order.index(v) for v in validities if v in order), default=0)]


def told(scorer: str) -> str:
    """A scorer's name for people, a stand-in told as one.

    >>> told("dynamic_degree[raft-small]")
    'dynamic degree, stand-in RAFT-small'
    """
    base, _, inner = scorer.rstrip("]").partition("[")
    name = NAMES.get(base, base.replace("_", " "))
    return f"{name}, stand-in {STAND_INS.get(inner, inner)}" if inner else name


def is_stand_in(scorer: str) -> bool:
    """Whether it stands in for a dimension."""
    return scorer in SUBSTITUTES or "[" in scorer


def identity(
    figure: str, ours: Ours, shown: pd.DataFrame, papers: Iterable[Path] = (),
    more: Mapping[str, Any] | None = None, files: Iterable[Path] = (),
) -> tuple[tuple[Provenance, ...], Validity, str]:  # fmt: skip
    """Classes, validity and run hash of a figure; the results that are drawn are noted.

    Args:
        shown: the measured rows that are drawn, with ``result`` and ``validity``.
        papers: files of quoted values.
        more: settings that change the figure.
        files: further measured input.
    """
    papers, files = list(papers), list(files)
    drawn = list(dict.fromkeys(shown["result"])) if len(shown) else []
    note_results(ours.results[name].folder for name in drawn)
    validity = worst(shown["validity"]) if len(shown) else "full"
    quoted: tuple[Provenance, ...] = ("paper-quoted",) if papers else ()
    kinds: tuple[Provenance, ...] = (*quoted, *(("measured",) if drawn or files else ()))
    run = run_record(
        config={"figure": figure, **(more or {})},
        inputs={name: ours.results[name].run_hash for name in drawn}
        | {file.name: file_sha256(file) for file in [*papers, *files]},
        seed=None,
        modules=(f"analysis.{figure}",),
        provenance=kinds[-1],
        validity=validity,
    )
    return kinds, validity, run["run_hash"]


def save_measured(
    figure: str, out_dir: str, ours: Ours, rows: pd.DataFrame, title: str
) -> Figure | None:
    """All measured rows of one kind as a table ``{figure}_measured``, a row a score.

    Returns:
        None where there are no rows: nothing is written then.
    """
    if rows.empty:
        return None
    place = {name: i for i, name in enumerate([*DIMENSIONS, *SUBSTITUTES])}
    order = [place.get(scorer, len(place)) for scorer in rows["scorer"]]
    rows = rows.assign(order=order, group=_group(rows))
    rows = rows.sort_values(["horizon_s", "group", "order"], kind="stable")
    rows["scorer"] = [told(scorer) for scorer in rows["scorer"]]
    _, validity, run_hash = identity(figure, ours, rows)
    rules = rules_between(rows, "group")
    rows["name"] = rows["name"].where(~rows["group"].duplicated(), "")
    notes = [
        "Intervals by resampling prompts. A stand-in needs no file of VBench's and has a scale of "
        "its own: it enters no Quality, Semantic, Total or Overall. Partial: fewer videos than "
        "VBench's protocol wants.",
    ]
    return save_table(
        round_significant(rows), Path(out_dir) / f"{figure}_measured", _SHOWN,
        provenance="measured", validity=validity, run_hash=run_hash, title=title, notes=notes,
        rule_before=rules,
    )  # fmt: skip


def within(values: Iterable[float]) -> str:
    """The largest size, rounded up to three digits, for a sentence that says "within".

    >>> within([0.0061, -0.0065])
    '0.007'
    """
    most = max(abs(float(value)) for value in values)
    return f"{math.ceil(round(1000 * most, 6)) / 1000:.3f}"


def _group(rows: pd.DataFrame) -> pd.Series[str]:
    return rows["name"] + rows["mode"] + rows["horizon_s"].astype(str)


def about(row: Mapping[Any, Any], usual: str = "") -> str:
    """What a row of :func:`wide` rests on: its mode and number of videos, and its validity.

    Full says of a short run that it has all videos of VBench's protocol, of others only that all
    videos that were given are scored: these are told by their number instead.

    Args:
        usual: the mode that goes without saying; of full short runs then the number does too.

    >>> about({"mode": "custom", "videos": 4, "validity": "full"})
    'custom, 4 videos'
    """
    if row["mode"] == usual == "short" and row["validity"] == "full":
        return ""
    held = row["videos"]
    parts = [] if row["mode"] == usual else [str(row["mode"])]
    parts += [] if pd.isna(held) else [counted(int(held), "video")]
    whole = row["validity"] == "full"
    parts += [str(row["validity"])] * (not whole or row["mode"] == "short")
    return ", ".join(parts)


def titled(rows: pd.DataFrame, mode: str) -> list[str]:
    """Names of rows of :func:`wide`, with what they rest on as far as that is not the usual.

    Args:
        mode: the usual one.
    """
    told = [(str(row["name"]), about(row, mode)) for row in rows.to_dict("records")]
    return [f"{name} ({what})" if what else name for name, what in told]


def ordinal(rank: int) -> str:
    """1st, 2nd, 3rd, 4th.

    >>> [ordinal(n) for n in (1, 2, 3, 11, 22)]
    ['1st', '2nd', '3rd', '11th', '22nd']
    """
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{rank}{'th' if rank % 100 in (11, 12, 13) else ends.get(rank % 10, 'th')}"
