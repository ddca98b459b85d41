"""``mla-study claims`` on a copy of the project: exit codes, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from mla_study.cli import main

RESULTS = Path(__file__).resolve().parents[2] / "results"
PARITY = "short-horizon-parity"
SCORES = "data/study_scores/table.parquet"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the committed results; the current folder lies in it."""
    for name in ("notebooks", "analysis", "results/data"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(RESULTS / "paper", tmp_path / "results" / "paper")
    for folder in (RESULTS / "data").iterdir():
        own = tmp_path / "results" / "data" / folder.name
        if folder.name in ("study_scores", "claims"):
            shutil.copytree(folder, own)
        elif folder.name != "study_clips":
            own.symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoil(file: Path) -> None:
    """Lower the spectral students' overlap."""
    frame = pd.read_parquet(file)
    meant = (frame["init"] == "spectral") & (frame["metric"] == "iou") & (frame["clips"] == 1)
    frame.loc[meant, "value"] -= 0.2
    frame.to_parquet(file, index=False)


def test_the_committed_ledger_follows_from_the_committed_tables(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", "check"]) == 0
    said = capsys.readouterr()
    assert " claims: " in said.out and "->" not in said.out and said.err == ""


def test_a_changed_number_ends_with_1_and_says_which(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(project / "results" / SCORES)
    assert main(["claims", "check"]) == 1
    said = capsys.readouterr()
    line = next(line for line in said.out.splitlines() if line.startswith(f"{PARITY}: "))
    assert line.startswith(f"{PARITY}: supported -> not supported ") and f"results/{SCORES}" in line
    assert "is not the table that its run record describes" in said.err


def test_a_lost_table_ends_with_1_and_is_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "results" / SCORES).unlink()
    assert main(["claims", "check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    change = next(one for one in found["changed"] if one["id"] == PARITY)
    assert change["new"] == "not testable here"
    assert change["tables"] == [f"results/{SCORES} is gone"]


def test_own_results_join_and_stand_alone(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = project / "mine"
    shutil.copytree(RESULTS / "data" / "study_scores", own / "study_scores")
    spoil(own / "study_scores" / "table.parquet")
    assert main(["claims", "show", PARITY, "--results", str(own), "--json"]) == 0
    [joined] = json.loads(capsys.readouterr().out)
    assert joined["verdict"] == "not supported" and joined["sources"][0]["altered"]
    assert main(["claims", "list", "--results", str(own), "--alone"]) == 0
    said = capsys.readouterr()
    assert "is not the table that its run record describes" in said.err
    lines = said.out.splitlines()
    alone = next(line for line in lines if line.startswith("cache-ratio"))
    assert "not testable here" in alone
    assert any(line.startswith(PARITY) and "not testable" not in line for line in lines)


def test_show_and_write(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "results" / "data" / "claims")
    assert main(["claims", "check"]) == 2
    assert "claims check --write" in capsys.readouterr().err
    assert main(["claims", "check", "--write"]) == 0
    assert (project / "results" / "data" / "claims" / "run.json").exists()
    capsys.readouterr()
    assert main(["claims", "show", "cache-ratio"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("cache-ratio: arithmetic only") and "table4_hyperparameters.csv" in text


@pytest.mark.parametrize(
    "options",
    [["show"], ["show", "nothing-like-it"], ["list", "--alone"], ["list", "--results", "nowhere"],
     ["check", "--write", "--results", "results"]],
)  # fmt: skip
def test_bad_input(options: list[str], project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mla-study: ") and err.count("\n") == 1
