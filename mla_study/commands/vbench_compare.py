"""``mla-study vbench compare``: runs of one protocol side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Compare:
    """Scores of runs side by side; of two, a test by prompt. Unlike protocols are refused.

    Each score stands with the videos it is of and its validity. The difference of two runs is that
    of the prompts that both have.

    Example: mla-study vbench compare scores-dense scores-latent --beside quoted
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of vbench run."""
    anyway: bool = False
    """Print them although their protocols differ, with the differences on the table's face."""
    beside: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Published rows to show below, without a test: quoted (those of results/paper), or a CSV file
    with a column a score; may be repeated."""
    json: bool = False
    """Print one JSON document on stdout."""

    def run(self) -> int:
        """Print the comparison."""
        import json

        from mla_study.evaluation.vbench.comparing.compare import compare
        from mla_study.evaluation.vbench.comparing.text import document, text

        comparison = compare(self.runs, self.anyway, self.beside)
        if self.json:
            print(json.dumps(document(comparison), indent=1, allow_nan=False))
        else:
            print(text(comparison))
        return 0
