"""What the miniature study settles: each question with its numbers, intervals and verdicts.

Every verdict is computed from its row's interval (see :mod:`analysis.intervals`): 95 %,
differences paired by seed (Student's t), rank correlations by bootstrap over configurations, beside
that of d_c itself, which knows no spectrum. A verdict that the interval does not carry is
``not settled``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import miniature
from analysis.intervals import (
    LEAST,
    OPEN,
    Verdict,
    beyond_size,
    breaks,
    cost,
    predicts,
    sign,
)
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
Row = dict[str, Any]
Tables = Mapping[str, pd.DataFrame]


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
    """All correct and IoU against dense at each size and split, and where each breaks first."""
    for question, column in (("size", "d_c"), ("split", "d_rope")):
        for metric in ("all_correct", "iou"):
            shown = miniature.usual(score_rows(scores, metric), None, None)
            dense, latent = shown[shown["variant"] == "dense"], shown[shown["init"] == "activation"]
            kept = latent["d_rope"] == miniature.D_ROPE
            if column == "d_rope":
                kept = latent["d_c"] == miniature.D_C
            yield from _breaks_by(question, column, metric, latent[kept], dense)


def _breaks_by(
    question: str, column: str, metric: str, part: pd.DataFrame, dense: pd.DataFrame
) -> Iterator[Row]:
    found: dict[str, list[int]] = {"breaks": [], OPEN: [], "holds": []}
    for size, mine in part.groupby(column):
        number = int(size)  # type: ignore[arg-type]
        told = f"$d_c$ = {number}" if column == "d_c" else f"{miniature.HEAD - number}/{number}"
        for row in _compare(question, f"{_told(metric)} − dense's, {told}", mine, dense, breaks):
            found[row["verdict"]].append(number)
            yield row
    if part.empty:
        return
    where = "; ".join(
        f"{verdict}: {', '.join(map(str, sizes))}" for verdict, sizes in found.items() if sizes
    )
    name, nan = "sizes" if column == "d_c" else "rotary channels", float("nan")
    yield _row(
        question, f"{name} where {_told(metric)} falls by > {MARGIN:g}", len(found["breaks"]),
        nan, nan, part[column].nunique(), where,
    )  # fmt: skip


def predict_rows(tables: Tables) -> Iterator[Row]:
    """Rank correlations of predicted losses, what they have more than d_c's own, and the error's
    more than the rank's."""
    names = ("ranks", "spectra", "conversion", "curves", "scores")
    runs = prediction.predicted(*(tables[name] for name in names))
    found = prediction.correlations(runs)
    rows = found[found["scope"] == "all"].to_dict("records")
    for row in rows:
        quantity = f"ρ({prediction.PREDICTORS[row['predictor']]}, {_told(row['quality'])})"
        verdict = predicts(prediction.EXPECTED[row["quality"]])(row["low"], row["high"])
        if row["predictor"] != prediction.NULL:
            verdict = beyond_size(verdict, row["gain"], row["gain_low"])
        yield _row(
            "predicts", quantity, row["rho"], row["low"], row["high"], row["configs"], verdict
        )
    for row in rows:
        told = {"rank_loss": "weight $r_{.99}$", "error": "output error"}.get(row["predictor"])
        if told is not None:
            low, high = row["gain_low"], row["gain_high"]
            yield _row(
                "predicts", f"gain in ρ, {_told(row['quality'])}: {told} over $d_c$ itself",
                row["gain"], low, high, row["configs"],
                sign("$d_c$ predicts better", f"{told} predicts better")(low, high),
            )  # fmt: skip
    if not rows:
        return
    for quality, expected in prediction.EXPECTED.items():
        held = runs.dropna(subset=["rank_loss", "error", quality])
        reached, groups = held[quality].to_numpy(float), list(held["config"])
        (first, one), (second, two) = (
            miniature.spearman(held[name].to_numpy(float), reached, groups)
            for name in ("error", "rank_loss")
        )
        low, high = miniature.percentiles(expected * (one - two))
        yield _row(
            "predicts", f"gain in ρ, {_told(quality)}: output error over weight $r_{{.99}}$",
            expected * (first - second), low, high, held["config"].nunique(),
            sign("weight rank predicts better", "output error predicts better")(low, high),
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
    shown = score_rows(results["scores"].table, "all_correct")
    ceiling = of_student(shown, "dense")["value"].mean()
    notes = [
        f"Miniature at $d_c$ = {miniature.D_C} of {miniature.WIDTH}, split "
        f"{miniature.HEAD - miniature.D_ROPE}/{miniature.D_ROPE}, where no other is named; all "
        "correct and IoU after DMD; $r_{.99}$ of the composed weights, interpolated, median of "
        "layers. n: seeds, of correlations configurations, of what breaks the sizes that were "
        f"tried. Verdicts follow from the intervals; breaking and costs are against {MARGIN:g}.",
        f"All correct of the dense student is {ceiling:.3f}: it cannot show what is lost short of "
        "a wrong word, hence IoU beside it. Gain in ρ: in the direction in which a predicted loss "
        "should point; $d_c$ itself knows no spectrum.",
    ]
    with style():
        return save_table(
            table, Path(out_dir) / ID, COLUMNS, provenance=PROVENANCE, validity=validity,
            run_hash=run_hash, title=TITLE, notes=notes,
            rule_before=np.flatnonzero(first)[1:].tolist(),
        )  # fmt: skip
