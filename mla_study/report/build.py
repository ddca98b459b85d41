"""From a checkout to the page: judge, draw what is stale, roll out, fill in, write."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import mla_study
from mla_study.errors import UserError
from mla_study.report import charts, films, folders, joining
from mla_study.report.drawing import prepare
from mla_study.report.page import Content, render
from mla_study.report.pictures import Drawing, Picture
from mla_study.study.claims import evaluate
from mla_study.study.notebooks import Project
from mla_study.study.runs import RUN_FILE, atomic_write

OUT = Path("results") / "report" / "index.html"
FAILED = 1


def build(
    out: Path | None = None,
    results: Sequence[Path] = (),
    *,
    jobs: int = 2,
    project: Project | None = None,
) -> int:
    """Write the page.

    Args:
        out: the file; by default ``results/report/index.html`` of the checkout.
        results: folders of a user's own results, which stand in for the project's of the same name
            and are listed; figures are drawn with those of the kinds that they take.
        jobs: processes that draw.

    Returns:
        0, or 1 where a figure could not be drawn; the page then says so in its place.

    Raises:
        UserError: not in a checkout, a folder without results, or a file that cannot be written.
    """
    started = time.monotonic()
    project = project or _project()
    place = out or project.root / OUT
    if place.is_dir():
        raise UserError(f"{place} is a folder: give a file such as {place / 'index.html'}")
    own = {root.as_posix(): folders.listed(root) for root in results}
    content, failed = _content(project, results, own, jobs)
    page = render(content).encode()
    atomic_write(place, page)
    _say(f"report: {place}, {len(page) / 1e6:.1f} MB in {time.monotonic() - started:.0f} s")
    for picture in failed:
        _say(f"  {picture.id}: {picture.absent or f'without your results: {picture.alone}'}")
    return FAILED if failed else 0


def _content(
    project: Project,
    results: Sequence[Path],
    own: dict[str, list[folders.Folder]],
    jobs: int,
) -> tuple[Content, list[Picture]]:
    drawing = Drawing(project, joining.joined(results))
    # spawned: a fork would copy locks of libraries that other threads hold
    with (
        drawing.locked(),
        ProcessPoolExecutor(max(1, jobs), get_context("spawn"), prepare) as pool,
    ):
        try:
            rolled = pool.submit(films.films)
            stale, count = drawing.start(pool)
            if stale:
                _say(f"report: {stale} of {count} figures to draw")
            judged_by = [root for root in results if _has_results(root)]
            outcomes = evaluate(project.root / "results", judged_by)
            stand_ins = {
                one.id: joining.stand_ins(one, judged_by, project.data) for one in outcomes
            }
            curves = charts.charts(project, results)
            tables = [folders.opened(place, place.name) for place in folders.find(project.data)]
            pictures = drawing.finish()
            videos = rolled.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that draws for the report died (out of memory?): try --jobs 1"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    command = " ".join(["mla-study report", *(f"--results {name}" for name in own)])
    content = Content(
        outcomes, pictures, curves, videos, tables, own, stand_ins, command, mla_study.__version__
    )
    return content, [picture for picture in pictures if picture.failed]


def _project() -> Project:
    try:
        return Project.find()
    except UserError as error:
        raise UserError(
            "The report is made in a checkout of the repository, whose analysis/ draws its figures "
            "and whose results/ hold its tables: change into one, and give your own results by "
            "--results DIR."
        ) from error


def _has_results(root: Path) -> bool:
    """Whether claims can find results in a folder by name; a lone result is listed only."""
    return any((root / name).is_dir() for name in ("data", "paper")) or any(
        root.glob(f"*/{RUN_FILE}")
    )


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
