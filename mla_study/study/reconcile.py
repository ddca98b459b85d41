"""Hold a fresh measurement against the committed table of the same experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def reconcile(
    measured: pd.DataFrame,
    committed: pd.DataFrame,
    keys: Sequence[str],
    values: Sequence[str],
    rtol: float = 1e-6,
    atol: float = 1e-12,
) -> tuple[pd.DataFrame, list[str]]:
    """The measured table, committed digits in place of equal ones, and a line for each difference.

    Another processor's last bits must not move a line in a figure: where a value agrees with the
    committed one to ``rtol``, the committed one is drawn. Differences beyond are kept as measured,
    and told.

    Args:
        measured: fresh rows.
        committed: the committed rows; may hold more or fewer of them.
        keys: columns that identify a row.
        values: numeric columns to compare.
        rtol: relative tolerance.
        atol: absolute tolerance, for values near 0.

    Returns:
        a copy of ``measured`` with the same rows, and the differences as sentences.
    """
    key = list(keys)
    left = measured.reset_index(drop=True)
    both = left[key].merge(committed[[*key, *values]], on=key, how="left", indicator=True)
    known = (both["_merge"] == "both").to_numpy()
    out = left.copy()
    lines: list[str] = []
    for column in values:
        new, old = left[column].to_numpy(dtype=float), both[column].to_numpy(dtype=float)
        same = np.isclose(new, old, rtol=rtol, atol=atol, equal_nan=True) & known
        out[column] = np.where(same, old, new)
        for row in np.flatnonzero(known & ~same):
            where = ", ".join(str(left[name][row]) for name in key)
            lines.append(f"{column} of {where}: measured {new[row]:.9g}, committed {old[row]:.9g}")
    if not known.all():
        lines.append(f"{int((~known).sum())} of {len(known)} rows have no committed counterpart")
    return out, lines
