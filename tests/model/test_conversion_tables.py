"""The sweep as text and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from mla_study.model.conversion_tables import plot_sweep, sweep_text
from mla_study.model.latent_init import INITS

RUN = {"provenance": "measured", "validity": "full", "run_hash": "0123456789abcdef"}


def swept(layers: int) -> list[dict[str, Any]]:
    """Errors that fall with d_c; those of the largest come with what no cut leaves."""
    return [
        {
            "layer": layer,
            "init": init,
            "d_c": d_c,
            "decision": decision,
            "logit_error": 0.25 if decision == "shared_key" else 8 / d_c + layer / 10,
            "output_error": 0.125 if decision == "shared_key" else 4 / d_c,
        }
        for layer in range(layers)
        for init in INITS
        for d_c in (32, 16)
        for decision in (("latent_norm", "shared_key") if d_c == 32 else ("latent_norm",))
    ]


def test_the_text_has_a_line_a_size_and_the_floor() -> None:
    head, *lines = sweep_text(swept(3)).splitlines()
    assert head.split() == ["d_c", *INITS]
    assert [line.split()[:2] for line in lines[:2]] == [
        ["16", "0.600/0.250"],
        ["32", "0.350/0.125"],
    ]
    assert lines[2].split()[:3] == ["no", "cut", "0.250/0.125"]


@pytest.mark.parametrize(("layers", "title"), [(1, "one layer"), (3, "median of 3 layers")])
def test_the_figure_says_what_it_shows(
    layers: int, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plt, "close", lambda _: None)
    paths = plot_sweep(swept(layers), RUN, tmp_path / "sweep")
    assert set(paths) == {"png", "pdf"} and all(path.stat().st_size for path in paths.values())
    figure = plt.gcf()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*INITS, "no cut"]
    assert legend.get_title().get_text().startswith(title)
    left, right = figure.axes
    assert "d_c" in left.get_xlabel() and "dense" in left.get_ylabel()
    assert left.get_title() != right.get_title() and len(left.collections) == len(INITS)
    assert "measured" in figure.get_supxlabel()
    monkeypatch.undo()
    plt.close(figure)
