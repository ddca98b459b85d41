from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from mla_study.errors import UserError
from mla_study.study import plots

DRAW = """
import sys
from matplotlib import pyplot as plt
from mla_study.study.plots import save_figure, stamp, style
with style():
    figure, axes = plt.subplots()
    axes.plot([0, 1, 4], label="σ² of W")
    axes.fill_between([0, 1], [1, 2], [2, 3], alpha=0.3, hatch="//")
    axes.set(yscale="symlog", xlabel=r"$k / n$", title="energy")
    axes.legend()
    stamp(figure, ["measured", "null-model"], "full", "0123456789abcdef")
    save_figure(figure, sys.argv[1])
"""


@pytest.fixture(autouse=True)
def close_figures() -> object:
    yield
    plt.close("all")


def test_same_bytes_whatever_the_user_has_set(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: none\nlines.color: r\n")
    settings: tuple[dict[str, str], ...] = (
        {"PYTHONHASHSEED": "1", "TZ": "UTC", "MPLBACKEND": "agg"},
        {
            "PYTHONHASHSEED": "2",
            "TZ": "Asia/Tokyo",
            "MPLBACKEND": "svg",
            "SOURCE_DATE_EPOCH": "99999",
            "MATPLOTLIBRC": str(tmp_path),
            "LC_ALL": "C",
        },
    )
    for name, environment in zip("ab", settings, strict=True):
        command = [sys.executable, "-c", DRAW, str(tmp_path / name / "fig")]
        subprocess.run(command, check=True, env={**os.environ, **environment})
    for suffix in plots.FORMATS:
        first, second = ((tmp_path / name / f"fig.{suffix}").read_bytes() for name in "ab")
        assert first == second, suffix
    pdf = (tmp_path / "a" / "fig.pdf").read_bytes()
    assert b"DejaVuSans" in pdf
    assert b"CreationDate" not in pdf
    assert b"<text" not in (tmp_path / "a" / "fig.svg").read_bytes()


def test_style_is_put_back_and_the_cycle_is_okabe_ito() -> None:
    before = dict(mpl.rcParams)
    with plots.style():
        figure, _ = plt.subplots()
        assert figure.get_size_inches()[0] == plots.COLUMN_WIDTH
        cycle = [to_hex(entry["color"]).upper() for entry in mpl.rcParams["axes.prop_cycle"]]
        assert min(mpl.rcParams[key] for key in ("font.size", "legend.fontsize")) >= 6
    assert cycle == list(plots.COLOURS.values())
    assert dict(mpl.rcParams) == before


def test_stamp_prints_class_validity_and_hash_inside_the_figure() -> None:
    with plots.style():
        figure, axes = plt.subplots()
        axes.plot([0, 1])
        axes.set_xlabel("layer")
        text = plots.stamp(figure, "paper-quoted", "partial", "0123456789abcdef")
        assert text.get_text() == "paper-quoted · partial · run 0123456789ab"
        figure.canvas.draw()
        box = text.get_window_extent()
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
        assert not box.overlaps(axes.xaxis.label.get_window_extent())


def test_unknown_format_and_unwritable_folder(tmp_path: Path) -> None:
    figure = plt.figure()
    with pytest.raises(UserError, match="not as jpg"):
        plots.save_figure(figure, tmp_path / "fig", ["png", "jpg"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        plots.save_figure(figure, tmp_path / "file" / "fig")
    # A stem with dots keeps them.
    paths = plots.save_figure(figure, tmp_path / "fig_0.99", ["png"])
    assert paths["png"].name == "fig_0.99.png"
