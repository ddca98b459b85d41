"""A table as a figure: a data frame set like a printed table, with its CSV and Markdown beside it.

Example::

    columns = (Column("layout", "Layout"), Column("fps", "FPS", ".1f", best="max"))
    with style():
        figure = save_table(frame, "results/figures/table3", columns, title="Throughput",
                            provenance="measured", validity="full", run_hash=run_hash)

What is drawn goes through :func:`cells`, so that picture and Markdown show the same text; the CSV
holds the numbers themselves. Values quoted from a paper stand in grey italics.
"""

from __future__ import annotations

import math
import numbers
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mla_study.errors import UserError
from mla_study.study.plots import COLUMN_WIDTH, PAGE_WIDTH, save_figure, stamp
from mla_study.study.runs import Provenance, Validity, atomic_write, round_significant

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Align = Literal["left", "right", "center"]
MISSING = "–"
QUOTED_COLOUR = "0.42"

# inches, and points of type
_SIZE, _SMALLEST = 7.0, 4.5
_LEADING, _RISE = 1.38, 0.6  # line height, and height of a letter with its share of descenders
_GAP, _MARGIN, _ROW_PAD = 0.13, 0.06, 0.035


@dataclass(frozen=True)
class Column:
    """How a column of the frame is shown.

    Attributes:
        name: of the column in the frame.
        header: its heading, by default the name; ``\\n`` breaks lines.
        spec: format of numbers, such as ``.2f`` or ``+.1%``; by default four significant digits.
        align: by default text goes left and numbers right.
        under: heading that neighbouring columns share.
        quoted: its values are another paper's.
        own: its values are worked out here even in rows that are quoted.
        best: the extreme that is set in bold.
        least: the values' resolution: what lies nearer to 0 is shown as 0.
    """

    name: str
    header: str | None = None
    spec: str = ""
    align: Align | None = None
    under: str = ""
    quoted: bool = False
    own: bool = False
    best: Literal["max", "min"] | None = None
    least: float = 0.0

    @property
    def title(self) -> str:
        """The heading."""
        return self.name if self.header is None else self.header


