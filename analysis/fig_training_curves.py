"""Held-out loss along training by init, and the steps that each init needs to equal losses.

(a) teacher forcing on a logarithmic axis, the random init once more with six times the steps; (b)
all stages (after the first the loss is none that is trained); (c) steps to fixed losses, arrows
where some seed does not get there in its steps. Lines are means over seeds, bands ranges. Written
beside it: ``fig_training_curves_steps``, the numbers of (c).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import miniature
from mla_study.study.plots import PAGE_WIDTH, save_figure, stamp, style
from mla_study.study.runs import round_significant
from mla_study.study.tables import Column, save_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig_training_curves"
TITLE = "Held-out loss of the miniature along training, and steps to equal loss, by init"
PROVENANCE = ("measured",)
DATA = ("results/data/study_curves",)
ROOT = Path(__file__).resolve().parents[1]
LEVELS = 6


def losses(curves: pd.DataFrame) -> pd.DataFrame:
    """Held-out losses of dense and default latent students, named in ``student``, long run too."""
    long = curves[miniature.is_long(curves)]
    rows = pd.concat([miniature.usual(curves), long])
    rows = rows[(rows["name"] == "held_out") & (rows["init"] != "untrained")]
    # a stage's last point is the next one's first
    return rows.assign(student=miniature.student(rows))


def levels(rows: pd.DataFrame) -> np.ndarray:
    """Losses, falling, two digits: from the worst first one to the best last one, evenly in log."""
    tf = rows[(rows["stage"] == "tf") & (rows["variant"] == "latent")].sort_values("step")
    ends = tf.groupby("run")["value"].agg(["first", "last"])
    high, low = float(ends["first"].max()), float(ends["last"].min())
    return np.unique(round_significant(np.geomspace(high, low, LEVELS + 2)[1:-1], 2))[::-1]


def steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Teacher-forcing steps to each level by student, means over seeds.

    Returns:
        columns ``student, level, value, se, low, high, seeds, of``; of ``of`` seeds ``seeds`` get
        there, and ``value`` is NaN unless all do.
    """
    tf = rows[rows["stage"] == "tf"]
    made: list[dict[str, Any]] = []
    for (student, seed), mine in tf.groupby(["student", "seed"], sort=False):
        made += [
            {"student": student, "seed": seed, "level": level,
             "value": miniature.steps_to(mine, level)} for level in levels(rows)
        ]  # fmt: skip
    each = pd.DataFrame(made)
    found = miniature.over_seeds(each, ["student", "level"])
    counts = each.groupby(["student", "level"], sort=False)["seed"].nunique().rename("of")
    found = counts.reset_index().merge(found, how="left", on=["student", "level"])
    found["seeds"] = found["seeds"].fillna(0).astype(int)
    columns = ["value", "se", "low", "high"]
    found[columns] = found[columns].where(found["seeds"] == found["of"])
    return found


