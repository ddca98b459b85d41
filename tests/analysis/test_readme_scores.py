"""README's scores of the miniature are those of the committed tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis import miniature
from mla_study.study.statistics import over_seeds

NAMES = {
    "dense": "dense",
    "latent, activation-aware init": "activation",
    "latent, spectral": "spectral",
    "latent, spectral-raw": "spectral-raw",
    "latent, random": "random",
}
COLUMNS = {
    "all correct, 1x": ("all_correct", 1, "first", ".3f"),
    "IoU, 1x": ("iou", 1, "first", ".3f"),
    "IoU in a window, 10x": ("iou", 10, "all", ".3f"),
    "all correct, end of 10x": ("all_correct", 10, "last", ".3f"),
    "px from path, end of 1x": ("phase_error", 1, "first", ".1f"),
    "px from path, end of 10x": ("phase_error", 10, "last", ".1f"),
    "held-out loss after teacher forcing": ("", 0, "", ".3f"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_each_score_and_error_is_the_committed_one(column: str, repo_root: Path) -> None:
    text = (repo_root / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(rows) if row[0] == "student")
    table = pd.DataFrame(rows[start + 2 : start + 2 + len(NAMES)], columns=rows[start])
    metric, clips, scope, spec = COLUMNS[column]
    if metric:
        held = miniature.read("scores", repo_root).table
        held = miniature.score_rows(held, metric, clips=clips, scope=scope)
    else:
        held = miniature.held_out(miniature.read("curves", repo_root).table)
    held = miniature.usual(held)
    found = over_seeds(held.assign(student=miniature.student(held)), ["student"])
    found = found.set_index("student")
    for name, told in zip(table["student"], table[column], strict=True):
        mean, error = found.loc[NAMES[name], ["value", "se"]]
        assert told == f"{mean:{spec}} ± {error:{spec}}", name
    assert set(table["student"]) == set(NAMES) and list(table.columns[1:]) == list(COLUMNS)
