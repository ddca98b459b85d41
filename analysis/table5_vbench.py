"""Tables 5a and 5b: which Total. VBench's own weighs Quality four times Semantic.

What the paper calls Total is the plain mean of the two; VBench's is (4 Quality + Semantic) / 5.
Both stand beside each other for the paper's rows, for ten rows of the public leaderboard and for
measured rows, with the rank by each among the rows of one source. A second figure draws the Total
against the share of Quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import vbench_rows
from mla_study.evaluation.vbench.dimensions import DIMENSIONS
from mla_study.evaluation.vbench.scores import composites, total_of, weighted_total
from mla_study.study.plots import COLOURS, PAGE_WIDTH, save_figure, stamp, style
from mla_study.study.runs import round_significant
from mla_study.study.tables import Column, rules_between, save_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "table5_vbench"
TITLE = "Two totals of VBench: the plain mean of Semantic and Quality, and VBench's own 4:1"
PROVENANCE = ("paper-quoted", "measured")
DATA = (
    "results/paper/table5a_latent_dim.csv",
    "results/paper/table5b_nope_rope_split.csv",
    "results/paper/vbench_leaderboard.csv",
)
ROOT = Path(__file__).resolve().parents[1]
SHARES = {"plain": 0.5, "own": 0.8}
"""Share of Quality in the paper's Total and in VBench's."""
PAPER, BOARD, OURS = "paper, Tables 5a and 5b", "VBench leaderboard", "measured"
PAPER_DEFAULT = (96, 32)
TOTAL, RANK = "Total", "rank by Total"
COLUMNS = (
    Column("group", "Rows of"),
    Column("model", "Model"),
    Column("semantic", "Semantic", ".2f"),
    Column("quality", "Quality", ".2f"),
    Column("total", "as\nprinted", ".2f", under=TOTAL),
    Column("plain", "plain\nmean", ".2f", under=TOTAL, own=True),
    Column("own", "VBench's\n4:1", ".2f", under=TOTAL, own=True),
    Column("rank_plain", "plain", under=RANK, own=True, best="min", align="right"),
    Column("rank_own", "4:1", under=RANK, own=True, best="min", align="right"),
)
MEASURED = (
    Column("own_low", "low", ".2f", under="4:1, 95 %", own=True),
    Column("own_high", "high", ".2f", under="4:1, 95 %", own=True),
    Column("dimensions", "of 16"),
)
_DIGITS = 9


def INPUTS(runs: str = "") -> dict[str, Path]:
    """Results of ours."""
    return vbench_rows.inputs(runs, ROOT)


def quoted(latent: pd.DataFrame, split: pd.DataFrame, board: pd.DataFrame) -> pd.DataFrame:
    """The paper's eight rows, then the leaderboard's, in percent."""
    parts = ["semantic", "quality", "total"]
    default = [pair == PAPER_DEFAULT for pair in zip(split["d_nope"], split["d_rope"], strict=True)]
    sizes = latent[parts].assign(model=[f"$d_c$ {size}" for size in latent["d_c"]])
    splits = split[parts].assign(
        model=[
            f"split {row['d_nope']}/{row['d_rope']}{', default' if usual else ''}"
            for row, usual in zip(split.to_dict("records"), default, strict=True)
        ]
    )
    theirs = pd.concat([sizes, splits]).assign(group=PAPER)
    public = board[["model", *parts]].assign(group=BOARD)
    return with_totals(pd.concat([theirs, public], ignore_index=True))


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """A row a model that has any of the 16 dimensions on short videos, in percent.

    Stand-ins have no place here; Quality and Semantic are there where the run has them.
    """
    short = table[~(table["horizon_s"] >= vbench_rows.LONG)]
    rows = vbench_rows.wide(short, [*DIMENSIONS, "quality", "semantic", "total"])
    found = pd.DataFrame(
        {
            "group": OURS, "model": vbench_rows.titled(rows, "short"), "result": rows["result"],
            "semantic": 100 * rows["semantic"], "quality": 100 * rows["quality"],
            "own_low": 100 * rows["total_low"], "own_high": 100 * rows["total_high"],
            "dimensions": rows[list(DIMENSIONS)].notna().sum(axis=1),
            "validity": rows["validity"],
        }
    )  # fmt: skip
    return with_totals(found[found["dimensions"] > 0])


def with_totals(rows: pd.DataFrame) -> pd.DataFrame:
    """Both totals, and the rank by each within a group: of full rows that are not alone."""
    full = rows["validity"] == "full" if "validity" in rows else pd.Series(True, rows.index)
    pairs = list(zip(_held(rows["quality"]), _held(rows["semantic"]), strict=True))
    rows = rows.assign(
        plain=pd.array([weighted_total(*pair) for pair in pairs], dtype="Float64"),
        own=pd.array([total_of(*pair) for pair in pairs], dtype="Float64"),
    )
    for name in SHARES:
        rows[name] = rows[name].astype(float).round(_DIGITS)
        by_group = rows[name].where(full).groupby(rows["group"])
        ranks = by_group.rank(ascending=False, method="min")
        alone = by_group.transform("count") < 2
        rows[f"rank_{name}"] = ranks.where(~alone).astype("Int64")
    return rows


def _held(values: pd.Series[float]) -> list[float | None]:
    return [None if pd.isna(value) else float(value) for value in values]


def swaps(rows: pd.DataFrame) -> list[tuple[float, str, str]]:
    """Shares of Quality at which two rows of a group change places, with the one that then leads.

    Returns:
        (share, leader above it, leader below it), of shares between 0 and 1, in order.
    """
    found: list[tuple[float, str, str]] = []
    for one, two in combinations(rows.to_dict("records"), 2):
        semantic = one["semantic"] - two["semantic"]
        quality = one["quality"] - two["quality"]
        if one["group"] == two["group"] and semantic * quality < 0:
            share = semantic / (semantic - quality)
            pair = (one["model"], two["model"]) if quality > 0 else (two["model"], one["model"])
            found.append((share, *pair))
    return sorted(found)


def sentences(rows: pd.DataFrame, board: pd.DataFrame) -> list[str]:
    """What the quoted rows say.

    Args:
        rows: of :func:`quoted`. board: the leaderboard with its 16 dimensions.
    """
    paper, public = rows[rows["group"] == PAPER], rows[rows["group"] == BOARD]
    off = vbench_rows.within(paper["plain"] - paper["total"])
    default = paper[paper["model"].str.endswith("default")].iloc[0]
    recomputed = [
        100 * value - float(row[name])
        for row in board.to_dict("records")
        for name, value in composites({d: row[d] / 100 for d in DIMENSIONS}).items()
        if name in ("quality", "semantic", "total")
    ]
    between = [swap for swap in swaps(public) if SHARES["plain"] < swap[0] <= SHARES["own"]]
    return [
        f"Grey italics: paper-quoted, in percent. The paper's Total is the plain mean, within "
        f"{off} in all {len(paper)} rows; by VBench's weights its default has "
        f"{default['own']:.2f}, not {default['total']:.2f}. The leaderboard's is VBench's: from "
        f"the 16 dimensions all {len(recomputed)} published scores come out within "
        f"{vbench_rows.within(recomputed)}.",
        f"Between the two weightings {len(between)} pairs of the leaderboard change places, so a "
        "Total of one kind must not be set beside one of the other. Ranks are among rows of one "
        "source.",
    ]


def draw(out_dir: str, runs: str = "") -> Figure:
    """Draw and save ``table5_vbench.{pdf,png,svg,csv,md}`` and ``table5_vbench_weighting``.

    Where there are measured rows of short videos, all of their scores stand in a second table,
    ``table5_vbench_measured``.

    Args:
        out_dir: where the files go.
        runs: see :func:`analysis.vbench_rows.folders`.

    Raises:
        UserError: a folder that holds no result.
    """
    papers = [ROOT / name for name in DATA]
    latent, split, board = map(pd.read_csv, papers)
    ours = vbench_rows.read(runs, ROOT)
    theirs, mine = quoted(latent, split, board), measured(ours.table)
    table = pd.concat([theirs, mine], ignore_index=True) if len(mine) else theirs
    kinds, validity, run_hash = vbench_rows.identity(ID, ours, mine, papers)
    short = ours.table[~(ours.table["horizon_s"] >= vbench_rows.LONG)]
    notes = sentences(theirs, board)
    if mine.empty:
        notes.append(f"No short video of ours is scored. {vbench_rows.HOW}")
    else:
        notes.append(
            "Measured: a group with a dimension missing has no score, hence no Total; only full "
            "rows are ranked."
        )
    if short["scorer"].map(vbench_rows.is_stand_in).any():
        notes.append(f"Stand-ins for dimensions are in {ID}_measured alone.")
    rules = rules_between(table, "group")
    shown = table.assign(group=table["group"].where(~table["group"].duplicated(), ""))
    with style():
        _weighting(Path(out_dir), table, kinds, validity, run_hash)
        vbench_rows.save_measured(ID, out_dir, ours, short, "Measured scores of short videos")
        return save_table(
            round_significant(shown), Path(out_dir) / ID, COLUMNS + (MEASURED if len(mine) else ()),
            provenance=kinds, validity=validity, run_hash=run_hash, title=TITLE, notes=notes,
            rule_before=rules, quoted_rows=range(len(theirs)), width=PAGE_WIDTH,
        )  # fmt: skip


def _weighting(
    out_dir: Path, table: pd.DataFrame, kinds: Any, validity: Any, run_hash: str
) -> None:
    """Total against the share of Quality, a panel a source."""
    import matplotlib.pyplot as plt

    table = table.dropna(subset=["plain"])
    groups = list(dict.fromkeys(table["group"]))
    down = -(-len(groups) // 2)
    figure, axes = plt.subplots(down, 2, figsize=(PAGE_WIDTH, 3 * down + 0.3), squeeze=False)
    for axis, group, letter in zip(axes.flat, groups, "abc", strict=False):
        _panel(axis, table[table["group"] == group], f"({letter}) {group}")
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("Total (percent)")
    figure.suptitle(
        "Total against the share of Quality; in brackets the rank at 0.5 (the paper's mean) and at "
        "0.8 (VBench's)",
        fontsize=7,
    )
    stamp(figure, kinds, validity, run_hash)
    save_figure(figure, out_dir / f"{ID}_weighting")


def _panel(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    rows = rows.sort_values("quality", ascending=False)
    cycle = [*COLOURS.values()][:7]
    share = np.array([0.0, 1.0])
    low, high = float(rows[["semantic", "quality"]].min().min()), float(rows["quality"].max())
    low, high = min(low, high), max(high, float(rows["semantic"].max()))
    pad = 0.03 * (high - low) or 1.0
    ends = spread([float(value) for value in rows["quality"]], (high - low) * 0.058 or 1.0)
    for i, (row, end) in enumerate(zip(rows.to_dict("records"), ends, strict=True)):
        colour, dash = cycle[i % len(cycle)], "-" if i < len(cycle) else "--"
        values = (1 - share) * row["semantic"] + share * row["quality"]
        axis.plot(share, values, dash, color=colour, lw=0.9, clip_on=False)
        axis.plot([1, 1.05], [row["quality"], end], "-", color=colour, lw=0.4, clip_on=False)
        ranks = "" if pd.isna(row["rank_own"]) else f" ({row['rank_plain']} → {row['rank_own']})"
        if ranks and row["rank_plain"] == row["rank_own"]:
            ranks = f" ({row['rank_own']})"
        axis.text(1.06, end, f"{row['model']}{ranks}", fontsize=5.5, color=colour, va="center")
    for at, told in ((0.5, "paper"), (0.8, "VBench")):
        axis.axvline(at, color="0.7", lw=0.6, zorder=0)
        axis.text(at, 1.0, told, fontsize=5.5, color="0.4", ha="center", va="bottom",
                  transform=axis.get_xaxis_transform())  # fmt: skip
    top = max(high, ends[0]) + pad
    axis.set(xlim=(0, 1), ylim=(low - pad, top), xlabel="share of Quality")
    axis.set_title(title, loc="left", pad=10)


def spread(values: Sequence[float], apart: float) -> list[float]:
    """Falling values moved as little as it takes to be ``apart``: where their labels stand."""
    blocks: list[list[float]] = []  # [middle, how many]
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1:
            (above, n), (below, m) = blocks[-2:]
            if above - below >= apart * (n + m) / 2 - 1e-12:
                break
            blocks[-2:] = [[(above * n + below * m) / (n + m), n + m]]
    return [
        middle + apart * ((count - 1) / 2 - i)
        for middle, count in blocks
        for i in range(int(count))
    ]
