"""Runs side by side, and tested by prompt; runs of unlike protocol are refused.

What a score is stands beside it: over how many videos of how many wanted, and how valid. Of two
runs the difference is that of the prompts that both have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.comparing.quoted import QUOTED, Quoted, quoted_rows
from mla_study.evaluation.vbench.dimensions import SCORERS, scale_of
from mla_study.evaluation.vbench.runs.protocol import Protocol, differences
from mla_study.evaluation.vbench.scores import paired_difference
from mla_study.study.runs import Result, read_result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Run:
    """One of the runs that are compared.

    Attributes:
        name: its model, or its folder. prompts: those of the compared scorers (or names of clips).
    """

    name: str
    result: Result
    protocol: Protocol
    prompts: frozenset[str]

    @property
    def observed(self) -> Mapping[str, Any]:
        return self.result.run["observed"]


@dataclass(frozen=True)
class Comparison:
    """Scores side by side.

    Attributes:
        table: a row a scorer: for each run its ``NAME`` (value), ``NAME low``, ``NAME high``,
            ``NAME videos``, ``NAME wanted``, ``NAME validity`` and ``NAME why``; for two runs
            ``difference, diff_low, diff_high, p, prompts_shared`` of the prompts in common.
        unlike: what differs, where the comparison was made all the same.
        warnings: what a reader must know of the scores before the table.
        beside: published rows, never tested against.
    """

    runs: tuple[Run, ...]
    table: pd.DataFrame
    unlike: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    beside: tuple[Quoted, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(run.name for run in self.runs)


def compare(
    folders: Sequence[Path], anyway: bool = False, beside: Sequence[str] = ()
) -> Comparison:
    """Scores of the runs in these folders.

    Args:
        beside: see :func:`quoted.quoted_rows`; with it, one run is enough.

    Raises:
        UserError: fewer than two, no run's folder, no scorer in common, a quoted row among them,
            or unlike protocols (named) without ``anyway``.
    """
    import pandas as pd

    if len(folders) < (1 if beside else 2):
        raise UserError("give at least two --out folders of vbench runs, or one and --beside")
    results = [read_result(folder) for folder in folders]
    protocols = [_protocol(result) for result in results]
    names = _names(results)
    held = [result.table.set_index("scorer") for result in results]
    scorers = [
        scorer for scorer in held[0].index if all(scorer in table.index for table in held[1:])
    ]
    if not scorers:
        raise UserError(f"{' and '.join(names)} have no dimension in common")
    unlike = list[str]()
    for i, (one, two) in enumerate(pairwise(protocols)):
        found = differences(one, two, scorers)
        if found:
            unlike.append(f"{names[i]} and {names[i + 1]}: {'; '.join(found)}")
    if unlike and not anyway:
        raise UserError(
            f"these runs are of unlike protocol: {'. '.join(unlike)}. Run them alike, or see them "
            "side by side, with this said, by --anyway"
        )
    scored = [scorer for scorer in scorers if scorer in SCORERS]
    runs = tuple(
        Run(name, result, protocol, frozenset(p for s in scored for p in _by_prompt(result, s)))
        for name, result, protocol in zip(names, results, protocols, strict=True)
    )
    rows = list[dict[str, Any]]()
    for scorer in scorers:
        row: dict[str, Any] = {"scorer": scorer, "label": held[0].at[scorer, "label"]}
        for name, table in zip(names, held, strict=True):
            row[name] = table.at[scorer, "value"]
            for part in ("low", "high", "videos", "wanted", "validity"):
                row[f"{name} {part}"] = table.at[scorer, part]
            row[f"{name} why"] = table.at[scorer, "why"] if "why" in table.columns else ""
        if len(results) == 2:
            row |= _paired(scorer, results)
        rows.append(row)
    quoted = quoted_rows(beside, scorers, protocols[0].mode)
    empty = [run for run in runs if run.result.provenance != "measured"]
    warnings = [*(_invalid(run) for run in empty), *_other_prompts(runs, scored)]
    return Comparison(runs, pd.DataFrame(rows), tuple(unlike), tuple(warnings), tuple(quoted))


def _protocol(result: Result) -> Protocol:
    if result.provenance == QUOTED:
        raise UserError(
            f"{result.folder} is {QUOTED}: such rows are shown, never tested against, so give it "
            "by --beside"
        )
    try:
        return Protocol.read(result.run["identity"]["config"])
    except (KeyError, TypeError):
        raise UserError(f"{result.folder} is no result of vbench run: give its --out") from None


def _names(results: Sequence[Result]) -> list[str]:
    """The runs' models; folders where two have one name."""
    models = [str(result.run["identity"]["config"].get("model") or "") for result in results]
    if len(set(models)) == len(models) and all(models):
        return models
    folders = [result.folder.resolve().name for result in results]
    return folders if len(set(folders)) == len(folders) else [str(r.folder) for r in results]


def _invalid(run: Run) -> str:
    """A sentence on a run that measured nothing, with what its record says of that."""
    return " ".join([f"INVALID: {run.name} is {run.result.provenance}.", *run.result.run["notes"]])


def _other_prompts(runs: Sequence[Run], scorers: Sequence[str]) -> list[str]:
    """A sentence on scores that are not of the same prompts in all runs; none where all are."""
    odd = list[str]()
    for scorer in scorers:
        sets = [set(_by_prompt(run.result, scorer)) for run in runs]
        if any(held != sets[0] for held in sets):
            odd.append(scorer)
    if not odd:
        return []
    shared = len(frozenset.intersection(*(run.prompts for run in runs)))
    counts = ", ".join(f"{run.name} {len(run.prompts)}" for run in runs)
    of = "" if len(odd) == len(scorers) else f" of {', '.join(odd)}"
    then = "" if len(runs) > 2 else ", and the difference is that of these"
    if not shared:
        then = "" if len(runs) > 2 else ", so that no difference can be tested"
    return [
        f"OTHER PROMPTS: the scores{of} are means over different prompts or clips ({counts}); "
        f"{shared or 'none'} of them {'is' if shared < 2 else 'are'} in all runs{then}"
    ]


def _paired(scorer: str, results: Sequence[Result]) -> dict[str, Any]:
    """Of the prompts that both have; composites have none of their own."""
    first, second = (_by_prompt(result, scorer) for result in results)
    gap, low, high, p, shared = paired_difference(first, second)
    return {"difference": gap, "diff_low": low, "diff_high": high, "p": p, "prompts_shared": shared}


def _by_prompt(result: Result, scorer: str) -> Mapping[str, float]:
    videos = result.tables["videos"]
    mine = videos[(videos["scorer"] == scorer) & videos["counted"].astype(bool)]
    means = mine.groupby(mine["prompt"].fillna(mine["video"]))["value"].mean()
    return {str(name): float(value) * scale_of(scorer) for name, value in means.items()}
