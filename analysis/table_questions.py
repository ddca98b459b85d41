"""What the miniature study settles: each question with its numbers, intervals and verdicts.

Every verdict is computed from its row's interval (see :func:`sign`, :func:`cost`,
:func:`predicts`): 95 %, differences paired by seed (Student's t), rank correlations by bootstrap
over configurations. A verdict that the interval does not carry is ``not settled``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import miniature
from analysis.miniature import INITS, MARGIN, of_student, score_rows
from mla_study.errors import UserError
from mla_study.miniature import prediction
from mla_study.study.plots import style
from mla_study.study.runs import round_significant
from mla_study.study.tables import Column, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table_questions"
TITLE = "What the miniature study settles"
PROVENANCE = ("measured", "null-model")
DATA = (
    "results/data/study_ranks",
    "results/data/study_spectra",
    "results/data/study_conversion",
    "results/data/study_curves",
    "results/data/study_scores",
)
ROOT = Path(__file__).resolve().parents[1]
LEAST = 1e-6
"""What is nearer to 0 is rounding: the tables keep shares, losses and IoU to seven digits."""
COLUMNS = (
    Column("question", "Question"),
    Column("quantity", "Quantity"),
    Column("value", "value", ".3g", least=LEAST),
    Column("low", "from", ".3g", under="95 % interval", least=LEAST),
    Column("high", "to", ".3g", under="95 % interval", least=LEAST),
    Column("count", "n"),
    Column("verdict", "Verdict"),
)
QUESTIONS = {
    "rank": "Does training preserve rank more than doing nothing?",
    "steps": "Spectral init: steps to equal loss",
    "catch up": "Does random catch up?",
    "activation": "Does activation-aware init beat the others?",
    "size": "Where does quality break against $d_c$?",
    "split": "Where does quality break against the split?",
    "predicts": "Does the spectrum predict it?",
    "rollout": "What do clean pass, int8 and windows cost?",
}
OPEN = "not settled"
Row = dict[str, Any]
Verdict = Callable[[float, float], str]
Tables = Mapping[str, pd.DataFrame]


def sign(less: str, more: str, same: str = "not told apart") -> Verdict:
    """Verdict of a difference: below zero, above it, or an interval with zero in it."""

    def verdict(low: float, high: float) -> str:
        if not np.isfinite([low, high]).all():
            return OPEN
        return more if low > 0 else less if high < 0 else same

    return verdict


def cost(low: float, high: float) -> str:
    """Verdict of a difference of shares or IoU from a reference, with the margin :data:`MARGIN`."""
    if not np.isfinite([low, high]).all():
        return OPEN
    if low > 0:
        return "gains"
    if high < -MARGIN:
        return f"costs more than {MARGIN:g}"
    if low > -MARGIN:
        return f"costs less than {MARGIN:g}" if high < 0 else f"no cost of {MARGIN:g}"
    return "costs" if high < 0 else OPEN


def breaks(low: float, high: float) -> str:
    """Verdict of a difference from the dense student: is it beyond :data:`MARGIN`?"""
    if not np.isfinite([low, high]).all():
        return OPEN
    return "breaks" if high < -MARGIN else "holds" if low > -MARGIN else OPEN


def predicts(expected: int) -> Verdict:
    """Verdict of a rank correlation whose sign should be ``expected``."""

    def verdict(low: float, high: float) -> str:
        if not np.isfinite([low, high]).all():
            return "the same for all"
        low, high = sorted((expected * low, expected * high))
        return "predicts" if low > 0 else "predicts the reverse" if high < 0 else "does not predict"

    return verdict


def _compare(
    question: str, quantity: str, first: pd.DataFrame, second: pd.DataFrame, verdict: Verdict
) -> Iterator[Row]:
    """A row of first - second, none where no seed has both."""
    try:
        value, low, high, count = miniature.paired(first, second)
    except UserError:
        return
    yield _row(question, quantity, value, low, high, count, verdict(low, high))


def _row(
    question: str, quantity: str, value: float, low: float, high: float, count: int, verdict: str
) -> Row:
    return {
        "question": QUESTIONS[question], "quantity": quantity, "value": value, "low": low,
        "high": high, "count": count, "verdict": verdict,
    }  # fmt: skip


def rank_rows(ranks: pd.DataFrame) -> Iterator[Row]:
    """r_.99 after all stages against the start, an untrained model and a Gaussian product."""
    keep = (ranks["operator"] == "composed") & (ranks["gauge"] == "raw")
    rows = ranks[keep & (ranks["metric"] == "r_0.99_interp")]
    verdict = sign("less", "more", "no more")
    for init in INITS:
        mine = of_student(rows, init)
        if mine.empty:
            continue
        ends = [mine["step"].min(), mine["step"].max()]
        points = [mine[mine["step"] == end] for end in ends]
        start, last = (p.groupby("seed")["value"].median().reset_index() for p in points)
        yield from _compare("rank", f"$r_{{.99}}$, {init}: trained − start", last, start, verdict)
        for null, told in (("untrained", "untrained"), ("gaussian_product", "Gaussian product")):
            beside = points[1][points[1]["null"] == null]
            value = beside.groupby("seed")["null_value"].median().rename("value").reset_index()
            quantity = f"$r_{{.99}}$, {init}: trained − {told}"
            yield from _compare("rank", quantity, last, value, verdict)


def step_rows(curves: pd.DataFrame) -> Iterator[Row]:
    """Steps of each init to the loss that random ends teacher forcing with."""
    rows = curves[(curves["name"] == "held_out") & (curves["stage"] == "tf")]
    ends = of_student(miniature.held_out(curves), "random").set_index("seed")
    for init in ("spectral", "activation"):
        mine = of_student(rows, init)
        saved = [
            {"seed": seed, "value": miniature.steps_to(c, float(ends["value"][seed]))}
            for seed, c in mine.groupby("seed")
            if seed in ends.index
        ]
        if not saved:
            continue
        needed = pd.DataFrame(saved)
        whole = ends["step"].rename("value").reset_index()
        yield from _compare(
            "steps", f"{init} to random's last loss − random's own", needed, whole,
            sign("fewer", "more"),
        )  # fmt: skip
        share = needed.assign(value=needed["value"] / needed["seed"].map(ends["step"]))
        value, low, high = miniature.interval(share["value"].dropna().to_numpy(float))
        below = sign("fewer", "more")(low - 1, high - 1)
        yield _row("steps", f"{init}: share of random's steps", value, low, high, len(share), below)


def catch_up_rows(curves: pd.DataFrame, scores: pd.DataFrame) -> Iterator[Row]:
    """Random against spectral at equal steps, and after many more."""
    lost = miniature.held_out(curves)
    shown = score_rows(scores, "all_correct")
    behind = sign("passes", "stays behind", "not told apart")
    spectral = of_student(lost, "spectral")
    for name in ("random", miniature.LONG):
        mine = of_student(lost, name)
        if mine.empty:
            continue
        told = f"{name} ({int(mine['step'].max())} steps) − spectral"
        yield from _compare("catch up", f"TF loss, {told}", mine, spectral, behind)
        yield from _compare(
            "catch up", f"all correct, {told}", of_student(shown, name),
            of_student(shown, "spectral"),
            sign("stays behind", "passes", "not told apart"),
        )  # fmt: skip
    rows = curves[(curves["name"] == "held_out") & (curves["stage"] == "tf")]
    long, ends = of_student(rows, miniature.LONG), spectral.set_index("seed")["value"]
    reached = [
        miniature.steps_to(mine, float(ends[seed]))
        for seed, mine in long.groupby("seed")
        if seed in ends.index
    ]
    if reached:
        values = np.array(reached)
        got = int(np.isfinite(values).sum())
        value, low, high = miniature.interval(values) if got == len(values) else (float("nan"),) * 3
        verdict = f"{got} of {len(values)} seeds get there"
        yield _row(
            "catch up", "random's steps to spectral's last loss", value, low, high, len(values),
            verdict,
        )  # fmt: skip


def activation_rows(curves: pd.DataFrame, scores: pd.DataFrame) -> Iterator[Row]:
    """The activation-aware student against the other inits and the dense one."""
    lost = miniature.held_out(curves)
    for other in ("spectral", "spectral-raw", "random"):
        yield from _compare(
            "activation", f"TF loss − {other}'s", of_student(lost, "activation"),
            of_student(lost, other),
            sign("better", "worse"),
        )  # fmt: skip
        for metric in ("all_correct", "iou"):
            shown = score_rows(scores, metric)
            yield from _compare(
                "activation", f"{_told(metric)} − {other}'s", of_student(shown, "activation"),
                of_student(shown, other), sign("worse", "better"),
            )  # fmt: skip
    for metric in ("all_correct", "iou"):
        shown = score_rows(scores, metric)
        yield from _compare(
            "activation", f"{_told(metric)} − dense's", of_student(shown, "activation"),
            of_student(shown, "dense"), cost,
        )  # fmt: skip


def break_rows(scores: pd.DataFrame) -> Iterator[Row]:
    """All correct against dense at each size and split, and where it breaks first."""
    shown = miniature.usual(score_rows(scores, "all_correct"), None, None)
    dense, latent = shown[shown["variant"] == "dense"], shown[shown["init"] == "activation"]
    parts = (
        ("size", "d_c", latent[latent["d_rope"] == miniature.D_ROPE]),
        ("split", "d_rope", latent[latent["d_c"] == miniature.D_C]),
    )
    for question, column, part in parts:
        found: dict[str, list[int]] = {"breaks": [], OPEN: [], "holds": []}
        for size, mine in part.groupby(column):
            number = int(size)  # type: ignore[arg-type]
            told = f"$d_c$ = {number}" if column == "d_c" else f"{miniature.HEAD - number}/{number}"
            for row in _compare(question, f"all correct − dense's, {told}", mine, dense, breaks):
                found[row["verdict"]].append(number)
                yield row
        if part.empty:
            continue
        where = "; ".join(
            f"{verdict} at {', '.join(map(str, sizes))}"
            for verdict, sizes in found.items()
            if sizes
        )
        name = "sizes" if column == "d_c" else "rotary channels of 32"
        nan = float("nan")
        yield _row(
            question, f"{name} that break", len(found["breaks"]), nan, nan,
            part[column].nunique(), where,
        )  # fmt: skip


def predict_rows(tables: Tables) -> Iterator[Row]:
    """Rank correlations of predicted losses, and which of two predictors has the larger one."""
    names = ("ranks", "spectra", "conversion", "curves", "scores")
    runs = prediction.predicted(*(tables[name] for name in names))
    for row in prediction.correlations(runs).to_dict("records"):
        if row["scope"] != "all":
            continue
        expected = 1 if row["quality"] == "held_out" else -1
        quantity = f"ρ({prediction.PREDICTORS[row['predictor']]}, {_told(row['quality'])})"
        yield _row(
            "predicts", quantity, row["rho"], row["low"], row["high"], row["configs"],
            predicts(expected)(row["low"], row["high"]),
        )  # fmt: skip
    if runs["config"].nunique() < 3:
        return
    for better, told in (("output_loss", "weighted E($d_c$)"), ("error", "output error")):
        for quality in ("held_out", "all_correct"):
            held = runs.dropna(subset=["rank_loss", better, quality])
            found = [
                miniature.spearman(
                    held[name].to_numpy(float), held[quality].to_numpy(float), list(held["config"])
                )
                for name in (better, "rank_loss")
            ]
            (first, one), (second, two) = found
            low, high = miniature.percentiles(np.abs(one) - np.abs(two))
            yield _row(
                "predicts", f"|ρ| with {_told(quality)}: {told} − weight $r_{{.99}}$",
                abs(first) - abs(second), low, high, held["config"].nunique(),
                sign("weight rank predicts better", f"{told} predicts better")(low, high),
            )  # fmt: skip


def rollout_rows(scores: pd.DataFrame) -> Iterator[Row]:
    """Each way of rolling out against the trained one at 10x, and 10x against 1x."""
    for student in ("activation", "dense"):
        iou = score_rows(scores, "iou")
        late = score_rows(scores, "iou", clips=10, scope="last")
        yield from _compare(
            "rollout", f"{student}: IoU, last of 10x − 1x", of_student(late, student),
            of_student(iou, student), cost,
        )  # fmt: skip
        conditions = [c for c in dict.fromkeys(scores["condition"]) if not c.startswith("plain")]
        for condition in conditions:
            for metric in ("iou", "all_correct"):
                plain, other = (
                    score_rows(scores, metric, clips=10, scope="all", condition=name)
                    for name in ("plain", condition)
                )
                yield from _compare(
                    "rollout", f"{student}, {condition}: {_told(metric)}, 10x",
                    of_student(other, student), of_student(plain, student), cost,
                )  # fmt: skip


def _told(metric: str) -> str:
    return {"iou": "IoU", "all_correct": "all correct", "held_out": "TF loss"}[metric]


def answers(tables: Tables) -> pd.DataFrame:
    """The table, a row a quantity; what a smaller study lacks is left out.

    Args:
        tables: the study's, by name.
    """
    curves, scores = tables["curves"], tables["scores"]
    rows = [
        *rank_rows(tables["ranks"]),
        *step_rows(curves),
        *catch_up_rows(curves, scores),
        *activation_rows(curves, scores),
        *break_rows(scores),
        *predict_rows(tables),
        *rollout_rows(scores),
    ]
    return round_significant(pd.DataFrame(rows, columns=[c.name for c in COLUMNS]))


def draw(out_dir: str) -> Figure:
    """Draw and save ``table_questions.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
    """
    names = [Path(name).name.removeprefix("study_") for name in DATA]
    results = {name: miniature.read(name, ROOT) for name in names}
    table = answers({name: result.table for name, result in results.items()})
    validity, run_hash = miniature.drawn_from(ID, list(results.values()))
    first = ~table["question"].duplicated()
    notes = [
        f"Miniature at $d_c$ = {miniature.D_C} of {miniature.WIDTH}, split "
        f"{miniature.HEAD - miniature.D_ROPE}/{miniature.D_ROPE}, where no other is named; all "
        "correct and IoU after DMD; $r_{.99}$ of the composed weights, interpolated, median of "
        "layers. n: seeds, of correlations configurations, of what breaks the sizes that were "
        f"tried. Verdicts follow from the intervals; breaking and costs are against {MARGIN:g}.",
    ]
    with style():
        return save_table(
            table, Path(out_dir) / ID, COLUMNS, provenance=PROVENANCE, validity=validity,
            run_hash=run_hash, title=TITLE, notes=notes,
            rule_before=np.flatnonzero(first)[1:].tolist(),
        )  # fmt: skip
