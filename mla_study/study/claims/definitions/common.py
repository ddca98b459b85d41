"""What the queries share: differences paired by seed, shares of published values, nulls."""

from __future__ import annotations

import pandas as pd

from mla_study.errors import UserError
from mla_study.miniature.results import of_student, score_rows
from mla_study.study.claims.model import Number, Role
from mla_study.study.claims.sources import MissingError, Reader
from mla_study.study.statistics import interval, paired

BY_SEED, BY_VIDEO = "95 %, paired by seed", "95 %, over the videos of one seed"
TOLD = {"all_correct": "all correct", "iou": "IoU"}
SCORES = ("run", "variant", "init", "d_c", "d_rope", "seed", "stage", "clips", "condition", "scope",
          "metric", "value", "se")  # fmt: skip
STUDY = "mla-study study full --out results/data"


def difference(
    label: str, first: pd.DataFrame, second: pd.DataFrame, unit: str = "", role: Role = "found"
) -> Number:
    """Mean of first - second over the seeds of both, with its interval.

    Args:
        first, second: a row a seed with ``value``, and ``se`` (used for a single seed only).

    Raises:
        MissingError: no seed is in both.
    """
    try:
        value, low, high, count = paired(first, second)
    except UserError:
        raise MissingError(f"a seed that has both sides of '{label}'") from None
    return Number(
        f"{label} ({count} {'seed' if count == 1 else 'seeds'})", value, low, high, unit, role,
        "measured", BY_SEED if count > 1 else BY_VIDEO,
    )  # fmt: skip


def over_seeds(label: str, values: pd.Series, unit: str = "", role: Role = "beside") -> Number:
    """Mean over seeds with its interval."""
    held = values.dropna().to_numpy(float)
    if not len(held):
        raise MissingError(f"a seed of '{label}'")
    value, low, high = interval(held)
    told = f"{label} ({len(held)} {'seed' if len(held) == 1 else 'seeds'})"
    return Number(told, value, low, high, unit, role, "measured", "95 %, over seeds")


def scores(reader: Reader) -> pd.DataFrame:
    """The study's scores."""
    return reader.table("study_scores", columns=SCORES)


def curves(reader: Reader) -> pd.DataFrame:
    """The study's losses."""
    columns = ("run", "variant", "init", "d_c", "d_rope", "seed", "stage", "step", "name", "value")
    return reader.table("study_curves", columns=columns)


def against(
    table: pd.DataFrame,
    name: str,
    reference: str,
    metric: str,
    *,
    clips: int = 1,
    scope: str = "first",
    role: Role = "found",
) -> Number:
    """A student's score minus another's, both after all stages at the default sizes."""
    rows = score_rows(table, metric, clips=clips, scope=scope)
    label = f"{name} − {reference}, {TOLD[metric]}" + (f" at {clips}x" if clips > 1 else "")
    return difference(label, of_student(rows, name), of_student(rows, reference), "share", role)
