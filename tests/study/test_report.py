"""The parts of the report one by one, on a project made up for it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest

from mla_study.cli import main
from mla_study.errors import UserError
from mla_study.report import films, folders
from mla_study.report.drawing import draw
from mla_study.report.page import exact, script, slug, static
from mla_study.report.pictures import Drawing, Picture
from mla_study.report.texts import formula, picture_size, picture_uri, plain, table_of
from mla_study.study.notebooks import Project
from mla_study.study.plots import only, save_figure, stamp, style
from mla_study.study.runs import write_result
from mla_study.study.tables import Column, markdown


class Here(Executor):
    """An executor of this very process, so that a made-up project needs no other."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.drawn.append(str(args[1]))
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def drawn(root: Path) -> tuple[dict[str, Picture], list[str]]:
    """All pictures by id, and which of them were drawn anew."""
    drawing, here = Drawing(Project(root)), Here()
    with drawing.locked():
        drawing.start(here)
        return {picture.id: picture for picture in drawing.finish()}, here.drawn


def test_pictures_are_drawn_once_and_say_what_they_rest_on(
    make_checkout: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = make_checkout("figures")
    root: Path = checkout.root  # type: ignore[attr-defined]
    checkout.add("fig7_line")  # type: ignore[attr-defined]
    module = root / "analysis" / "fig7_line.py"
    broken = 'TITLE = "Broken"\nPROVENANCE = ("measured",)\nDATA = ()\n\n\ndef draw(out_dir):\n'
    checkout.add("figbroken", module=broken + "    raise ValueError('no such thing')\n")  # type: ignore[attr-defined]
    lost = broken.replace("DATA = ()", 'DATA = ("results/data/lost",)')
    checkout.add("figlost", module=lost + "    return None\n")  # type: ignore[attr-defined]
    run = {"run_hash": "0" * 64, "observed": {"device": {"cpu": "A processor", "cores": 2}}}
    (root / "results/data/line/run.json").write_text(json.dumps(run))
    for name in ("analysis", "analysis.fig7_line", "analysis.figbroken", "analysis.figlost"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)

    pictures, new = drawn(root)
    line = pictures["fig7_line"]
    assert sorted(new) == ["fig7_line", "figbroken"]
    assert (line.number, line.title, line.classes) == ("Fig. 7", "A line", ("null-model",))
    assert line.text == "A line." and line.hardware == ("A processor, 2 cores",)
    (part,) = line.parts
    assert (part.classes, part.validity, part.run) == (("null-model",), "full", "ab" * 6)
    assert part.svg.rstrip().endswith("</svg>") and part.table == ""
    assert pictures["figbroken"].failed and "no such thing" in pictures["figbroken"].absent
    assert "results/data/lost" in pictures["figlost"].absent and not pictures["figlost"].failed
    assert str(root) not in pictures["figlost"].absent

    again, new = drawn(root)
    assert new == ["figbroken"] and again["fig7_line"] == line
    module.write_text(module.read_text().replace("[0, slope]", "[1, slope]"))
    assert drawn(root)[1] == ["fig7_line", "figbroken"]


def test_a_figure_is_the_same_bytes_whichever_formats_are_drawn(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    def make(folder: Path) -> None:
        with style():
            figure, axes = plt.subplots(2, 2)
            axes[0, 0].plot([0, 1, 4], label="a long label of a line")
            axes[0, 0].legend()
            axes[1, 1].set(xlabel="k / n", ylabel="energy")
            figure.suptitle("two\nlines")
            stamp(figure, "measured", "full", "0123456789abcdef")
            save_figure(figure, folder / "x")
            plt.close(figure)

    make(tmp_path / "all")
    with only("svg"):
        make(tmp_path / "one")
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == ["x.svg"]
    svg = (tmp_path / "one" / "x.svg").read_bytes()
    assert svg == (tmp_path / "all" / "x.svg").read_bytes()
    assert "<dc:description>measured · full · run 0123456789ab<" in svg.decode()
    assert b"run 0123456789ab" in (tmp_path / "all" / "x.png").read_bytes()
    assert picture_size(svg.decode()) == (326, 230)
    uri = picture_uri(svg.decode())
    assert uri.startswith("data:image/svg+xml,%3Csvg") and "dc:description" not in uri
    assert not set('"<>#\n') & set(uri) and len(uri) < len(svg)


def test_formulas_become_html() -> None:
    assert formula(r"$\sigma_i / \sigma_1$ < $E(d_c)$") == (
        "σ<sub>i</sub> / σ<sub>1</sub> &lt; <i>E</i>(<i>d</i><sub>c</sub>)"
    )
    assert plain(r"$r_{.99}$ & more") == "r.99 & more"
    assert formula("<b>5 $") == "&lt;b&gt;5 $"


def test_tables_come_back_from_their_markdown() -> None:
    frame = pd.DataFrame({"name": ["a | b", "c"], "x": [1.25, 2.5], "y": [np.nan, 4.0]})
    columns = (
        Column("name", "Name"), Column("x", "$d_c$", ".2f", under="both", best="max"),
        Column("y", "y", ".1f", under="both", quoted=True),
    )  # fmt: skip
    made = table_of(
        markdown(frame, columns, "A title", ["A note.", "measured, full, run 0"]),
        frame.to_csv(index=False),
    )
    assert (made.title, made.heads, made.right) == (
        "A title",
        ("Name", "$d_c$", "y"),
        (False, True, True),
    )
    assert made.groups == (("", 1), ("both", 2))
    assert [[cell.text for cell in row] for row in made.rows] == [
        ["a | b", "1.25", "–"],
        ["c", "2.50", "4.0"],
    ]
    assert [[cell.value for cell in row] for row in made.rows] == [
        [None, 1.25, None],
        [None, 2.5, 4.0],
    ]
    assert (made.rows[1][1].mark, made.rows[1][2].mark, made.rows[0][0].mark) == (
        "strong",
        "em",
        "",
    )
    assert made.notes == ("A note.", "measured, full, run 0")


def test_folders_are_found_and_previewed(tmp_path: Path) -> None:
    frame = pd.DataFrame({"name": ["x" * 90] * 20, "value": np.arange(20) / 3, "flag": [True] * 20})
    for name in ("b", "deep/a"):
        write_result(
            tmp_path / name, {"table": frame, "rest": frame[:2]}, config={}, inputs={}, seed=None,
            modules=("mla_study.study.runs",), provenance="measured", validity="substitute",
            observed={"device": {"gpu": "A card"}},
        )  # fmt: skip
    found = folders.listed(tmp_path)
    assert [folder.name for folder in found] == ["b", "deep/a"]
    one = found[0]
    assert (one.provenance, one.validity, one.hardware) == ("measured", "substitute", "A card")
    assert [table.name for table in one.tables] == ["table", "rest"]
    first = one.tables[0]
    assert (first.rows, first.columns, len(first.cells)) == (20, 3, folders.ROWS)
    assert first.heads == ("value",) and first.cells[1] == (folders.Cell("0.3333", 1 / 3),)
    assert first.places[-1] == 19 and first.cells[-1] == (folders.Cell("6.333", 19 / 3),)
    (name, long), flag = first.same
    assert name == "name" and long.text.endswith("…") and flag == ("flag", folders.Cell("yes"))
    assert folders.listed(tmp_path / "b")[0].name == "b"
    (tmp_path / "b" / "rest.parquet").write_bytes((tmp_path / "b" / "table.parquet").read_bytes())
    assert folders.listed(tmp_path)[0].tables[1].altered == "altered since it was measured"


@pytest.mark.parametrize("place", ["", "nothing"])
def test_a_folder_without_results_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(UserError, match=r"holds no result|is no folder"):
        folders.listed(tmp_path / place)


@pytest.mark.slow
def test_films_are_the_same_bytes_and_play(tmp_path: Path) -> None:
    made = films.films(films.PROMPTS[:1], frames=24, scale=10)
    fps, trained, pixels = films.pixels_of(films.PROMPTS[:1], 24)
    for film in made:
        junk = [np.random.default_rng(i).random(10**6) for i in range(8)]
        del junk
        big = pixels[film.variant][0].repeat(10, 1).repeat(10, 2)
        assert films.encode(big, fps) == film.mp4 and trained == 12
    assert [film.variant for film in made] == list(films.VARIANTS)
    assert len({hashlib.sha256(film.mp4).hexdigest() for film in made}) == 3
    for film in made:
        assert len(film.mp4) < 300e3 and film.poster.startswith(b"\x89PNG")
        with av.open(io.BytesIO(film.mp4)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 24 and frames[0].shape == (240, 240, 3)
        assert film.seconds == 3 and film.trained == 1.5
        assert "00:00.000 --> 00:01.500" in film.captions and "2 training lengths" in film.captions
    # a red square in the middle of what the caption's own video starts with
    red, green, blue = np.asarray(frames_of(made[0])[0])[115:125, 115:125].reshape(-1, 3).mean(0)
    assert red > 180 and green < 60 and blue < 60


def frames_of(film: films.Film) -> list[np.ndarray]:
    with av.open(io.BytesIO(film.mp4)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_figure_that_fails_says_so_and_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "analysis").mkdir()
    assert "No module named" in draw(str(tmp_path), "no_such_figure", {}, str(tmp_path)).error


def test_small_things() -> None:
    assert slug("not distinguished from null") == "not-distinguished-from-null"
    assert exact(0.1) == "0.1" and exact(float("nan")) == "" and exact(None) == ""
    assert script({"a": "</script>"}) == '{"a":"\\u003c/script>"}'
    assert "uPlot" in static("uPlot.iife.min.js")
    assert "MIT" in static("uPlot-LICENSE.txt")


def test_outside_a_checkout_one_sentence_says_where_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(output: Path | None = None) -> Project:
        raise UserError("no checkout")

    monkeypatch.setattr(Project, "find", none)
    assert main(["report", "--out", str(tmp_path / "x.html")]) == 2
    said = capsys.readouterr().err
    assert "is made in a checkout" in said and said.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_bad_options_are_told_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, word in (
        (["--jobs", "0"], "--jobs"), (["--out", str(tmp_path)], "is a folder"),
        (["--results", str(tmp_path)], "holds no result"),
    ):  # fmt: skip
        assert main(["report", *options]) == 2
        assert word in capsys.readouterr().err


def test_workers_ignore_the_interrupt_that_their_parent_hears() -> None:
    import signal

    from mla_study.report.drawing import prepare

    with ProcessPoolExecutor(1, initializer=prepare) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
