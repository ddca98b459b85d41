"""What a page of the report says, read without a browser: elements with their attributes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_EMPTY = {"img", "meta", "link", "input", "br", "track", "hr"}


@dataclass
class Element:
    """An element with its children; ``text`` is all text in it."""

    name: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        return self.attributes[f"data-{name}"]

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def all(self, name: str = "", *data: str, **equal: str) -> Iterator[Element]:
        """Elements below, of a name, that have these data attributes, some of them equal."""
        for child in self.children:
            held = child.attributes
            fits = not name or child.name == name
            fits = fits and all(f"data-{key}" in held for key in (*data, *equal))
            if fits and all(held[f"data-{key}"] == value for key, value in equal.items()):
                yield child
            yield from child.all(name, *data, **equal)

    def one(self, name: str = "", *data: str, **equal: str) -> Element:
        """The only such element."""
        (found,) = self.all(name, *data, **equal)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("page", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in _EMPTY:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].name == tag, f"</{tag}> closes <{self._open[-1].name}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.pieces.append(data)


def read(page: Path) -> Element:
    """The page; every element must be closed in its turn."""
    reader = _Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader._open == [reader.root]
    return reader.root


def chart(page: Element, name: str) -> dict[str, Any]:
    """Data of a chart."""
    return json.loads(page.one("script", chart=name).text)
