"""The page: templates filled with what was found, styles and scripts put in."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mla_study.errors import UserError
from mla_study.report.charts import Chart, plain
from mla_study.report.films import VARIANTS, Film
from mla_study.report.folders import Folder
from mla_study.report.pictures import Picture
from mla_study.study.claims.ledger import NONE
from mla_study.study.claims.model import Number, Outcome, Role, Verdict, spell

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

MEANINGS: dict[Verdict, str] = {
    "supported": "Measured here, and the numbers pass the claim's rule.",
    "not supported": "The numbers, ours or the paper's own, say otherwise.",
    "not distinguished from null": "Chance, or doing nothing, gives the same.",
    "arithmetic only": "Follows from sizes that were chosen or from published numbers; says "
    "nothing about trained models.",
    "not testable here": "Something is missing, and the claim says what.",
}
SIGNS: dict[Verdict, str] = {
    "supported": "✓",
    "not supported": "✗",
    "not distinguished from null": "≈",
    "arithmetic only": "=",
    "not testable here": "?",
}
ROLES: dict[Role, str] = {
    "stated": "The paper states",
    "found": "What decides",
    "premise": "What the claim presupposes",
    "null": "Set against",
    "beside": "Beside it",
}
NO_MACHINE = "no machine: published values or counting"


@dataclass(frozen=True)
class Content:
    """All that the page shows.

    Attributes:
        own: a user's results, by the folder that was given.
        stand_ins: those of them by which a claim was judged, by its id.
    """

    outcomes: Sequence[Outcome]
    pictures: Sequence[Picture]
    charts: Sequence[Chart]
    films: Sequence[Film]
    folders: Sequence[Folder]
    own: Mapping[str, Sequence[Folder]]
    stand_ins: Mapping[str, Sequence[Path]]
    command: str
    version: str


def render(content: Content) -> str:
    """The whole page as HTML.

    Raises:
        UserError: Jinja is not installed.
    """
    environment = _environment()
    shown = {one.claim.figure for one in content.outcomes}
    return environment.get_template("page.html.jinja").render(
        content=content,
        verdicts=[(verdict, SIGNS[verdict], MEANINGS[verdict]) for verdict in get_args(Verdict)],
        counts=Counter(one.verdict for one in content.outcomes),
        scales=list(dict.fromkeys(one.scale for one in content.outcomes)),
        pictures={picture.id: picture for picture in content.pictures},
        charts_of={
            picture.id: [chart for chart in content.charts if chart.figure == picture.id]
            for picture in content.pictures
        },
        claims_of={
            name: [one for one in content.outcomes if one.claim.figure == name] for name in shown
        },
        joins=_joins(content),
        names_of={
            folder.place: folder.name for folders in content.own.values() for folder in folders
        },
        unshown={one.id: _unshown(content, one) for one in content.outcomes},
        film_rows=_rows(content.films),
        roles=ROLES,
        signs=SIGNS,
        variants=VARIANTS,
        no_machine=NO_MACHINE,
    )


def _joins(content: Content) -> dict[Path, tuple[list[Picture], list[Picture]]]:
    """The figures that show a result of the user's, and those that might but hold none of it."""
    return {
        folder.place: (
            [picture for picture in content.pictures if folder.place in picture.joined],
            [
                picture
                for picture in content.pictures
                if folder.place in picture.offered and folder.place not in picture.joined
            ],
        )
        for folders in content.own.values()
        for folder in folders
    }


def _unshown(content: Content, one: Outcome) -> list[Path]:
    """The user's results that a claim was judged by and that its figure does not show."""
    shown = {place for p in content.pictures if p.id == one.claim.figure for place in p.joined}
    return [place for place in content.stand_ins.get(one.id, ()) if place not in shown]


def _rows(films: Sequence[Film]) -> list[tuple[str, list[Film]]]:
    prompts = dict.fromkeys(film.prompt for film in films)
    return [(prompt, [film for film in films if film.prompt == prompt]) for prompt in prompts]


def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise UserError(
            "the report needs the package jinja2: pip install 'mla-study[report]'"
        ) from None
    from mla_study.report import texts

    environment: Any = Environment(
        loader=PackageLoader("mla_study.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "formula": texts.formula,
        "plain": texts.plain,
        "picture": texts.picture_uri,
        "size": texts.picture_size,
        "uri": _uri,
        "slug": slug,
        "chart": _chart,
        "short": _short,
        "bounds": bounds,
        "exact": exact,
        "spell": spell,
    }
    environment.globals |= {"table_of": texts.table_of, "static": static, "nothing": NONE}
    return environment


def _chart(chart: Chart) -> Markup:
    return script(plain(chart))


def _short(sha: str) -> str:
    return sha[:12]


def slug(text: str) -> str:
    """A name for classes and anchors."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text).split()).lower()


def exact(value: float | None) -> str:
    """A number for a data attribute: all its digits, nothing where there is none."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def bounds(number: Number) -> str:
    """The interval of a number as text."""
    if not (math.isfinite(number.low) and math.isfinite(number.high) and number.low < number.high):
        return ""
    return f"{spell(number.low)} to {spell(number.high)}"


def script(value: Any) -> Markup:
    """JSON that can stand inside a script element."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def static(name: str) -> Markup:
    """A file of ``static/``, as it is."""
    from markupsafe import Markup

    file = resources.files("mla_study.report") / "static" / name
    text = file.read_text(encoding="utf-8")
    if "</s" in text.lower():
        raise ValueError(f"{name} would end its own element")
    return Markup(text)


def _uri(content: bytes | str, kind: str) -> str:
    from mla_study.report.texts import data_uri

    return data_uri(kind, content.encode() if isinstance(content, str) else content)
