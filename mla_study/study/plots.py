"""One look for all figures, their small print, and files that are the same bytes on every machine.

Example::

    with style():
        figure, axes = plt.subplots()
        ...
        stamp(figure, "measured", "full", run_hash)
        save_figure(figure, "results/figures/fig1_spectra")
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.study.runs import Provenance, Validity, atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLUMN_WIDTH = 3.4  # inches, one column of a two-column page
PAGE_WIDTH = 7.0  # inches, both columns
FORMATS = ("pdf", "png", "svg")
STYLE = Path(__file__).with_name("mla_study.mplstyle")

# Okabe and Ito's colours, told apart with any colour vision, in the order of the style's cycle.
COLOURS = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
NULL_COLOUR = "#999999"  # null models are always this grey
EPOCH = "0"  # SOURCE_DATE_EPOCH: 1970-01-01
SMALL_PRINT = {"pdf": "Subject", "png": "Description", "svg": "Description"}
METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"Creator": "mla_study", "Producer": "matplotlib", "CreationDate": None},
    "png": {"Software": "mla_study"},
    "svg": {"Creator": "mla_study", "Date": None},
}


_wanted: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "formats", default=FORMATS
)


@contextlib.contextmanager
def only(*formats: str) -> Generator[None]:
    """Inside, :func:`save_figure` writes these formats where it is asked for no others."""
    token = _wanted.set(formats)
    try:
        yield
    finally:
        _wanted.reset(token)


_noted: contextvars.ContextVar[set[Path] | None] = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def noting_results() -> Generator[set[Path]]:
    """Inside, the folders that :func:`note_results` is told join the set that this gives."""
    noted: set[Path] = set()
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_results(folders: Iterable[Path]) -> None:
    """Say that a figure shows numbers of these result folders."""
    noted = _noted.get()
    if noted is not None:
        noted.update(folder.resolve() for folder in folders)


@contextlib.contextmanager
def style() -> Generator[None]:
    """Matplotlib's defaults plus the project's one style, whatever the user's own settings are."""
    import matplotlib as mpl
    from matplotlib.style import use

    with mpl.rc_context():
        backend = mpl.rcParams["backend"]
        mpl.rcParams.update({k: v for k, v in mpl.rcParamsDefault.items() if k != "backend"})
        use(STYLE)
        mpl.rcParams["backend"] = backend
        yield


def stamp(
    figure: Figure,
    provenance: Provenance | Iterable[Provenance],
    validity: Validity,
    run_hash: str,
) -> Text:
    """Print class, validity and the first twelve digits of the run hash under the figure.

    :param provenance: one class, or all that the figure shows.
    """
    kinds = [provenance] if isinstance(provenance, str) else list(dict.fromkeys(provenance))
    note = f"{' + '.join(kinds)} · {validity} · run {run_hash[:12]}"
    # As a supxlabel it gets room of its own from the constrained layout.
    return figure.supxlabel(note, fontsize=4.5, color="0.45", ha="right", x=0.995)


def save_figure(
    figure: Figure, stem: Path | str, formats: Iterable[str] | None = None
) -> dict[str, Path]:
    """Write ``{stem}.{format}`` for each format; each file is complete or absent.

    The bytes depend on the figure, matplotlib and its bundled fonts only: no date, no random ids,
    and a file does not depend on which others are written. What :func:`stamp` printed stands in
    their metadata too.

    :param stem: path without a suffix; folders are made.
    :param formats: by default all, or those of :func:`only`.
    :return: format -> path.
    :raises UserError: an unknown format, or a folder that cannot be written.
    """
    import matplotlib as mpl

    stem = Path(stem)
    wanted = list(_wanted.get() if formats is None else formats)
    unknown = [name for name in wanted if name not in METADATA]
    if unknown:
        raise UserError(f"Figures are saved as {', '.join(METADATA)}, not as {unknown[0]}.")
    paths = {name: stem.with_name(f"{stem.name}.{name}") for name in wanted}
    fixed: dict[Any, Any] = {"svg.hashsalt": "mla_study", "svg.fonttype": "path"}
    fixed |= {"pdf.fonttype": 42, "pdf.compression": 0, "savefig.dpi": 300}
    told = figure.get_supxlabel()
    about = {k: {**v, **({SMALL_PRINT[k]: told} if told else {})} for k, v in METADATA.items()}
    with _source_date_epoch(), mpl.rc_context(fixed), _laid_out(figure):
        for name, path in paths.items():
            atomic_write(
                path,
                lambda to, name=name: figure.savefig(to, format=name, metadata=about[name]),
            )
    return paths


@contextlib.contextmanager
def _laid_out(figure: Figure) -> Generator[None]:
    """Lay the figure out once, with the same letter widths whatever the backend.

    Each further pass would move its axes by a trace.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    canvas, engine = figure.canvas, figure.get_layout_engine()
    FigureCanvasSVG(figure)  # becomes the figure's
    figure.draw_without_rendering()
    figure.set_canvas(canvas)
    figure.set_layout_engine("none")
    try:
        yield
    finally:
        figure.set_layout_engine(engine)


@contextlib.contextmanager
def _source_date_epoch() -> Generator[None]:
    before = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = EPOCH
    try:
        yield
    finally:
        if before is None:
            del os.environ["SOURCE_DATE_EPOCH"]
        else:
            os.environ["SOURCE_DATE_EPOCH"] = before
