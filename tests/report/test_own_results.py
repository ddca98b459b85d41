"""A user's results on the page: verdicts, figures, previews, in a narrow window too."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import made_up_vbench
import numpy as np
import page_reader
import pandas as pd
import pytest
from devtools import browser
from page_reader import Element
from report_page import make_page

from mla_study.report import folders, joining
from mla_study.report.drawing import Drawn, draw
from mla_study.report.pictures import Drawing, Picture
from mla_study.study.notebooks import Project
from mla_study.study.runs import write_result

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "results" / "data"
LONG_PATH = f"/srv/{'checkpoints-without-a-space-' * 6}/model.safetensors"
RECORD: dict[str, Any] = {
    "config": {"videos": 4}, "inputs": {}, "seed": 0, "modules": ("mla_study.study.runs",),
    "provenance": "measured", "validity": "partial",
}  # fmt: skip
OPERATOR = {
    "checkpoint": LONG_PATH, "series": "", "step": math.nan, "attention": "self", "head": -1,
    "gauge": "raw",
}  # fmt: skip


def write_scores(folder: Path, validity: str = "full", **more: Any) -> None:
    """A run of short videos with all 16 dimensions."""
    rows = made_up_vbench.with_composites("my model", made_up_vbench.raw(), **more)
    frame = pd.DataFrame(rows)
    write_result(folder, {"table": frame}, **RECORD | {"validity": validity},
                 observed={"hardware": "NVIDIA H100"})  # fmt: skip


def write_probe(folder: Path) -> None:
    """A probe of two layers in the shape of rank-probe's; sigma_k = 2 / k."""
    table = [
        OPERATOR | {
            "layer": layer, "operator": operator, "metric": metric, "value": value + layer,
            "null": "gaussian", "null_value": 4.0, "null_se": 0.1, "m": 8, "n": 4,
            "method": "svdvals", "provenance": "measured",
        }
        for layer in (0, 1) for operator in ("kv", "k", "v")
        for metric, value in (("r_0.5", 1), ("r_0.9", 2), ("r_0.99", 3))
    ]  # fmt: skip
    spectra = [
        OPERATOR | {"layer": layer, "operator": "kv", "index": k, "sigma": 2.0 / k}
        for layer in (0, 1) for k in (1, 2, 3, 4)
    ]  # fmt: skip
    tables = {"table": pd.DataFrame(table), "spectra": pd.DataFrame(spectra)}
    write_result(folder, tables, **RECORD, notes=[f"{LONG_PATH}: two blocks"])


def test_results_are_told_by_their_tables(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores")
    write_scores(tmp_path / "altered")
    (tmp_path / "altered" / "table.parquet").write_bytes(b"not a table")
    write_scores(tmp_path / "a, b")
    write_probe(tmp_path / "probe")
    shutil.copytree(DATA / "bench_model", tmp_path / "bench_model")
    found = joining.joined([tmp_path, tmp_path / "scores"])
    assert found == {"runs": [tmp_path / "scores"], "probes": [tmp_path / "probe"]}
    assert joining.assignments({"runs": [Path("/a"), Path("/b")]}) == {"runs": "/a,/b"}


def test_a_preview_shows_rows_that_tell_something(tmp_path: Path) -> None:
    write_probe(tmp_path / "probe")
    table, _ = folders.opened(tmp_path / "probe", "probe").tables
    assert table.over == ("operator",) and table.rows == 18
    same = {head: cell.text for head, cell in table.same}
    assert (same["metric"], same["gauge"], same["m"]) == ("r_0.99", "raw", "8")
    assert "step" not in same and "step" not in table.heads
    rows = [dict(zip(table.heads, row, strict=True)) for row in table.cells]
    shown = {(row["layer"].text, row["operator"].text): row["value"].value for row in rows}
    assert shown == {(str(n), o): 3.0 + n for n in (0, 1) for o in ("kv", "k", "v")}


def test_a_preview_spreads_over_long_tables(tmp_path: Path) -> None:
    frame = pd.DataFrame({"name": ["b", "a"] * 50, "place": range(100), "list": [[1, 2]] * 100})
    write_result(tmp_path / "long", {"table": frame, "empty": frame.iloc[:0]}, **RECORD)
    table, empty = folders.opened(tmp_path / "long", "long").tables
    assert table.over == ("name",) and len(table.places) == 12
    assert {table.places[0], table.places[1], table.places[-2], table.places[-1]} == {0, 1, 98, 99}
    assert [head for head, _ in table.same] == ["list"]
    assert (empty.rows, empty.cells, empty.same) == (0, (), ())


@pytest.mark.slow
def test_a_figure_says_which_results_it_shows(tmp_path: Path) -> None:
    write_scores(tmp_path / "short")
    write_scores(tmp_path / "invalid", validity="invalid")
    runs = ",".join(str(tmp_path / name) for name in ("short", "invalid"))
    drawn = draw(str(ROOT), "table5_vbench", {"runs": runs}, str(tmp_path / "out"))
    own = [place for place in drawn.results if str(tmp_path) in place]
    assert (drawn.error, own) == ("", [str(tmp_path / "short")])
    assert "my model" in (tmp_path / "out" / "table5_vbench.md").read_text()
    drawn = draw(str(ROOT), "table2_long_horizon", {"runs": runs}, str(tmp_path / "out"))
    assert drawn.error == "" and not any(str(tmp_path) in place for place in drawn.results)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with results of one's own."""
    root = tmp_path_factory.mktemp("own")
    results = root / "mine"
    write_scores(results / "scores")
    write_probe(results / "probe")
    shutil.copytree(DATA / "bench_model", results / "bench_model")
    model = pd.read_parquet(results / "bench_model" / "table.parquet")
    model.loc[model["quantity"] == "cache, latent bf16 / dense bf16", "value"] = 0.5
    write_result(results / "bench_model", {"table": model}, **RECORD)
    write_scores(results / "altered")
    (results / "altered" / "table.parquet").write_bytes(b"not a table")
    assert "own.html" in make_page(root / "own.html", "--results", str(results))
    return root / "own.html"


@pytest.fixture(scope="module")
def content(own: Path) -> Element:
    return page_reader.read(own)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_own_results_join(page: Path, content: Element) -> None:
    mine, theirs = (
        held.one("details", claim="cache-bytes") for held in (content, page_reader.read(page))
    )
    assert (mine["verdict"], theirs["verdict"]) == ("not supported", "supported")
    assert "The verdict rests on your bench_model; the figure shows the project's" in mine.text
    assert "rests on your" not in theirs.text
    (section,) = (s for s in content.all("section") if s.attributes.get("id") == "own")
    listed = {item["folder"]: item for item in section.all("details", "folder")}
    assert set(listed) == {"altered", "bench_model", "probe", "scores"}
    assert "cannot be read" in listed["altered"].text and "In no figure" in listed["altered"].text
    assert "NVIDIA H100" in listed["scores"].text
    assert "measured · partial" in listed["probe"].text and LONG_PATH in listed["probe"].text
    data = page_reader.chart(content, "spectra-sigma")
    (line,) = (one for one in data["series"] if one["name"].startswith("probe: "))
    held = [value for value in line["values"] if value is not None]
    assert held == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_own_results_are_in_the_figures_of_their_kind(page: Path, content: Element) -> None:
    (section,) = (s for s in content.all("section") if s.attributes.get("id") == "own")
    listed = {item["folder"]: item for item in section.all("details", "folder")}
    assert "project's, in fig_vbench_radar, table5_vbench. It" in listed["scores"].text
    assert "nothing that fig_drift_vbench, table2_long_horizon" in listed["scores"].text
    assert "project's, in fig1_spectra." in listed["probe"].text
    table = next(content.all("table", table="table5_vbench"))
    row = next(row for row in table.all("tr") if row.text.startswith("my model"))
    shown = [float(cell["value"]) for cell in row.all("td", "value")]
    wanted = made_up_vbench.with_composites("", made_up_vbench.raw())
    total = next(row["value"] for row in wanted if row["scorer"] == "total")
    assert any(np.isclose(value, [total, 100 * total], rtol=1e-6).any() for value in shown)
    claim = content.one("details", claim="short-horizon-vbench")
    assert [code["joined"] for code in claim.all("code", "joined")] == ["scores"]
    assert "my model" not in page_reader.read(page).text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("width", "phone"), [(400, True), (500, True), (500, False)])
