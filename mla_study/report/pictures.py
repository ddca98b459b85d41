"""Figures and tables of the page: taken from ``results/figures`` where they are up to date.

What is not is drawn here, as SVG only and without a kernel for each, into ``results/report/drawn``,
which keeps stamps of its own: the same page again draws nothing. Figures that a user's results join
lie in a folder below, so that the project's page stays as drawn.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mla_study.report.drawing import Drawn, draw
from mla_study.report.joining import assignments
from mla_study.study import staleness
from mla_study.study.figures import STAMPS, locked, stamp_file
from mla_study.study.notebooks import Figure, Project, discover
from mla_study.study.observe import hardware_of
from mla_study.study.runs import RUN_FILE, file_sha256, read_record

DRAWN = Path("results") / "report" / "drawn"
JOINED = DRAWN / "joined"
RESULTS = "results"
_SMALL = re.compile(r"<dc:description>([^<]*)</dc:description>")
_STAMP = re.compile(r"(?P<classes>[^·]+) · (?P<validity>\w+) · run (?P<run>[0-9a-f]+)")
_QUOTED = re.compile(r"(?::\w+:)?`{1,2}~?([^`]+)`{1,2}")
_NUMBER = re.compile(r"(fig|table)(\d+[a-z]?)(?:_|$)")


@dataclass(frozen=True)
class Part:
    """A picture or a table that a figure consists of.

    Attributes:
        stem: name of its files.
        table: the table in Markdown, or empty.
        values: its CSV, of the same rows and columns.
    """

    stem: str
    svg: str
    table: str = ""
    values: str = ""
    classes: tuple[str, ...] = ()
    validity: str = ""
    run: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of the project, drawn.

    Attributes:
        text: what it shows, in words: the text alternative.
        absent: why it could not be drawn, or empty.
        offered: a user's results of a kind that the figure takes.
        joined: those of them that it shows.
        alone: why it shows the project's results alone though others were offered, or empty.
    """

    id: str
    title: str
    text: str
    classes: tuple[str, ...]
    parts: tuple[Part, ...] = ()
    hardware: tuple[str, ...] = ()
    absent: str = ""
    failed: bool = False
    offered: tuple[Path, ...] = ()
    joined: tuple[Path, ...] = ()
    alone: str = ""

    @property
    def number(self) -> str:
        """``Fig. 1`` or ``Table 5a`` where the paper has one of that number, else empty."""
        found = _NUMBER.match(self.id)
        if found is None:
            return ""
        return f"{'Fig.' if found[1] == 'fig' else 'Table'} {found[2]}"

    @property
    def validity(self) -> str:
        """Of the first part."""
        return self.parts[0].validity if self.parts else ""

    @property
    def run(self) -> str:
        """Hash of the first part, twelve digits."""
        return self.parts[0].run if self.parts else ""


