"""Table 2's user study: the paper's means as quoted, their overall worked out again, and ratings.

Ratings of one's own come as a CSV (parameter ``ratings``), a row a rater, model and prompt::

    rater,model,prompt,prompt_adherence,temporal_consistency,dynamic_consistency
    ann,dense,a red kite,4,5,4

Their intervals are from resampling raters, not ratings: those of one rater go together.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import vbench_rows
from mla_study.errors import UserError
from mla_study.study.plots import style
from mla_study.study.runs import round_significant
from mla_study.study.tables import Column, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table2_user_study"
TITLE = "User study: mean ratings from 1 to 5"
PROVENANCE = ("paper-quoted", "measured")
DATA = ("results/paper/table2_user_study.csv",)
ROOT = Path(__file__).resolve().parents[1]
ASKED = ("prompt_adherence", "temporal_consistency", "dynamic_consistency")
FORMAT: tuple[str, ...] = ("rater", "model", "prompt", *ASKED)
SHORT = dict(zip(ASKED, ("prompt\nadherence", "temporal\nconsistency", "dynamic\nconsistency"),
                 strict=True))  # fmt: skip
LOWEST, HIGHEST = 1, 5
HALF = 0.005
"""What rounding to two digits can change."""
DRAWS = 1000
COLUMNS = (
    Column("model", "Model"),
    *(Column(name, SHORT[name], ".2f") for name in ASKED),
    Column("overall", "as\nprinted", ".2f", under="Overall"),
    Column("mean", "mean\nof three", ".3f", under="Overall", own=True),
    Column("off", "mean −\nprinted", "+.3f", under="Overall", own=True),
    Column("flag", "", own=True),
)
RATED = (
    Column("model", "Model"),
    *(
        Column(f"{name}{end}", title, ".2f", under=head)
        for name, head in (*((n, SHORT[n].replace("\n", " ")) for n in ASKED), ("mean", "Overall"))
        for end, title in (("", "mean"), ("_low", "low"), ("_high", "high"))
    ),
    Column("raters", "raters"),
    Column("ratings", "ratings"),
)


def INPUTS(ratings: str = "") -> dict[str, Path]:
    """The user's ratings."""
    return {"ratings": ROOT / ratings} if ratings else {}


