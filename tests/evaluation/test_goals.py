"""Rows tell whether their goals are met, as text and as a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mla_study.evaluation import goals
from mla_study.evaluation.goals import Goal, Row, table_of, write_rows
from mla_study.evaluation.timing import Spread
from mla_study.study.notebooks import Project
from mla_study.study.runs import read_result


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("<", 2.0), False),
        (Goal("<=", 2.0), True),
        (Goal(">", 2.0), False),
        (Goal(">=", 2.0), True),
        (Goal("==", 2.0), True),
        (Goal("<", 3.0), True),
        (None, None),
    ],
)
def test_goals(goal: Goal | None, met: bool | None) -> None:
    row = Row("x", 2.0, "s", "here", goal)
    assert row.met is met
    assert ("MISSED" in row.text()) is (met is False)
    assert table_of([row])["met"].astype(object).tolist() == [met if goal else None] or not goal


def test_a_gpu_has_results_of_its_own() -> None:
    torch = pytest.importorskip("torch")
    assert goals.results_name("a", torch.device("cpu")) == "a"
    assert goals.results_name("a", torch.device("cuda:1")) == "a_cuda"


def test_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        goals.Project, "find", staticmethod(lambda: Project(tmp_path, tmp_path / "figures"))
    )
    rows = [
        Row.of("a", Spread(1.5, 1.0, 2.0), "ratio", goal=Goal("<=", 1.0)),
        Row("b", 7.0, "MB", provenance="modelled"),
    ]
    folder = write_rows("some", rows, config={"n": 1}, modules=("mla_study.evaluation.goals",))
    table = read_result(folder).table
    assert table["met"].astype(object).tolist()[0] is False
    assert table["low"].tolist()[0] == 1.0 and np.isnan(table["low"].tolist()[1])
    assert table["provenance"].tolist() == ["measured", "modelled"]