def spell(value: object, spec: str = "", least: float = 0.0) -> str:
    """A value as text: numbers by ``spec``, truth as yes and no, what is missing as a dash.

    What is nearer to 0 than ``least``, or than the digits of ``spec`` show, is a 0 without a sign.

    >>> spell(0.82, ".1f"), spell(1234.5), spell(float("nan")), spell(True)
    ('0.8', '1234', '–', 'yes')
    >>> spell(-3.3e-8, ".3g", 1e-7), spell(-0.004, ".2f")
    ('0', '0.00')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, str):
        return value
    if str(value) in ("<NA>", "NaT"):
        return MISSING
    if isinstance(value, bool) or type(value).__name__ == "bool":
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral) and not spec:
        return str(value)
    if isinstance(value, numbers.Real):
        number = float(value) if spec and spec[-1] != "d" else value
        text = format(number, spec or ".4g")
        none = text.startswith("-") and not any(sign in text for sign in "123456789in")
        if none or abs(float(value)) < least:  # "in": -inf keeps its sign
            text = format(abs(number * 0), spec or ".4g")
        return text.replace("-", "−") if not spec or spec[-1] not in "e" else text
    return str(value)


def cells(frame: pd.DataFrame, columns: Sequence[Column]) -> list[list[str]]:
    """The text of every cell, row by row.

    Raises:
        UserError: a column that the frame lacks.
    """
    for column in columns:
        if column.name not in frame.columns:
            raise UserError(f"the table has no column '{column.name}': {', '.join(frame.columns)}")
    told = [
        [spell(value, column.spec, column.least) for value in frame[column.name]]
        for column in columns
    ]
    return [list(row) for row in zip(*told, strict=True)]


def markdown(
    frame: pd.DataFrame, columns: Sequence[Column], title: str = "", notes: Iterable[str] = (),
    quoted_rows: Iterable[int] = (),
) -> str:  # fmt: skip
    """The table in Markdown, quoted values in italics, the best in bold."""
    bold, quoted = _bold(frame, columns), set(quoted_rows)
    lines = [f"**{title}**", ""] if title else []
    heads = [
        f"{column.under}: {column.title}" if column.under else column.title for column in columns
    ]
    rules = {"left": ":--", "right": "--:", "center": ":-:"}
    lines.append(_row(heads))
    lines.append("|" + "|".join(rules[_align(frame, column)] for column in columns) + "|")
    for number, row in enumerate(cells(frame, columns)):
        shown = list[str]()
        for place, (text, column) in enumerate(zip(row, columns, strict=True)):
            mark = (
                "**"
                if (number, place) in bold
                else "*"
                if _is_quoted(column, number in quoted)
                else ""
            )
            shown.append(f"{mark}{text}{mark}" if text not in ("", MISSING) else text)
        lines.append(_row(shown))
    for note in notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def save_table(
    frame: pd.DataFrame,
    stem: Path | str,
    columns: Sequence[Column] = (),
    *,
    provenance: Provenance | Iterable[Provenance],
    validity: Validity,
    run_hash: str,
    title: str = "",
    notes: Sequence[str] = (),
    rule_before: Iterable[int] = (),
    width: float | None = None,
    quoted_rows: Iterable[int] = (),
) -> Figure:
    """Draw the table and write ``{stem}.{pdf,png,svg,csv,md}``; call it inside ``style()``.

    Args:
        columns: which to show and how; by default all of the frame.
        notes: sentences below the table, wrapped to its width.
        rule_before: rows (counted from 0) that a thin line sets off from the one above.
        width: inches; by default a column of the page if the table fits, else the page.
        quoted_rows: rows (counted from 0) of another paper's values, but for ``own`` columns.

    Raises:
        UserError: no rows, a column that is not there, a table too wide for a page, or files that
            cannot be written.
    """
    columns = tuple(columns) or tuple(Column(name) for name in frame.columns)
    stem, quoted_rows = Path(stem), set(quoted_rows)
    figure = draw_table(frame, columns, title, notes, rule_before, width, quoted_rows)
    stamp(figure, provenance, validity, run_hash)
    save_figure(figure, stem)
    shown = round_significant(frame[[column.name for column in columns]])
    text = shown.to_csv(index=False, lineterminator="\n")
    atomic_write(stem.with_name(f"{stem.name}.csv"), text.encode())
    kinds = [provenance] if isinstance(provenance, str) else list(dict.fromkeys(provenance))
    small = f"{' + '.join(kinds)}, {validity}, run {run_hash[:12]}"
    told = markdown(frame, columns, title, [*notes, small], quoted_rows)
    atomic_write(stem.with_name(f"{stem.name}.md"), told.encode())
    return figure


def draw_table(
    frame: pd.DataFrame,
    columns: Sequence[Column],
    title: str = "",
    notes: Sequence[str] = (),
    rule_before: Iterable[int] = (),
    width: float | None = None,
    quoted_rows: Iterable[int] = (),
) -> Figure:
    """The figure of :func:`save_table`, which says what the arguments mean; nothing is written."""
    import matplotlib.pyplot as plt

    rows = cells(frame, columns)
    if not rows:
        raise UserError("the table has no rows to draw")
    bold = _bold(frame, columns)
    wide, size, widths = _fitted(rows, columns, bold, width)
    line = size / 72 * _LEADING
    heights = [max(text.count("\n") + 1 for text in row) * line + _ROW_PAD for row in rows]
    head = max(column.title.count("\n") + 1 for column in columns) * line + _ROW_PAD
    over = line + _ROW_PAD if any(column.under for column in columns) else 0.0
    note_size = size - 1
    told = _wrapped(notes, wide - 2 * _MARGIN, note_size)
    below = len(told) * note_size / 72 * _LEADING + (0.05 if told else 0.0)
    above = 1.5 * line if title else 0.0
    high = 2 * _MARGIN + above + over + head + sum(heights) + below + 0.16
    figure = plt.figure(figsize=(wide, high), layout="none")
    sheet = _Sheet(figure, wide, high)

    slack = (wide - 2 * _MARGIN - sum(widths)) / max(len(columns) - 1, 1)
    lefts = [_MARGIN + sum(widths[:i]) + i * slack for i in range(len(columns))]
    anchors = {
        "left": lambda i: lefts[i],
        "right": lambda i: lefts[i] + widths[i],
        "center": lambda i: lefts[i] + widths[i] / 2,
    }
    y = _MARGIN
    if title:
        sheet.text(_MARGIN, y, title, size, weight="bold")
        y += above
    sheet.rule(y, 0.9)
    if over:
        for name, group in groupby(range(len(columns)), lambda i: columns[i].under):
            if name:
                places = list(group)
                start, stop = lefts[places[0]], lefts[places[-1]] + widths[places[-1]]
                sheet.text((start + stop) / 2, y + _ROW_PAD / 2, name, size, "center")
                sheet.rule(y + over, 0.35, start, stop)
        y += over
    for i, column in enumerate(columns):
        align = _align(frame, column)
        free = head - _ROW_PAD - (column.title.count("\n") + 1) * line  # headings stand at the foot
        sheet.text(anchors[align](i), y + _ROW_PAD / 2 + free, column.title, size, align)
    y += head
    sheet.rule(y, 0.5)
    set_off, quoted = set(rule_before), set(quoted_rows)
    for number, row in enumerate(rows):
        if number in set_off:
            sheet.rule(y, 0.3, colour="0.6")
        for i, (text, column) in enumerate(zip(row, columns, strict=True)):
            align = _align(frame, column)
            look: dict[str, Any] = {"weight": "bold"} if (number, i) in bold else {}
            if _is_quoted(column, number in quoted):
                look |= {"style": "italic", "color": QUOTED_COLOUR}
            sheet.text(anchors[align](i), y + _ROW_PAD / 2, text, size, align, **look)
        y += heights[number]
    sheet.rule(y, 0.9)
    sheet.text(_MARGIN, y + 0.05, "\n".join(told), note_size, color="0.25")
    return figure


class _Sheet:
    """A figure addressed in inches from its upper left corner."""

    def __init__(self, figure: Figure, wide: float, high: float) -> None:
        self.figure, self.wide, self.high = figure, wide, high

    def text(
        self, x: float, top: float, text: str, size: float, align: Align = "left", **look: Any
    ) -> None:
        """Lines below each other, each on a baseline that does not depend on its letters."""
        for number, line in enumerate(text.split("\n")):
            base = top + (number * _LEADING + (_LEADING + _RISE) / 2) * size / 72
            place = (x / self.wide, 1 - base / self.high)
            self.figure.text(*place, line, fontsize=size, ha=align, va="baseline", **look)

    def rule(
        self,
        y: float,
        weight: float,
        start: float = _MARGIN,
        stop: float | None = None,
        colour: str = "black",
    ) -> None:
        from matplotlib.lines import Line2D

        end = self.wide - _MARGIN if stop is None else stop
        xs, at = (start / self.wide, end / self.wide), 1 - y / self.high
        self.figure.add_artist(Line2D(xs, (at, at), lw=weight, color=colour))


def _fitted(
    rows: Sequence[Sequence[str]],
    columns: Sequence[Column],
    bold: set[tuple[int, int]],
    width: float | None,
) -> tuple[float, float, list[float]]:
    """Width of the sheet, size of the type, and widths of the columns, in inches and points."""
    natural = [
        max(
            _inches(column.title, _SIZE),
            *(_inches(row[i], _SIZE, (n, i) in bold) for n, row in enumerate(rows)),
        )
        for i, column in enumerate(columns)
    ]
    # a heading that is wider than its columns widens the last of them
    for name, group in groupby(range(len(columns)), lambda i: columns[i].under):
        places = list(group)
        lacking = _inches(name, _SIZE) - sum(natural[i] + _GAP for i in places) + _GAP
        natural[places[-1]] += max(0.0, lacking)
    need = sum(natural) + _GAP * (len(columns) - 1)
    sheets = [width] if width is not None else [COLUMN_WIDTH, PAGE_WIDTH]
    wide = next((w for w in sheets if need <= w - 2 * _MARGIN), sheets[-1])
    scale = min(1.0, (wide - 2 * _MARGIN) / need)
    if scale * _SIZE < _SMALLEST:
        raise UserError(
            f"the table needs {need:.1f} inches at {_SIZE:g} points and does not fit {wide:g}: "
            "show fewer columns or break their headings"
        )
    return wide, scale * _SIZE, [scale * w for w in natural]


def _inches(text: str, size: float, bold: bool = False) -> float:
    """Width of text, that of its widest line."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    lines = [line for line in text.split("\n") if line.strip()]
    return max((TextPath((0, 0), s, prop=font).get_extents().width / 72 for s in lines), default=0)


