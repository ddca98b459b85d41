"""Tidy tables of a finished plan: scores, drift, curves, ranks, spectra, conversions, frames.

Every table begins with the columns that describe a node (run, variant, init, d_c, d_rope, seed,
stage); ``step`` counts on through a student's stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.errors import UserError
from mla_study.miniature.clips import clips_table
from mla_study.miniature.plan import Node, Plan
from mla_study.miniature.spectra import spectra
from mla_study.miniature.store import LOG, VIDEOS, Store
from mla_study.study.runs import round_significant

if TYPE_CHECKING:
    import pandas as pd

ABOUT = ("run", "variant", "init", "d_c", "d_rope", "seed", "stage")
TABLES = ("scores", "drift", "curves", "ranks", "conversion", "spectra", "clips")
UNITS = {
    "value": "shares of videos, IoU (1), pixels a frame (velocity_error), pixels (phase_error); "
    "ranks and losses without unit",
    "se": "standard error over videos",
    "sigma": "singular value, in the weights' own scale",
    "second": "seconds of video at the window's middle",
    "fps": "frames a second",
    "png": "frames of the numbers in `frames`, side by side, one pixel a pixel",
    "step": "generator updates since the conversion",
}
_PLAIN = ("video", "window")
MODULES = ("mla_study.miniature.tables", "mla_study.miniature.work")


def tables(plan: Plan, store: Store) -> dict[str, pd.DataFrame]:
    """All tables of a plan that is done.

    Raises:
        UserError: something of it is not done yet.
    """
    import pandas as pd

    left = [node.name for node in plan if not store.done(plan, node.name)]
    if left:
        raise UserError(f"{len(left)} pieces of work are not done, {left[0]} among them")
    rows: dict[str, list[Any]] = {name: [] for name in TABLES}
    for node in plan:
        folder = store.place(plan, node.name)
        if node.kind == "judge":
            found = pd.read_parquet(folder / VIDEOS)
            rows["scores"] += list(_scores(node, found))
            rows["drift"] += list(_drift(node, found))
        elif node.kind == "train" or (folder / LOG).exists():
            curves, ranks = _log(node, pd.read_parquet(folder / LOG))
            rows["curves"].append(curves)
            rows["ranks"].append(ranks)
        elif node.kind == "convert":
            rows["conversion"].append(_conversion(node, folder))
    made = {name: pd.DataFrame(rows[name]) for name in ("scores", "drift")}
    for name in ("curves", "ranks", "conversion"):
        made[name] = pd.concat(rows[name], ignore_index=True) if rows[name] else pd.DataFrame()
    made["spectra"] = spectra(plan, store)
    made["clips"] = clips_table(plan, store)
    return {name: round_significant(frame) for name, frame in made.items()}


def _about(node: Node) -> dict[str, Any]:
    return {name: node.about[name] for name in ABOUT}


def _mean(values: np.ndarray) -> tuple[float, float, int]:
    """Mean, its standard error and the number of values that are there."""
    held = values[np.isfinite(values)]
    if not len(held):
        return float("nan"), float("nan"), 0
    se = held.std(ddof=1) / len(held) ** 0.5 if len(held) > 1 else float("nan")
    return float(held.mean()), float(se), len(held)


def _metrics(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame.columns if name not in _PLAIN]


def _scores(node: Node, found: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """First window, last window, and all windows of a video together."""
    about = _about(node) | {"clips": node.about["clips"], "condition": node.about["condition"]}
    last = found["window"].max()
    parts = {"first": found[found["window"] == 0]}
    if last:
        parts |= {"last": found[found["window"] == last], "all": found}
    for scope, part in parts.items():
        for metric in _metrics(part):
            by_video = part.groupby("video")[metric].mean().to_numpy(dtype=float)
            value, se, n = _mean(by_video)
            yield about | {"scope": scope, "metric": metric, "value": value, "se": se, "n": n}


def _drift(node: Node, found: pd.DataFrame) -> Iterator[dict[str, Any]]:
    from mla_study.config import mini

    if not found["window"].max():
        return
    about = _about(node) | {"clips": node.about["clips"], "condition": node.about["condition"]}
    seconds = 12 / mini().fps
    for window, part in found.groupby("window"):
        for metric in _metrics(part):
            value, se, n = _mean(part[metric].to_numpy(dtype=float))
            if n:
                second = (float(window) + 0.5) * seconds  # type: ignore[arg-type]
                yield about | {
                    "window": window, "second": second, "metric": metric,
                    "value": value, "se": se, "n": n,
                }  # fmt: skip


def _log(node: Node, log: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    import pandas as pd

    log = log.assign(step=log["step"] + node.about.get("before", 0))
    for place, (name, value) in enumerate(_about(node).items()):
        log.insert(place, name, value)
    if "layer" not in log:
        return log, pd.DataFrame()
    is_rank = log["layer"].notna()
    curves = log.loc[~is_rank, [*ABOUT, "step", "name", "value"]]
    ranks = log.loc[is_rank].rename(columns={"name": "metric"})
    ranks = ranks.astype({"layer": int, "m": int, "n": int})
    return curves, ranks.reset_index(drop=True)


def _conversion(node: Node, folder: Path) -> pd.DataFrame:
    import pandas as pd

    held = folder / "converted" / "conversion" / "table.parquet"
    frame = pd.read_parquet(held)
    for place, (name, value) in enumerate(_about(node).items()):
        frame.insert(place, name, value)
    return frame


def summary(frame: pd.DataFrame, metrics: Sequence[str] = ("all_correct", "iou")) -> str:
    """A few lines to read: each student's scores, mean over seeds."""
    held = frame[(frame["condition"].str.startswith("plain")) & frame["metric"].isin(metrics)]
    held = held.assign(run=held["run"].str.replace(r"-s\d+$", "", regex=True))
    mean = (
        held.groupby(["run", "stage", "clips", "scope", "metric"])["value"]
        .mean()
        .unstack("metric")
        .round(3)
    )
    return mean.to_string()
