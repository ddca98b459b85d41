"""Fresh measurements against committed ones."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mla_study.study.reconcile import reconcile


def frame(values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"layer": range(len(values)), "value": values})


def test_equal_digits_are_the_committed_ones() -> None:
    committed = frame([1.0, 2.0, float("nan"), 0.0])
    fresh = frame([1.0 + 1e-9, 2.0, float("nan"), 1e-14])
    drawn, told = reconcile(fresh, committed, ["layer"], ["value"])
    assert told == []
    np.testing.assert_array_equal(drawn["value"], committed["value"])


def test_differences_stay_as_measured_and_are_told() -> None:
    drawn, told = reconcile(frame([1.0, 2.1]), frame([1.0, 2.0]), ["layer"], ["value"])
    assert drawn["value"].tolist() == [1.0, 2.1]
    assert told == ["value of 1: measured 2.1, committed 2"]


def test_rows_without_a_counterpart_are_counted() -> None:
    drawn, told = reconcile(frame([1.0, 2.0, 3.0]), frame([1.0]), ["layer"], ["value"])
    assert drawn["value"].tolist() == [1.0, 2.0, 3.0]
    assert told == ["2 of 3 rows have no committed counterpart"]
