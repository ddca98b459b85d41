"""``mla-study plan`` prints a table with its assumptions, JSON, or one sentence."""

from __future__ import annotations

import json

import pytest

from mla_study.cli import main


def test_table_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "8", "--viewers", "100", "--window", "1,6,3"]) == 0
    table, told = capsys.readouterr().out.split("\n\n")
    assert len(table.splitlines()) == 6 and "GPUs for 100" in table
    assert told.startswith("modelled, under these assumptions:")


def test_json_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--d-c", "64", "--fps", "8", "--device", "b200", "--memory", "100"]
    assert main(["plan", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layouts"]) == 5
    assert any("at 8 fps" in line for line in found["assumptions"])


@pytest.mark.parametrize(
    "options",
    [
        ["--window", "1,6"], ["--window", "a,b,c"], ["--window", "1,6,0"], ["--gpus", "0"],
        ["--device", "abacus"], ["--device", "none.json"], ["--d-c", "9999"], ["--d-c", "0"],
        ["--achieved", "2"], ["--preset", "wan-9b"], ["--dtype", "fp32"], ["--fps", "0"],
    ],
)  # fmt: skip
def test_bad_input(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mla-study: ") and err.count("\n") == 1
