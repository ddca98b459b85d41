"""What a claim is, what is found about it, and what comes out: plain data.

A claim says what the paper states, which numbers speak for or against it (``query``) and the rule
that makes a verdict of them. Nothing here holds a verdict about a claim; :mod:`.rules` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, Protocol, runtime_checkable

from mla_study.study.claims.sources import Reader, Source
from mla_study.study.runs import Provenance, Validity

Verdict = Literal[
    "supported",
    "not supported",
    "not distinguished from null",
    "arithmetic only",
    "not testable here",
]
Scale = Literal["full", "miniature", "arithmetic", "other models"]
Role = Literal["stated", "found", "premise", "null", "beside"]
"""Of a number: the paper's own, ours that decides, ours that the claim presupposes, what chance or
doing nothing gives, and what is shown but decides nothing."""


SHARE, ROUNDING = "share", "rounding"


@dataclass(frozen=True)
class Number:
    """A number with its bounds: a 95 % interval, quartiles, a range or what rounding leaves open.

    Attributes:
        label: what it is; ``low`` and ``high`` are NaN where there are none.
        bounds: what the bounds are, in words.
    """

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    role: Role = "found"
    provenance: Provenance = "measured"
    bounds: str = ""

    def text(self) -> str:
        """The number as a reader wants it."""
        if math.isnan(self.value):
            return "none"
        shown = spell(self.value)
        if self.low < self.high and self.bounds != ROUNDING:
            shown += f" [{spell(self.low)}, {spell(self.high)}]"
        return f"{shown} {'' if self.unit == SHARE else self.unit}".rstrip()


def spell(value: float) -> str:
    """Four significant digits, without an exponent where it is readable: 0.1234, 12340, 1.2e-07."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        digits = 4 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.3g}"


def stated(label: str, text: str, unit: str = "", slack: float = 0.0) -> Number:
    """A number as the paper prints it; its bounds are what the last digit leaves open.

    Args:
        text: as printed, such as ``13.71``.
        slack: added to either side, for what was rounded before it was computed with.
    """
    half = 0.5 * 10.0 ** int(Decimal(text).as_tuple().exponent) + slack
    value = float(text)
    return Number(
        label, value, value - half, value + half, unit, "stated", "paper-quoted", ROUNDING
    )


@dataclass(frozen=True)
class Evidence:
    """What a query found.

    Attributes:
        numbers: in the order in which a reader wants them.
        missing: what is not there; then no rule is asked, and the numbers are context.
        scale: where it is not the claim's own (a user's full-scale run in place of the miniature).
        about: what a reader has to know of these numbers, a sentence each.
    """

    numbers: tuple[Number, ...]
    missing: str = ""
    scale: Scale | None = None
    about: tuple[str, ...] = ()

    def of(self, role: Role) -> tuple[Number, ...]:
        """Numbers of a role."""
        return tuple(number for number in self.numbers if number.role == role)


def evidence(
    *numbers: Number | Iterable[Number],
    missing: str = "",
    scale: Scale | None = None,
    about: Iterable[str] = (),
) -> Evidence:
    """Numbers and lists of numbers joined."""
    flat: list[Number] = []
    for given in numbers:
        flat += [given] if isinstance(given, Number) else list(given)
    return Evidence(tuple(flat), missing, scale, tuple(about))


@dataclass(frozen=True)
class Ruling:
    """A verdict, the sentence that says why, and the number that decided, all computed.

    Attributes:
        against: what the number was set against, as text.
    """

    verdict: Verdict
    why: str
    number: Number | None = None
    against: str = ""


@runtime_checkable
class Rule(Protocol):
    """Turns numbers into a verdict; a frozen dataclass, so that a claim stays data."""

    @property
    def text(self) -> str:
        """The rule in one sentence."""
        ...

    def __call__(self, found: Evidence) -> Ruling:
        """The verdict. Raises MissingError where the numbers do not settle it."""
        ...


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and how it is tested here.

    Attributes:
        statement: in our own words, one sentence.
        place: section, table or figure of the paper.
        quantity: what is looked at, with ``unit``.
        null: what it is set against, in words.
        query: reads tables and returns numbers.
        figure: the notebook that shows it.
        command: what measures its tables anew.
        reading: for a reader with little time: what a verdict here means, and what it does not.
    """

    id: str
    statement: str
    place: str
    quantity: str
    unit: str
    scale: Scale
    null: str
    query: Callable[[Reader], Evidence]
    rule: Rule
    figure: str
    command: str
    reading: str = ""


@dataclass(frozen=True)
class Outcome:
    """A claim judged: all that a page needs.

    Attributes:
        number, against: the one that decided, and what it was set against; of a claim that is not
            testable the first that is there, if any.
        missing: of a claim that is not testable here, what is missing.
        provenance: the classes of its numbers, in order.
        validity: the worst of its sources'.
        hardware: machines that its sources were made on.
    """

    claim: Claim
    verdict: Verdict
    why: str
    number: Number | None
    against: str
    missing: str
    scale: Scale
    numbers: tuple[Number, ...]
    sources: tuple[Source, ...]
    about: tuple[str, ...] = ()
    provenance: tuple[Provenance, ...] = field(default=())
    validity: Validity = "full"
    hardware: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The claim's."""
        return self.claim.id

    def of(self, role: Role) -> tuple[Number, ...]:
        """Numbers of a role."""
        return tuple(number for number in self.numbers if number.role == role)