def _wrapped(notes: Iterable[str], wide: float, size: float) -> list[str]:
    told: list[str] = []
    for note in notes:
        letters = max(20, int(len(note) * wide / max(_inches(note, size), 1e-6) * 0.97))
        told += textwrap.wrap(note, letters, break_long_words=False)
    return told


def _align(frame: pd.DataFrame, column: Column) -> Align:
    if column.align is not None:
        return column.align
    return "right" if frame[column.name].dtype.kind in "iuf" else "left"


def _is_quoted(column: Column, row: bool) -> bool:
    return column.quoted or (row and not column.own)


def _bold(frame: pd.DataFrame, columns: Sequence[Column]) -> set[tuple[int, int]]:
    """(row, column) of the best values."""
    found: set[tuple[int, int]] = set()
    for place, column in enumerate(columns):
        if column.best is None or column.name not in frame.columns:
            continue
        values = frame[column.name].astype(float)
        best = values.max() if column.best == "max" else values.min()
        found |= {(row, place) for row, value in enumerate(values) if value == best}
    return found


def _row(texts: Sequence[str]) -> str:
    clean = (text.replace("|", "\\|").replace("\n", " ") for text in texts)
    return f"| {' | '.join(clean)} |"


def rules_between(frame: pd.DataFrame, column: str) -> list[int]:
    """Rows at which a column's value changes: what ``rule_before`` takes to set groups off."""
    values = frame[column].tolist()
    return [i for i in range(1, len(values)) if values[i] != values[i - 1]]
