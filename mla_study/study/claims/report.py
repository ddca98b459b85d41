"""Outcomes for a terminal and as JSON."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

from mla_study.study.claims.ledger import NONE
from mla_study.study.claims.model import Number, Outcome, Role, Verdict

_ROLES: dict[Role, str] = {
    "stated": "what the paper states",
    "found": "what decides",
    "premise": "what the claim presupposes",
    "null": "the null",
    "beside": "beside it",
}
_HEADS = ("claim", "verdict", "scale", "number", "against", "statement")
_GAP = "  "
_WIDEST = 40


def listing(outcomes: Sequence[Outcome], width: int | None = None) -> str:
    """A line a claim, and how many claims have which verdict.

    Args:
        width: of the terminal; where the statement does not fit beside the rest it goes below.
            None: one line a claim, however long.
    """
    rows = [_HEADS, *(_row(one) for one in outcomes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS) - 1)]
    lines: list[str] = []
    for row in rows:
        line = _GAP.join(f"{text:{size}}" for text, size in zip(row, widths, strict=False))
        if width is None or len(line) + len(_GAP) + len(row[-1]) <= width:
            lines.append(f"{line}{_GAP}{row[-1]}")
        else:
            lines.append(line.rstrip())
            lines += textwrap.wrap(
                row[-1], max(width, 40), initial_indent="    ", subsequent_indent="    "
            )
    return "\n".join([*lines, "", counts(outcomes)])


def _row(one: Outcome) -> tuple[str, ...]:
    number = NONE if one.number is None else one.number.text()
    against = one.against or NONE
    return one.id, one.verdict, one.scale, _cut(number), _cut(against), _statement(one)


def counts(outcomes: Sequence[Outcome]) -> str:
    """How many claims have which verdict."""
    found = Counter(one.verdict for one in outcomes)
    parts = [f"{found[verdict]} {verdict}" for verdict in get_args(Verdict) if found[verdict]]
    return f"{len(outcomes)} claims: {', '.join(parts)}"


def full_text(one: Outcome) -> str:
    """All of a claim."""
    claim = one.claim
    lines = [f"{one.id}: {one.verdict}", *_wrapped(claim.statement)]
    pairs = [
        ("why", one.why),
        ("scale", one.scale),
        ("in the paper", claim.place),
        ("quantity", f"{claim.quantity} ({claim.unit})"),
        ("set against", claim.null),
        ("rule", claim.rule.text),
        ("to read it", claim.reading),
        *(("mind", sentence) for sentence in one.about),
    ]
    for name, text in pairs:
        lines += _wrapped(text, f"  {name:14}") if text else []
    for role, head in _ROLES.items():
        mine = one.of(role)
        if not mine:
            continue
        lines += ["", f"  {head}"]
        widest = min(max(len(number.label) for number in mine), 72)
        lines += [_number(number, widest) for number in mine]
    lines += ["", "  from"]
    for source in one.sources:
        run = f"run {source.run_hash[:12]}" if source.run_hash else f"sha256 {source.sha256[:12]}"
        altered = ", ALTERED: not the table that its run record describes" * source.altered
        machine = f", {source.hardware}" if source.hardware else ""
        lines.append(
            f"    results/{source.file}: {run}, {source.provenance}, {source.validity}"
            f"{machine}{altered}"
        )
    if not one.sources:
        lines.append("    no table")
    lines += [
        "",
        f"  class {', '.join(one.provenance) or 'none'}; validity {one.validity}"
        + (f"; hardware {'; '.join(one.hardware)}" if one.hardware else ""),
        f"  figure   {claim.figure} (make figures FIG={claim.figure})",
        f"  command  {claim.command}",
    ]
    return "\n".join(lines)


def document(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as JSON has them: numbers that are not finite are null."""
    return [
        {
            "id": one.id,
            "statement": one.claim.statement,
            "verdict": one.verdict,
            "missing": one.missing,
            "why": one.why,
            "number": None if one.number is None else _plain(one.number),
            "against": one.against,
            "scale": one.scale,
            "place": one.claim.place,
            "quantity": one.claim.quantity,
            "unit": one.claim.unit,
            "null": one.claim.null,
            "rule": one.claim.rule.text,
            "reading": one.claim.reading,
            "about": list(one.about),
            "numbers": [_plain(number) for number in one.numbers],
            "sources": [dataclasses.asdict(source) for source in one.sources],
            "provenance": list(one.provenance),
            "validity": one.validity,
            "hardware": list(one.hardware),
            "figure": one.claim.figure,
            "command": one.claim.command,
        }
        for one in outcomes
    ]


def _plain(number: Number) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(number).items()
    }


def _statement(one: Outcome) -> str:
    needs = f" (needs {one.missing})" if one.missing else ""
    return one.claim.statement + needs


def _number(number: Number, widest: int) -> str:
    kind = "" if number.provenance == "measured" else f"  ({number.provenance})"
    bounds = f"  {number.bounds}" if number.bounds and number.low < number.high else ""
    return f"    {number.label:{widest}}  {number.text()}{bounds}{kind}"


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


def _wrapped(text: str, before: str = "  ") -> list[str]:
    after = " " * len(before)
    text = text.replace(" %", "\u00a0%")
    return textwrap.wrap(text, 100, initial_indent=before, subsequent_indent=after)
