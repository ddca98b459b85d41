"""A comparison for a terminal and as JSON, with all on its face that a score depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mla_study.errors import counted
from mla_study.evaluation.vbench.comparing.compare import Comparison, Run
from mla_study.evaluation.vbench.comparing.quoted import QUOTED, Quoted
from mla_study.evaluation.vbench.runs.origin import seeds_text, told_text
from mla_study.evaluation.vbench.runs.protocol import field_text

_ACROSS = 5
"""Published rows side by side."""


def text(comparison: Comparison) -> str:
    """What is unlike and invalid, the runs, the table, what its numbers are, published rows."""
    lines = [f"UNLIKE PROTOCOLS: {sentence}" for sentence in comparison.unlike]
    lines += [*comparison.warnings, *(_run_line(run) for run in comparison.runs), ""]
    rows, labels = comparison.table.to_dict("records"), _labels(comparison)
    wide = max(map(len, labels.values())) + 2
    names, two = comparison.names, len(comparison.runs) == 2
    cells = [[_cell(row, name) for name in names] for row in rows]
    widths = [max(len(name), *(len(own[i]) for own in cells)) + 3 for i, name in enumerate(names)]
    head = "".join(f"{name:<{width}}" for name, width in zip(names, widths, strict=True))
    paired = f"{names[0]} − {names[1]} (95 %), p, prompts" if two else ""
    lines.append(f"{'':{wide}}{head}{paired}".rstrip())
    for row, own in zip(rows, cells, strict=True):
        line = "".join(f"{cell:<{width}}" for cell, width in zip(own, widths, strict=True))
        lines.append(
            f"{labels[row['scorer']]:{wide}}{line}{_difference(row) if two else ''}".rstrip()
        )
    if two and any(row["prompts_shared"] for row in rows):
        lines.append(
            "The difference is a mean over the prompts (or clips) that both have, each counted "
            "alike, and not that of the two scores."
        )
    lines += _reasons(comparison)
    return "\n".join(lines + _beside(comparison))


def document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON has it; None where there is no number."""
    names = comparison.names
    parts = ("low", "high", "videos", "wanted", "validity", "why")
    return {
        "schema": 1,
        "unlike": list(comparison.unlike),
        "warnings": list(comparison.warnings),
        "runs": [_run_entry(run) for run in comparison.runs],
        "scores": [
            {
                "scorer": row["scorer"], "label": row["label"],
                "runs": {
                    name: {"value": _plain(row[name])}
                    | {part: _plain(row[f"{name} {part}"]) for part in parts}
                    for name in names
                },
                "paired": _paired(row),
            }
            for row in comparison.table.to_dict("records")
        ],
        "beside": [
            {"provenance": QUOTED, "source": row.source, "name": row.name, "values": {**row.values}}
            for row in comparison.beside
        ],
    }  # fmt: skip


def _labels(comparison: Comparison) -> dict[str, str]:
    """Scorer -> how it is called, with a word where less of it is better."""
    table = comparison.runs[0].result.table
    return {
        row["scorer"]: row["label"] + (" (less is better)" if row["better"] == "lower" else "")
        for row in table.to_dict("records")
        if row["scorer"] in set(comparison.table["scorer"])
    }


def _run_line(run: Run) -> str:
    facts = [
        f"{run.result.provenance}, {run.result.validity}", _prompts(run),
        told_text(run.protocol, run.observed), seeds_text(run.observed) or "seeds not known",
        f"run {run.result.run_hash[:12]}",
    ]  # fmt: skip
    return f"{run.name}: {'; '.join(facts)}"


def _prompts(run: Run) -> str:
    """How many, and of which file."""
    protocol, count = run.protocol, len(run.prompts)
    if protocol.prompts is not None:
        return f"{counted(count, 'prompt')} of file {field_text(protocol.prompts)}"
    if protocol.sampled is not None:
        return f"{counted(count, 'prompt')}, sampled from {field_text(protocol.sampled)}"
    return f"{counted(count, 'clip')} of no known file of prompts"


def _run_entry(run: Run) -> dict[str, Any]:
    protocol, result = run.protocol, run.result
    return {
        "name": run.name, "folder": str(result.folder), "run_hash": result.run_hash,
        "provenance": result.provenance, "validity": result.validity, "mode": protocol.mode,
        "prompts": len(run.prompts), "prompt_file_sha256": protocol.prompts,
        "sampled_from_sha256": protocol.sampled, "extended_sha256": protocol.extended,
        "extended_by": protocol.extended_by, "told_sha256": protocol.told,
        "sampling": run.observed.get("sampling"),
    }  # fmt: skip


def _cell(row: Mapping[Any, Any], name: str) -> str:
    """Such as ``0.9812 4 of 10 partial``."""
    wanted, videos = _plain(row[f"{name} wanted"]), _plain(row[f"{name} videos"])
    count = f"{videos}" if wanted is None else f"{videos} of {wanted}"
    return f"{row[name]:.4f} {count} {row[f'{name} validity']}"


def _difference(row: Mapping[Any, Any]) -> str:
    if not row["prompts_shared"]:
        return ""
    span = f" ({row['diff_low']:+.4f} to {row['diff_high']:+.4f})"
    span = "" if row["diff_low"] != row["diff_low"] else span
    return f"{row['difference']:+.4f}{span}, p {row['p']:.3g}, {row['prompts_shared']}"


def _paired(row: Mapping[Any, Any]) -> dict[str, Any] | None:
    if not row.get("prompts_shared"):
        return None
    return {
        "difference": row["difference"], "low": _plain(row["diff_low"]),
        "high": _plain(row["diff_high"]), "p": row["p"], "prompts": row["prompts_shared"],
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """For JSON: a number of numpy's or pandas' as Python's own, None for NaN and NA."""
    import pandas as pd

    if pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _reasons(comparison: Comparison) -> list[str]:
    """Why scores are not valid in full, each reason once a run."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in comparison.table.to_dict("records"):
        for name in comparison.names:
            if row[f"{name} why"]:
                found.setdefault((name, row[f"{name} why"]), []).append(str(row["label"]))
    return [f"{name}, {', '.join(labels)}: {why}" for (name, why), labels in found.items()]


def _beside(comparison: Comparison) -> list[str]:
    lines = list[str]()
    labels = _labels(comparison)
    for source in dict.fromkeys(row.source for row in comparison.beside):
        rows = [row for row in comparison.beside if row.source == source]
        lines += ["", f"{QUOTED}, from {source}: shown beside, never tested against"]
        for start in range(0, len(rows), _ACROSS):
            lines += _block(rows[start : start + _ACROSS], labels)
    return lines


def _block(rows: Sequence[Quoted], labels: Mapping[str, str]) -> list[str]:
    wide = max(map(len, labels.values())) + 2
    widths = [max(len(row.name), 6) + 3 for row in rows]
    pairs = list(zip(rows, widths, strict=True))
    lines = [f"{'':{wide}}" + "".join(f"{row.name:<{width}}" for row, width in pairs)]
    for scorer, label in labels.items():
        if any(scorer in row.values for row in rows):
            cells = [
                f"{f'{row.values[scorer]:.4f}' if scorer in row.values else '–':<{width}}"
                for row, width in pairs
            ]
            lines.append(f"{label:{wide}}{''.join(cells)}")
    return [line.rstrip() for line in lines]
