"""Table 1 and Fig. 7: what they draw agrees with the paper's arithmetic and with our cache."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from analysis import fig7_batch_scaling as fig7
from analysis import table1_cache as table1
from mla_study.config import wan_1_3b
from mla_study.evaluation.efficiency.memory import RUNTIME
from mla_study.study.notebooks import Project, discover
from mla_study.study.runs import read_result


@pytest.fixture(autouse=True)
def close_figures() -> object:
    yield
    plt.close("all")


def test_formulas_are_evaluated_as_written() -> None:
    values = {"N": 8.0, "W": 3.0, "D": 5.0, "n": 2.0, "d_h": 7.0, "d_c": 11.0, "d_rope": 1.0}
    for text, value in (
        ("2 N D", 80), ("N^2 D / 2", 160), ("D d_h", 35), ("n N W (d_c + d_rope)", 576),
    ):  # fmt: skip
        assert table1.evaluated(text, values) == value
    assert table1.symbols(wan_1_3b(True))["W"] == 15600


def test_table1_counts(repo_root: Path) -> None:
    paper = pd.read_csv(repo_root / table1.DATA[0])
    table = table1.rows(paper).set_index("attention")
    absorbed = table.loc["latent local, absorbed"]
    assert absorbed["token_ratio"] == 1.75 and absorbed["flop_ratio"] == 1.625
    assert table.loc["the same through SDPA", "flop_ratio"] == 1.75
    assert table.loc["latent local, reconstructed", "flop_ratio"] == pytest.approx(1.036, abs=1e-3)
    counted = table[table["counted_mb"].notna()]
    assert (counted["counted_mb"] == counted["allocated_mb"]).all()
    both = counted[counted["memory_mb"].notna()]
    assert both["counted_mb"].to_numpy() == pytest.approx(both["memory_mb"].to_numpy())
    assert table.loc["causal local", "memory_mb"] / absorbed["memory_mb"] == pytest.approx(
        13.714, abs=1e-3
    )


def test_both_are_found_and_drawn(repo_root: Path, tmp_path: Path) -> None:
    ids = {figure.id: figure for figure in discover(Project(repo_root))}
    assert "measure" in ids[fig7.ID].functions
    assert "modelled" in ids[table1.ID].provenance
    fig7.draw(str(tmp_path))
    table1.draw(str(tmp_path))
    names = {file.name for file in tmp_path.iterdir()}
    assert {f"{fig7.ID}.{kind}" for kind in ("pdf", "png", "svg")} <= names
    assert {f"{table1.ID}.{kind}" for kind in ("pdf", "png", "svg", "csv", "md")} <= names


def test_measured_rows_are_drawn_where_there_are_some() -> None:
    table = read_result(fig7.ROOT / fig7.DATA[0]).table
    assert fig7.RUNTIME_GB == RUNTIME / 1e9
    _, axis = plt.subplots()
    fig7._memory_panel(axis, table)
    before = len(axis.lines)
    measured = pd.DataFrame(
        {"form": ["dense", "dense"], "window": [fig7.FULL] * 2, "transient": ["none"] * 2,
         "batch": [1, 2], "total_gb": [10.0, None], "status": ["ok", "OOM"]}
    )  # fmt: skip
    fig7._measured_marks(axis, measured)
    assert len(axis.lines) == before + 2
    assert list(axis.lines[before].get_xdata()) == [1]
