"""``mla-study report``: the paper's claims on one page, with numbers, nulls and verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mla_study.errors import UserError


@dataclass(frozen=True)
class Report:
    """Write one page that opens without a network: every claim, its number, null and verdict.

    Figures that are stale are drawn first, videos come from the miniature that the package carries.
    The same data give the same bytes.

    Example: mla-study report --results runs/wan --out wan.html
    """

    results: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A folder of your own results (or of such folders): they stand in for the project's of the
    same name, and are listed. Repeat for more."""
    out: Path | None = None
    """The file (default: results/report/index.html of the checkout)."""
    jobs: int = 2
    """Processes that draw."""

    def run(self) -> int:
        """Build the page."""
        if self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}, but it must be at least 1")
        from mla_study.report.build import build

        return build(self.out, self.results, jobs=self.jobs)