def draw(out_dir: str) -> Figure:
    """Draw and save ``fig_training_curves.{pdf,png,svg}`` and ``fig_training_curves_steps.*``.

    Args:
        out_dir: where the files go.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    result = miniature.read("curves", ROOT)
    rows = losses(result.table)
    found = steps(rows)
    validity, run_hash = miniature.drawn_from(ID, [result])
    seeds = rows["seed"].nunique()
    with style():
        figure, (first, whole, need) = plt.subplots(1, 3, figsize=(PAGE_WIDTH, 2.8))
        tf = rows[rows["stage"] == "tf"]
        _curves(first, tf)
        first.set_xscale("symlog", linthresh=10)
        ticks = [0, 10, 100, *([1000] if tf["step"].max() >= 1000 else [])]
        first.set_xticks(ticks, [str(tick) for tick in ticks])
        first.set_xlim(left=0)
        usual = rows[rows["student"] != miniature.LONG]
        miniature.stage_marks(whole, usual)
        _curves(whole, usual)
        for axis in (first, whole):
            axis.set_xlabel("training step of the miniature")
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        first.set_ylabel("held-out flow-matching loss")
        _steps(need, found)
        first.set_title("(a) teacher forcing", pad=10)
        whole.set_title("(b) all stages", pad=10)
        need.set_title("(c) steps to equal loss", pad=10)
        figure.suptitle(
            f"Miniature, $d_c$ = {miniature.D_C} of {miniature.WIDTH}: mean and range of {seeds} "
            "seeds, 64 held-out clips each",
            fontsize=7,
        )
        _legend(figure, list(dict.fromkeys(rows["student"])))
        stamp(figure, PROVENANCE, validity, run_hash)
        save_figure(figure, Path(out_dir) / ID)
        _table(found, Path(out_dir), validity, run_hash)
    return figure


def _look(student: str) -> tuple[str, str, str]:
    colour, marker = miniature.LOOKS[student.removesuffix(", long")]
    return colour, marker, "--" if student == miniature.LONG else "-"


def _curves(axis: Axes, rows: pd.DataFrame) -> None:
    rows = rows.drop_duplicates(["run", "step"])
    found = miniature.over_seeds(rows, ["student", "step"]).sort_values("step")
    for student, mine in found.groupby("student", sort=False):
        colour, marker, dash = _look(str(student))
        axis.plot(mine["step"], mine["value"], dash, color=colour, marker=marker, ms=2, lw=0.9)
        axis.fill_between(mine["step"], mine["low"], mine["high"], color=colour, alpha=0.2, lw=0)


def _steps(axis: Axes, found: pd.DataFrame) -> None:
    top = 2 * float(np.nanmax([*found["high"], 10]))
    for student, mine in found.groupby("student", sort=False):
        colour, marker, dash = _look(str(student))
        bars = np.stack([mine["value"] - mine["low"], mine["high"] - mine["value"]]).clip(0)
        axis.errorbar(
            mine["level"], mine["value"], bars, color=colour, marker=marker, ls=dash, ms=2.5,
            lw=0.9, elinewidth=0.6,
        )  # fmt: skip
        never = mine[mine["value"].isna()]
        spread = 1.06 ** list(miniature.LOOKS).index(str(student).removesuffix(", long"))
        axis.plot(
            never["level"] * spread, [top] * len(never), ls="", marker=r"$\uparrow$", ms=5,
            color=colour, mew=0.2,
        )  # fmt: skip
    # logarithmic from 1 on; where an init starts below a level it needs 0 steps
    axis.set(xscale="log", xlabel="held-out loss (falling)")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylabel("training steps needed")
    axis.set_ylim(-0.3, 1.6 * top)
    axis.invert_xaxis()
    marks = sorted(set(found["level"]))
    axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axis.minorticks_off()


def _legend(figure: Figure, students: list[str]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=c, marker=m, ls=d, ms=2.5, label=s)
        for s in students
        for c, m, d in [_look(s)]
    ]
    marks.append(
        Line2D([], [], color="0.3", ls="", marker=r"$\uparrow$", ms=5, mew=0.2,
               label="not reached by every seed")
    )  # fmt: skip
    figure.legend(handles=marks, loc="outside lower left", ncols=7, fontsize=5.5)


def _table(found: pd.DataFrame, out_dir: Path, validity: object, run_hash: str) -> None:
    students = list(dict.fromkeys(found["student"]))
    wide = found.pivot_table(
        index="level", columns="student", values=["value", "se"], dropna=False, sort=False
    )
    frame = pd.DataFrame({"level": wide.index})
    columns = [Column("level", "loss", ".2g")]
    for student in students:
        for name, head in (("value", "steps"), ("se", "±")):
            label = student if name == "value" else f"{student}_se"
            frame[label] = wide[name][student].to_numpy()
            columns.append(Column(label, head, ".0f", under=student))
    save_table(
        frame, out_dir / f"{ID}_steps", columns, provenance=PROVENANCE, validity=validity,  # type: ignore[arg-type]
        run_hash=run_hash, title="Teacher-forcing steps of the miniature to a held-out loss",
        notes=["Means over seeds with their standard error; a dash: not every seed gets there."],
    )  # fmt: skip
