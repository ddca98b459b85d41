"""Tables as figures: the same text in picture and Markdown, numbers in the CSV, equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from mla_study.errors import UserError
from mla_study.study.plots import COLUMN_WIDTH, PAGE_WIDTH, style
from mla_study.study.tables import (
    MISSING,
    Column,
    cells,
    draw_table,
    markdown,
    rules_between,
    save_table,
    spell,
)

FRAME = pd.DataFrame(
    {
        "name": ["dense", "latent", "latent"],
        "fps": [1.25, 1234.5, np.nan],
        "paper": [6.26, 0.82, 0.57],
        "n": [12, 91, 3],
        "ok": pd.array([True, None, False], dtype="boolean"),
    }
)
COLUMNS = (
    Column("name", "Layout"),
    Column("fps", "FPS\n(measured)", ".1f", best="max"),
    Column("paper", "slope", ".2f", under="paper", quoted=True, best="min"),
    Column("n", under="paper"),
    Column("ok", align="center"),
)
FACTS = {"provenance": ("modelled", "paper-quoted"), "validity": "full", "run_hash": "abc" * 20}


@pytest.fixture(autouse=True)
def close_figures() -> object:
    yield
    plt.close("all")


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (1.25, ".1f", "1.2"), (1234.5678, "", "1235"), (float("nan"), ".1f", MISSING),
        (None, "", MISSING), (pd.NA, "", MISSING), (7, "", "7"), (12345, ",d", "12,345"),
        (np.int64(3), "", "3"), (np.float32(0.5), ".2f", "0.50"), (True, "", "yes"),
        (np.bool_(False), "", "no"), (-0.125, "+.1%", "−12.5%"), ("a-b", "", "a-b"),
        (1, ".1f", "1.0"),
    ],
)  # fmt: skip
def test_values_as_text(value: object, spec: str, text: str) -> None:
    assert spell(value, spec) == text


@pytest.mark.parametrize(
    ("value", "spec", "least", "text"),
    [
        (-3.333333e-08, ".3g", 0.0, "−3.33e−08"), (-3.333333e-08, ".3g", 1e-7, "0"),
        (3.333333e-08, "", 1e-7, "0"), (-1.1e-7, ".1e", 1e-7, "-1.1e-07"), (-0.0, ".3g", 0.0, "0"),
        (-0.004, ".2f", 0.0, "0.00"), (-0.006, ".2f", 0.0, "−0.01"), (-4e-4, "+.1%", 0.0, "+0.0%"),
        (-2.0, "", 1e-7, "−2"), (float("-inf"), ".3g", 1e-7, "−inf"),
        (-0.0097, ".3g", 1e-5, "−0.0097"), (float("nan"), ".3g", 1e-5, MISSING),
    ],
)  # fmt: skip
def test_what_rounding_cannot_tell_from_nothing_is_0(
    value: float, spec: str, least: float, text: str
) -> None:
    assert spell(value, spec, least) == text
    frame = pd.DataFrame({"difference": [value]})
    assert cells(frame, [Column("difference", spec=spec, least=least)]) == [[text]]


def test_markdown_says_what_the_cells_say() -> None:
    assert cells(FRAME, COLUMNS)[0] == ["dense", "1.2", "6.26", "12", "yes"]
    text = markdown(FRAME, COLUMNS, "Title", ["A note."])
    lines = text.splitlines()
    assert lines[0] == "**Title**" and lines[-1] == "A note."
    assert lines[2] == "| Layout | FPS (measured) | paper: slope | paper: n | ok |"
    assert lines[3] == "|:--|--:|--:|--:|:-:|"
    assert lines[5] == f"| latent | **1234.5** | *0.82* | 91 | {MISSING} |"
    assert lines[6] == f"| latent | {MISSING} | **0.57** | 3 | no |"
    with pytest.raises(UserError, match="no column 'speed'"):
        cells(FRAME, [Column("speed")])


def test_five_files_of_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        with style():
            save_table(FRAME, tmp_path / name / "t", COLUMNS, title="T", notes=["x " * 90], **FACTS)  # type: ignore[arg-type]
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {f"t.{kind}" for kind in ("pdf", "png", "svg", "csv", "md")}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = pd.read_csv(tmp_path / "a" / "t.csv")
    np.testing.assert_array_equal(again["fps"], FRAME["fps"])
    assert "modelled + paper-quoted, full, run abcabcabcabc" in (tmp_path / "a/t.md").read_text()


def test_texts_stay_on_the_sheet_and_apart() -> None:
    with style():
        figure = draw_table(FRAME, COLUMNS, "A title", ["word " * 60], rules_between(FRAME, "name"))
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        boxes = [
            (t.get_text(), t.get_window_extent(renderer)) for t in figure.texts if t.get_text()
        ]
    assert figure.get_figwidth() == COLUMN_WIDTH
    sheet = figure.bbox
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= sheet.x1 and box.y0 >= 0 and box.y1 <= sheet.y1, text
    for i, (one, a) in enumerate(boxes):
        for other, b in boxes[i + 1 :]:
            apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 1.5 or b.y1 <= a.y0 + 1.5
            assert apart, (one, other)


def test_a_wide_table_takes_the_page_and_shrinks_or_is_refused() -> None:
    def wide(count: int) -> pd.DataFrame:
        return pd.DataFrame({f"quantity {i}": [1234.5] for i in range(count)})

    with style():
        figure = draw_table(wide(8), [Column(name) for name in wide(8)])
        assert figure.get_figwidth() == PAGE_WIDTH
        small = draw_table(wide(13), [Column(name) for name in wide(13)])
        assert min(t.get_fontsize() for t in small.texts) < 7
        with pytest.raises(UserError, match="fewer columns"):
            draw_table(wide(40), [Column(name) for name in wide(40)])
        with pytest.raises(UserError, match="no rows"):
            draw_table(FRAME.iloc[:0], COLUMNS)


def test_rows_can_be_quoted_but_for_columns_worked_out_here() -> None:
    columns = (Column("name", "Layout"), Column("fps", spec=".1f"), Column("n", own=True))
    lines = markdown(FRAME, columns, quoted_rows=[0, 2]).splitlines()[2:]
    assert lines == ["| *dense* | *1.2* | 12 |", "| latent | 1234.5 | 91 |", "| *latent* | – | 3 |"]
    with style():
        figure = draw_table(FRAME, columns, quoted_rows=[0, 2])
    slanted = {text.get_text() for text in figure.texts if text.get_style() == "italic"}
    assert slanted == {"dense", "1.2", "latent", MISSING}
    upright = {text.get_text() for text in figure.texts if text.get_style() == "normal"}
    assert {"latent", "1234.5", "91", "12", "3"} <= upright