class Drawing:
    """Figures on their way: :meth:`start` hands them to workers, :meth:`finish` collects them.

    Args:
        more: a user's results by the parameter of the notebooks that takes them.
    """

    def __init__(self, project: Project, more: Mapping[str, Sequence[Path]] | None = None) -> None:
        self._project = project
        self._own = Project(project.root, project.root / DRAWN)
        self._joined = Project(project.root, project.root / JOINED)
        self._more = more or {}
        self._pictures: list[Picture] = []
        self._there: dict[str, Path] = {}
        self._parts: dict[str, Mapping[str, str]] = {}
        self._running: dict[str, tuple[Project, Path, Future[Drawn]]] = {}
        self._figures = {figure.id: figure for figure in discover(project)}

    def locked(self) -> AbstractContextManager[None]:
        """What :meth:`start` and :meth:`finish` are called inside: one report at a time."""
        return locked(self._own)

    def start(self, pool: Executor) -> tuple[int, int]:
        """Submit what is stale. Returns how many are, and of how many."""
        cache = staleness.HashCache(self._own.figures / STAMPS / "inputs.json")
        self._look = partial(self._looked, cache=cache, pool=pool)
        for figure in self._figures.values():
            self._pictures.append(self._look(figure, self._more))
        cache.save()
        return len(self._running), len(self._pictures)

    def finish(self) -> list[Picture]:
        """All figures; those that failed say why."""
        return [self._finished(picture) for picture in self._pictures]

    def _looked(
        self,
        figure: Figure,
        more: Mapping[str, Sequence[Path]],
        cache: staleness.HashCache,
        pool: Executor,
    ) -> Picture:
        """A figure that is up to date, cannot be drawn, or now waits for a worker."""
        taken = {name: folders for name, folders in more.items() if name in figure.parameters}
        values = figure.values(assignments(taken))
        picture = Picture(
            figure.id, figure.title, _text(figure), figure.provenance,
            hardware=_hardware(figure, self._project),
            offered=tuple(folder for folders in taken.values() for folder in folders),
        )  # fmt: skip
        absent = staleness.absent(figure, self._project, values)
        if absent:
            root = f"{self._project.root}/"
            return replace(picture, absent=f"It is drawn from {absent}".replace(root, ""))
        parts = staleness.key_parts(figure, self._project, values, cache)
        for place in (self._joined,) if taken else (self._own, self._project):
            stamp = read_record(stamp_file(place, figure))
            if not staleness.why_stale(stamp, parts, place.figures):
                self._there[figure.id] = place.figures
                return picture
        place = self._joined if taken else self._own
        scratch = place.figures / f".{figure.id}.drawing"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self._parts[figure.id] = parts
        told = pool.submit(draw, str(self._project.root), figure.id, values, str(scratch))
        self._running[figure.id] = (place, scratch, told)
        return picture

    def _finished(self, picture: Picture) -> Picture:
        if picture.absent:
            return picture
        figure = self._figures[picture.id]
        if picture.id in self._running:
            place, scratch, told = self._running.pop(picture.id)
            drawn = told.result()
            if drawn.error:
                shutil.rmtree(scratch, ignore_errors=True)
                return self._failed(figure, picture, drawn.error)
            self._place(figure, place, scratch, drawn.results)
        folder = self._there[picture.id]
        stamp = read_record(folder / STAMPS / f"{picture.id}.json")
        shown = stamp.get(RESULTS, ())
        joined = tuple(place for place in picture.offered if str(place) in shown)
        machines = {hardware_of(read_record(place / RUN_FILE)) for place in joined} - {""}
        return replace(
            picture,
            parts=_parts(picture.id, folder, stamp["outputs"]),
            joined=joined,
            hardware=tuple(sorted({*picture.hardware, *machines})),
        )

    def _failed(self, figure: Figure, picture: Picture, error: str) -> Picture:
        """Without the user's results instead, where it was drawn with such."""
        if not picture.offered:
            return replace(picture, absent=f"It could not be drawn: {error}", failed=True)
        plain = self._finished(self._look(figure, {}))
        return replace(plain, offered=picture.offered, alone=error, failed=True)

    def _place(self, figure: Figure, place: Project, scratch: Path, results: Sequence[str]) -> None:
        """Move what was drawn to its place; the stamp last, so that a cut leaves it stale."""
        stamp = stamp_file(place, figure)
        stamp.unlink(missing_ok=True)
        outputs: dict[str, str] = {}
        for file in sorted(scratch.iterdir()):
            outputs[file.name] = file_sha256(file)
            file.replace(place.figures / file.name)
        shutil.rmtree(scratch)
        staleness.write_stamp(stamp, self._parts[figure.id], outputs, {RESULTS: list(results)})
        self._there[figure.id] = place.figures


def _parts(name: str, folder: Path, outputs: Mapping[str, Any]) -> tuple[Part, ...]:
    """What a figure's drawing wrote, the one of its own name first."""
    stems = sorted(Path(file).stem for file in outputs if file.endswith(".svg"))
    stems.sort(key=lambda stem: stem != name)
    found: list[Part] = []
    for stem in stems:
        texts = {
            suffix: (folder / f"{stem}.{suffix}").read_text(encoding="utf-8")
            for suffix in ("svg", "md", "csv")
            if f"{stem}.{suffix}" in outputs
        }
        small = _SMALL.search(texts["svg"])
        told = _STAMP.match(small[1]) if small else None
        part = Part(stem, texts["svg"], texts.get("md", ""), texts.get("csv", ""))
        if told:
            classes = tuple(kind.strip() for kind in told["classes"].split("+"))
            part = replace(part, classes=classes, validity=told["validity"], run=told["run"])
        found.append(part)
    return tuple(found)


def _text(figure: Figure) -> str:
    """What a figure shows: the docstring of its module, its first line being a title."""
    told = ast.get_docstring(ast.parse(figure.module.read_text(encoding="utf-8"))) or figure.title
    return " ".join(_QUOTED.sub(r"\1", told).split())


def _hardware(figure: Figure, project: Project) -> tuple[str, ...]:
    """Machines that a figure's data were made on."""
    found: set[str] = set()
    for entry in figure.data:
        for place in project.root.glob(f"{entry}/{RUN_FILE}"):
            found.add(hardware_of(read_record(place)))
    return tuple(sorted(found - {""}))