def quoted(paper: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows with ``mean`` of three, ``off`` from the printed one, and ``flag``."""
    mean = paper[list(ASKED)].mean(axis=1).round(9)
    off = (mean - paper["overall"]).round(9)
    flag = ["beyond its rounding" if abs(value) > HALF else "" for value in off]
    return paper.assign(mean=mean, off=off, flag=flag)


def read_ratings(file: Path) -> pd.DataFrame:
    """Ratings as numbers, checked.

    Raises:
        UserError: it cannot be read, a column is missing, a cell is empty or no number from 1 to
            5, or someone rated a video twice; the line is told.
    """
    rows: list[dict[str, str]] = []
    seen: dict[tuple[str, ...], int] = {}
    for line, cells in _lines(file):
        row: dict[str, str] = dict(zip(FORMAT, cells, strict=True))
        for column in FORMAT[:3]:
            if not row[column]:
                raise UserError(f"{file}, line {line}: {column} is empty: every rating names one")
        for column in ASKED:
            if not _is_rating(row[column]):
                raise UserError(
                    f"{file}, line {line}: {column} is '{row[column]}', but a rating is a number "
                    f"from {LOWEST} to {HIGHEST}"
                )
        key = tuple(cells[:3])
        if key in seen:
            raise UserError(
                f"{file}, line {line}: {key[0]} rated {key[1]} on '{key[2]}' on line {seen[key]} "
                "already: keep one of the two"
            )
        seen[key] = line
        rows.append(row)
    if not rows:
        raise UserError(f"{file} holds no rating: write a line a rater, model and prompt")
    return pd.DataFrame(rows).astype(dict.fromkeys(ASKED, float))


def _lines(file: Path) -> list[tuple[int, list[str]]]:
    """Line number and the cells of :data:`FORMAT`, for each line that is not blank."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text)
            head = [name.strip() for name in next(reader, [])]
            found = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a CSV of ratings ({error})") from None
    for column in FORMAT:
        if column not in head:
            raise UserError(
                f"{file} has no column '{column}': its first line is {','.join(FORMAT)}"
            )
    places = [head.index(column) for column in FORMAT]
    lines: list[tuple[int, list[str]]] = []
    for line, cells in found:
        if not any(cells):
            continue
        if len(cells) != len(head):
            raise UserError(
                f"{file}, line {line} has {len(cells)} cells, but the first line {len(head)}: put "
                "text with commas in double quotes"
            )
        lines.append((line, [cells[place] for place in places]))
    return lines


def _is_rating(text: str) -> bool:
    try:
        return LOWEST <= float(text) <= HIGHEST
    except ValueError:
        return False


def rated(ratings: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """A row a model: each mean with its 95 % interval (NaN of one rater), raters and ratings.

    Args:
        ratings: of :func:`read_ratings`.
    """
    ratings = ratings.assign(mean=ratings[list(ASKED)].mean(axis=1))
    raters = list(dict.fromkeys(ratings["rater"]))
    picked = np.random.default_rng(seed).integers(len(raters), size=(draws, len(raters)))
    rows: list[dict[str, Any]] = []
    for model, mine in ratings.groupby("model", sort=False):
        row: dict[str, Any] = {"model": model, "raters": mine["rater"].nunique()}
        row["ratings"] = len(mine)
        by_rater = mine.groupby("rater")
        counts = by_rater.size().reindex(raters, fill_value=0).to_numpy(float)[picked].sum(axis=1)
        for name in (*ASKED, "mean"):
            sums = by_rater[name].sum().reindex(raters, fill_value=0.0).to_numpy(float)
            row[name] = float(mine[name].mean())
            row[f"{name}_low"] = row[f"{name}_high"] = float("nan")
            if row["raters"] > 1:
                drawn = sums[picked].sum(axis=1)[counts > 0] / counts[counts > 0]
                low, high = np.percentile(drawn, [2.5, 97.5])
                row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def sentence(frame: pd.DataFrame) -> str:
    """What the paper's rows say.

    Args:
        frame: of :func:`quoted`.
    """
    bound = 2 * HALF  # of three means that are rounded, and of the printed one
    within = int((frame["off"].abs() <= bound).sum())
    said = (
        f"Grey italics: paper-quoted. Its overall is the mean of three in {within} of {len(frame)} "
        f"rows, within the {bound:g} that rounding of all four allows"
    )
    odd = [
        f"{row['model']}'s is {abs(row['off']):.3f} off, more than its own rounding of {HALF:g}"
        for row in frame[frame["flag"] != ""].to_dict("records")
    ]
    return "; ".join([said, *odd]) + "."


def draw(out_dir: str, ratings: str = "") -> Figure:
    """Draw and save ``table2_user_study.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
        ratings: CSV of ratings; they make a second table, ``table2_user_study_ratings``.

    Raises:
        UserError: ratings that cannot be read (the line is told).
    """
    source = ROOT / DATA[0]
    table = quoted(pd.read_csv(source))
    ours = vbench_rows.Ours({}, pd.DataFrame(), pd.DataFrame())
    own = rated(read_ratings(ROOT / ratings)) if ratings else None
    none = pd.DataFrame()
    notes = [sentence(table)]
    if own is None:
        notes.append("Ratings of one's own: parameter ratings, a CSV of " + ", ".join(FORMAT) + ".")
    kinds, validity, run_hash = vbench_rows.identity(ID, ours, none, [source])
    with style():
        figure = save_table(
            round_significant(table), Path(out_dir) / ID, COLUMNS, provenance=kinds,
            validity=validity, run_hash=run_hash, title=TITLE, notes=notes,
            quoted_rows=range(len(table)),
        )  # fmt: skip
        if own is not None:
            _, validity, run_hash = vbench_rows.identity(ID, ours, none, files=[ROOT / ratings])
            save_table(
                round_significant(own), Path(out_dir) / f"{ID}_ratings", RATED,
                provenance="measured", validity=validity, run_hash=run_hash,
                title=f"Ratings from {LOWEST} to {HIGHEST}, with 95 % intervals",
                notes=[
                    f"Intervals from {DRAWS} resamples of the raters; a dash: one rater. Neither "
                    "raters nor prompts are the paper's."
                ],
            )  # fmt: skip
    return figure
