from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_study.errors import UserError
from mla_study.study import notebooks
from mla_study.study.notebooks import Parameter, Project, discover, parse_assignments, select

from .conftest import Checkout


def test_figures_are_found_in_natural_order_with_what_they_declare(checkout: Checkout) -> None:
    for name in ("fig10_line", "fig2_line", "table1"):
        checkout.add(name)
    (checkout.root / "notebooks" / "Untitled.ipynb").write_text("{}")
    figures = discover(Project(checkout.root))
    assert [figure.id for figure in figures] == ["fig2_line", "fig10_line", "table1"]
    figure = figures[0]
    assert figure.title == "A line"
    assert figure.provenance == ("null-model",)
    assert figure.data == ("results/data/line",)
    assert figure.parameters["label"] == Parameter("label", "a line")
    assert figure.values({"slope": "2e-3", "other": "x"}) == {
        "slope": 2e-3,
        "label": "a line",
        "count": 3,
        "marks": [1, 2],
        "loud": False,
    }


def test_selection_by_id_and_by_its_beginning(checkout: Checkout) -> None:
    for name in ("fig1_line", "fig10_line", "fig1_other"):
        checkout.add(name)
    figures = discover(Project(checkout.root))

    def ids(*names: str) -> list[str]:
        return [figure.id for figure in select(figures, names)]

    assert ids() == ["fig1_line", "fig1_other", "fig10_line"]
    assert ids("fig1") == ["fig1_line", "fig1_other"]
    assert ids("fig10", "fig1_l") == ["fig10_line", "fig1_line"]
    with pytest.raises(UserError, match=r"did you mean fig1_other\?.*choose from fig1_line"):
        ids("fig1_othr")
    with pytest.raises(UserError, match=r"did you mean fig10?\?"):
        ids("fgi1")


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [
        (1, "7", 7),
        (1.0, "7", 7.0),
        (1.0, "inf", float("inf")),
        ("x", "7", "7"),
        (True, "no", False),
        ([1], "[1, 2.5]", [1, 2.5]),
        ((1,), "[3]", (3,)),
        ({}, '{"a": 1}', {"a": 1}),
        (None, "text", "text"),
        (1.0, 3, 3.0),
    ],
)
def test_types_come_from_the_default(default: object, text: object, value: object) -> None:
    parsed = Parameter("p", default).parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("default", "text"),
    [(1, "1.5"), (1.0, "x"), (True, "maybe"), ([1], "1"), ([1], "[1"), ("x", 3), ({}, "[]")],
)
def test_values_of_another_type_are_refused(default: object, text: object) -> None:
    with pytest.raises(UserError, match="Parameter p = "):
        Parameter("p", default).parse(text)


def test_assignments() -> None:
    assert parse_assignments(["a=1", "b= x=y"]) == {"a": "1", "b": " x=y"}
    assert parse_assignments([]) == {}
    for wrong in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(UserError):
            parse_assignments(wrong)


def test_outputs_and_metadata_do_not_change_what_a_notebook_says(checkout: Checkout) -> None:
    checkout.add("fig1_line")
    file = checkout.root / "notebooks" / "fig1_line.ipynb"
    before = notebooks.notebook_cells(file)
    content = json.loads(file.read_text())
    for cell in content["cells"]:
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
        cell["execution_count"] = 4
        cell["source"] = cell["source"].splitlines(keepends=True)
    file.write_text(json.dumps(content, indent=3))
    assert notebooks.notebook_cells(file) == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": [{}]}', "\0"])
def test_no_notebook(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.ipynb"
    file.write_text(text)
    with pytest.raises(UserError, match="cannot be read as a notebook"):
        notebooks.notebook_cells(file)


def test_constants_must_be_literals(checkout: Checkout) -> None:
    checkout.add("fig1_line", module="TITLE = str(1)\n")
    with pytest.raises(UserError, match="TITLE must be a literal"):
        discover(Project(checkout.root))
    checkout.add("fig1_line", module="def broken(:\n")
    with pytest.raises(UserError, match="does not parse"):
        discover(Project(checkout.root))


def test_project_is_found_from_below(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    below = checkout.root / "results" / "data"
    monkeypatch.chdir(below)
    assert Project.find().root == checkout.root
    assert Project.find().figures == checkout.figures
    assert Project.find(below).figures == below