def test_long_paths_do_not_widen_the_page(
    own: Path, tmp_path: Path, width: int, phone: bool
) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.size(width, 900, phone=phone)
        tab.open(own.as_uri())
        tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        tab.listen(0.5)
        assert tab.run(f"document.getElementById('own').innerText.includes('{LONG_PATH}')")
        wide, seen = tab.run(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= seen <= width
        assert tab.complaints() == []


class Pool(Executor):
    """Draws at once: an SVG that says what it shows, or an error where ``refused`` is asked for."""

    def __init__(self, refused: str) -> None:
        self.refused = refused
        self.asked: list[str] = []

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        _, figure, values, folder = args
        done: Future[Any] = Future()
        self.asked.append(values["runs"])
        if values["runs"] and values["runs"] == self.refused:
            done.set_result(Drawn("no such score"))
        else:
            (Path(folder) / f"{figure}.svg").write_text(f"<svg>{values['runs']}</svg>")
            done.set_result(Drawn("", tuple(filter(None, values["runs"].split(",")))))
        return done


def project_of_one_figure(root: Path) -> Project:
    for name in ("notebooks", "analysis"):
        (root / name).mkdir()
    source = 'runs = ""  # str: results\nout_dir = "."  # str: folder'
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    (root / "notebooks" / "fig_a.ipynb").write_text(json.dumps({"cells": [cell]}))
    (root / "analysis" / "fig_a.py").write_text('"""A figure."""\nTITLE = "A"\n')
    return Project(root)


def drawn_by(pool: Pool, project: Project, more: dict[str, list[Path]]) -> Picture:
    drawing = Drawing(project, more)
    with drawing.locked():
        drawing.start(pool)
        (picture,) = drawing.finish()
    return picture


def test_a_figure_that_fails_with_own_results_is_drawn_without(tmp_path: Path) -> None:
    project, own = project_of_one_figure(tmp_path), tmp_path / "own"
    pool = Pool(str(own))
    picture = drawn_by(pool, project, {"runs": [own]})
    assert pool.asked == [str(own), ""]
    assert (picture.alone, picture.absent, picture.failed) == ("no such score", "", True)
    assert (picture.offered, picture.joined) == ((own,), ())
    assert picture.parts[0].svg == "<svg></svg>"


def test_own_results_leave_the_projects_drawing_as_it_is(tmp_path: Path) -> None:
    project, own, pool = project_of_one_figure(tmp_path), tmp_path / "own", Pool("")
    more = {"runs": [own], "probes": [tmp_path / "probe"]}
    for _ in range(2):
        assert drawn_by(pool, project, {}).parts[0].svg == "<svg></svg>"
        mine = drawn_by(pool, project, more)
        assert mine.parts[0].svg == f"<svg>{own}</svg>"
        assert (mine.offered, mine.joined, mine.alone) == ((own,), (own,), "")
    assert pool.asked == ["", str(own)]
