"""Texts on their way into HTML: formulas, Markdown tables of our own making, pictures as URIs.

>>> str(formula("$r_{.99}$ of $d_c$"))
'<i>r</i><sub>.99</sub> of <i>d</i><sub>c</sub>'
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup, escape

_GREEK = {r"\sigma": "σ", r"\rho": "ρ", r"\times": "×", r"\uparrow": "↑", r"\downarrow": "↓",
          r"\pm": "±", r"\cdot": "·", r"\leq": "≤", r"\geq": "≥",
          r"\,": " ", r"\%": "%"}  # fmt: skip
_MATH = re.compile(r"\$([^$]+)\$")
_SHIFTED = re.compile(r"([_^])(?:\{([^{}]*)\}|(.))")
_NAME = re.compile(r"\\(?:mathrm|mathbf|text|operatorname)\{([^{}]*)\}")
_MARKED = re.compile(r"^(\*\*|\*)(.+)\1$", re.DOTALL)
_PATH = re.compile(r'\bd="[^"]+"')
_DECIMALS = re.compile(r"(\.\d\d)\d+")
_UNSEEN = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_SIZE = re.compile(r'<svg[^>]*?\bwidth="([\d.]+)pt"[^>]*?\bheight="([\d.]+)pt"', re.DOTALL)
PX_A_POINT = 96 / 72


@dataclass(frozen=True)
class TableCell:
    """A cell: its text, its mark (``strong``, ``em`` or empty), and its number if it has one."""

    text: str
    mark: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table that :func:`mla_study.study.tables.markdown` wrote, taken apart.

    Attributes:
        groups: heading that neighbouring columns share, and how many; empty where none do.
        right: whether a column's text stands to the right.
    """

    title: str
    groups: tuple[tuple[str, int], ...]
    heads: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    notes: tuple[str, ...]


def formula(text: str) -> Markup:
    """Text with formulas between dollar signs, as HTML."""
    parts = _MATH.split(text)
    return Markup("").join(
        _formula(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def plain(text: str) -> str:
    """The same without any markup."""
    return Markup(formula(text)).striptags()


def _formula(text: str) -> Markup:
    text = _NAME.sub(r"\1", text)
    for name, letter in _GREEK.items():
        text = text.replace(name, letter)
    made, at = Markup(""), 0
    for found in _SHIFTED.finditer(text):
        tag = "sub" if found[1] == "_" else "sup"
        made += _letters(text[at : found.start()])
        made += Markup("<{0}>{1}</{0}>").format(Markup(tag), found[2] or found[3])
        at = found.end()
    return made + _letters(text[at:])


def _letters(text: str) -> Markup:
    """Single letters are variables."""
    parts = re.split(r"(?<![A-Za-zÀ-ɏ])([A-Za-z])(?![A-Za-zÀ-ɏ])", text)
    return Markup("").join(
        Markup("<i>{}</i>").format(part) if number % 2 else escape(part)
        for number, part in enumerate(parts)
    )


def table_of(markdown: str, values: str = "") -> Table:
    """A table from its Markdown, with the numbers of its CSV where that has the same shape."""
    lines = [line for line in markdown.splitlines() if line]
    grid = [_cells(line) for line in lines if line.startswith("|")]
    others = [line for line in lines if not line.startswith("|")]
    title = ""
    if others and (found := _MARKED.match(others[0])):
        title, others = found[2], others[1:]
    heads, rules, body = grid[0], grid[1], grid[2:]
    numbers = list(csv.reader(io.StringIO(values)))[1:]
    rows: list[tuple[TableCell, ...]] = []
    for number, row in enumerate(body):
        mine = numbers[number] if number < len(numbers) and len(numbers[number]) == len(row) else []
        rows.append(tuple(_cell(text, *mine[i : i + 1]) for i, text in enumerate(row)))
    right = tuple(rule.endswith(":") and not rule.startswith(":") for rule in rules)
    groups, heads = _grouped(heads)
    return Table(title, groups, heads, right, tuple(rows), tuple(others))


def _grouped(heads: list[str]) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """``group: head`` taken apart, where a group has several columns."""
    split = [
        (over, own) if own else ("", over) for over, _, own in (h.partition(": ") for h in heads)
    ]
    groups: list[tuple[str, int]] = []
    shown: list[str] = []
    for over, mine in groupby(zip(split, heads, strict=True), lambda pair: pair[0][0]):
        held = list(mine)
        alone = not over or len(held) == 1
        groups.append(("" if alone else over, len(held)))
        shown += [whole if alone else own for (_, own), whole in held]
    return (tuple(groups) if any(name for name, _ in groups) else ()), tuple(shown)


def _cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line)[1:-1]
    return [part.strip().replace("\\|", "|") for part in parts]


def _cell(text: str, number: str = "") -> TableCell:
    mark = ""
    if found := _MARKED.match(text):
        mark, text = {"**": "strong", "*": "em"}[found[1]], found[2]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    return TableCell(text, mark, value if math.isfinite(value) else None)


def picture_uri(svg: str) -> str:
    """An SVG as a data URI: without its metadata, paths to a hundredth of a point."""
    svg = _UNSEEN.sub("", svg[svg.index("<svg") :])
    svg = _PATH.sub(lambda found: _DECIMALS.sub(r"\1", " ".join(found[0].split())), svg)
    svg = re.sub(r">\s+<", "><", svg).replace("\n", " ")
    if "'" in svg:
        return data_uri("image/svg+xml", svg.encode())
    for letter, code in {"%": "%25", "#": "%23", "<": "%3C", ">": "%3E", "&": "%26"}.items():
        svg = svg.replace(letter, code)
    return "data:image/svg+xml," + svg.replace('"', "'")


def picture_size(svg: str) -> tuple[int, int]:
    """Width and height in CSS pixels."""
    found = _SIZE.search(svg)
    if found is None:
        return 640, 480
    return round(float(found[1]) * PX_A_POINT), round(float(found[2]) * PX_A_POINT)


def data_uri(kind: str, content: bytes) -> str:
    """Any content as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
