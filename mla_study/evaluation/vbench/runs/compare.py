"""Runs side by side, and tested by prompt; runs of unlike protocol are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import scale_of
from mla_study.evaluation.vbench.runs.protocol import Protocol, differences
from mla_study.evaluation.vbench.scores import paired_difference
from mla_study.study.runs import Result, read_result

if TYPE_CHECKING:
    import pandas as pd

_QUOTED = "paper-quoted"


@dataclass(frozen=True)
class Comparison:
    """Scores side by side.

    Attributes:
        table: a row a scorer: a column a run (value, then its interval), and for two runs with
            prompts in common ``difference, diff_low, diff_high, p, prompts_shared``.
        unlike: what differs, where the comparison was made all the same.
    """

    names: tuple[str, ...]
    table: pd.DataFrame
    unlike: tuple[str, ...]


def compare(folders: Sequence[Path], anyway: bool = False) -> Comparison:
    """Scores of the runs in these folders.

    Raises:
        UserError: fewer than two, no run's folder, no scorer in common, a quoted row among them,
            or unlike protocols (named) without ``anyway``.
    """
    import pandas as pd

    if len(folders) < 2:
        raise UserError("give at least two --out folders of vbench runs")
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
    rows = list[dict[str, Any]]()
    for scorer in scorers:
        row: dict[str, Any] = {"scorer": scorer, "label": held[0].at[scorer, "label"]}
        for name, table in zip(names, held, strict=True):
            row[name] = table.at[scorer, "value"]
            row[f"{name} low"], row[f"{name} high"] = (
                table.at[scorer, "low"],
                table.at[scorer, "high"],
            )
        if len(results) == 2:
            row |= _paired(scorer, results)
        rows.append(row)
    return Comparison(tuple(names), pd.DataFrame(rows), tuple(unlike))


def _protocol(result: Result) -> Protocol:
    if result.provenance == _QUOTED:
        raise UserError(f"{result.folder} is {_QUOTED}: such rows are shown, never tested against")
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


def _paired(scorer: str, results: Sequence[Result]) -> dict[str, Any]:
    """Of the prompts that both have; composites have none of their own."""
    first, second = (_by_prompt(result.tables["videos"], scorer) for result in results)
    gap, low, high, p, shared = paired_difference(first, second)
    return {"difference": gap, "diff_low": low, "diff_high": high, "p": p, "prompts_shared": shared}


def _by_prompt(videos: pd.DataFrame, scorer: str) -> Mapping[str, float]:
    mine = videos[(videos["scorer"] == scorer) & videos["counted"].astype(bool)]
    means = mine.groupby(mine["prompt"].fillna(mine["video"]))["value"].mean()
    return {str(name): float(value) * scale_of(scorer) for name, value in means.items()}


def text(comparison: Comparison) -> str:
    """The table for a terminal, with what is unlike on its face."""
    lines = [f"UNLIKE PROTOCOLS: {sentence}" for sentence in comparison.unlike]
    width = max(12, *(len(name) + 2 for name in comparison.names))
    two = "difference" in comparison.table.columns
    head = "".join(f"{name:>{width}}" for name in comparison.names)
    lines.append(f"{'':34}{head}" + ("   difference (95 %), p, prompts" if two else ""))
    for row in comparison.table.to_dict("records"):
        line = f"{row['label']:34}" + "".join(f"{row[n]:>{width}.4f}" for n in comparison.names)
        if two and row["prompts_shared"]:
            span = (
                ""
                if row["diff_low"] != row["diff_low"]
                else (f" ({row['diff_low']:+.4f} to {row['diff_high']:+.4f})")
            )
            line += f"   {row['difference']:+.4f}{span}, p {row['p']:.3g}, {row['prompts_shared']}"
        lines.append(line)
    return "\n".join(lines)
