"""The rules that turn numbers into verdicts: pure functions of values and bounds, and their names.

Bounds are 95 % intervals where nothing else is said. An interval that touches a limit does not pass
it. Where an interval is too wide to decide, the claim is not testable with these numbers, and the
rule says so by raising :class:`~mla_study.study.claims.model.MissingError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mla_study.study.claims.model import Evidence, Number, Rule, Ruling, Verdict, spell
from mla_study.study.claims.sources import MissingError

SUPPORTED: Verdict = "supported"
NOT_SUPPORTED: Verdict = "not supported"
NOT_DISTINGUISHED: Verdict = "not distinguished from null"
ARITHMETIC: Verdict = "arithmetic only"
NOT_TESTABLE: Verdict = "not testable here"
_MORE: dict[Verdict, str] = {
    SUPPORTED: "above the null",
    NOT_SUPPORTED: "below the null",
    NOT_DISTINGUISHED: "not told apart from the null",
}
_FASTER: dict[Verdict, str] = {
    SUPPORTED: "faster than noise explains",
    NOT_SUPPORTED: "slower than noise explains",
    NOT_DISTINGUISHED: "within the noise",
}


def agree(found: Number, told: Number) -> bool:
    """Whether bounds (or values, where there are none) overlap."""
    return _low(found) <= _high(told) and _low(told) <= _high(found)


def more(value: float, low: float, high: float, margin: float) -> Verdict:
    """Verdict of a difference from the null that should be positive.

    Supported: the interval lies above 0 and the value above ``margin``. Not supported: the mirror
    image. Anything else is not distinguished from the null.
    """
    if low > 0 and value > margin:
        return SUPPORTED
    if high < 0 and value < -margin:
        return NOT_SUPPORTED
    return NOT_DISTINGUISHED


def no_worse(low: float, high: float, margin: float) -> Verdict | None:
    """Verdict of a difference that should not be below ``-margin``; None: it does not say."""
    if low > -margin:
        return SUPPORTED
    return NOT_SUPPORTED if high < -margin else None


def above(low: float, high: float, level: float) -> Verdict | None:
    """Verdict of a value that should be above a level; None: the interval holds the level."""
    if low > level:
        return SUPPORTED
    return NOT_SUPPORTED if high < level else None


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several quantities that must all show it: one against it is enough."""
    for worst in (NOT_SUPPORTED, NOT_DISTINGUISHED):
        if worst in verdicts:
            return worst
    return SUPPORTED


@dataclass(frozen=True)
class Agrees:
    """Each number that is found is the stated one, or the only stated one."""

    @property
    def text(self) -> str:
        return (
            "each number found lies within the bounds of the stated one: 'supported' where it was"
            " measured, 'arithmetic only' where it follows from other published numbers or from "
            "counting; otherwise 'not supported'"
        )

    def __call__(self, found: Evidence) -> Ruling:
        mine, told = _some(found, "found"), _some(found, "stated")
        if len(told) == 1:
            told *= len(mine)
        if len(told) != len(mine):
            raise MissingError(f"a stated number for each of {len(mine)} found ones")
        off = [(m, t) for m, t in zip(mine, told, strict=True) if not agree(m, t)]
        if off:
            first, wanted = off[0]
            return Ruling(
                NOT_SUPPORTED,
                f"{len(off)} of {len(mine)} differ: {first.label} is {first.text()}, stated "
                f"{spell(wanted.value)}",
                first,
                wanted.text(),
            )
        measured = all(number.provenance == "measured" for number in mine)
        verdict = SUPPORTED if measured else ARITHMETIC
        told_all = "it agrees" if len(mine) == 1 else f"all {len(mine)} agree"
        return Ruling(verdict, f"{told_all} with what is stated", mine[0], told[0].text())


@dataclass(frozen=True)
class First:
    """Each place that is found is the first."""

    @property
    def text(self) -> str:
        return (
            "'arithmetic only' where it takes the first place every time (published values without"
            " error bars are no measurement), otherwise 'not supported'"
        )

    def __call__(self, found: Evidence) -> Ruling:
        mine = _some(found, "found")
        lost = [number for number in mine if number.value != 1]
        if lost:
            named = ", ".join(f"{number.label}: place {number.value:g}" for number in lost[:3])
            rest = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            why = f"not first in {len(lost)} of {len(mine)}: {named}{rest}"
            return Ruling(NOT_SUPPORTED, why, lost[0], "first")
        return Ruling(ARITHMETIC, f"first in all {len(mine)}", mine[0], "first")


@dataclass(frozen=True)
class MoreThanNull:
    """Each difference from the null is positive and larger than a margin."""

    margin: float = 0.0

    @property
    def text(self) -> str:
        return (
            f"'supported' where every difference from the null has its interval above 0 and its "
            f"value above {self.margin:g}, 'not supported' where one has the reverse, otherwise "
            "'not distinguished from null'"
        )

    def __call__(self, found: Evidence) -> Ruling:
        mine = _bounded(_some(found, "found"))
        each: list[Verdict] = [more(n.value, n.low, n.high, self.margin) for n in mine]
        return _ruling(mine, each, ["0"] * len(mine), _MORE)


@dataclass(frozen=True)
class NoWorse:
    """No difference from the reference is below minus the margin."""

    margin: float

    @property
    def text(self) -> str:
        return (
            f"'supported' where the interval of every difference lies above {-self.margin:g}, 'not "
            "supported' where one lies below it, otherwise not testable with so few runs"
        )

    def __call__(self, found: Evidence) -> Ruling:
        return _no_worse(found, self.margin, "")


@dataclass(frozen=True)
class Despite:
    """Quality holds although what was predicted is large."""

    level: float
    margin: float

    @property
    def text(self) -> str:
        return (
            f"'not supported' where the predicted loss is not above {self.level:g}; where it is, "
            f"'supported' if the interval of every difference in quality lies above "
            f"{-self.margin:g} and 'not supported' if one lies below it"
        )

    def __call__(self, found: Evidence) -> Ruling:
        against = _some(found, "null")[0].text()
        for number in _bounded(_some(found, "premise")):
            verdict = above(number.low, number.high, self.level)
            if verdict is None:
                raise MissingError(
                    f"more layers or seeds: {number.label}, {number.text()}, may be on either side "
                    f"of {self.level:g}"
                )
            if verdict == NOT_SUPPORTED:
                why = f"no large loss is predicted: {number.label} is {number.text()}"
                return Ruling(verdict, why, number, against)
        made = _no_worse(found, self.margin, "a large loss is predicted, and ")
        return replace(made, number=_some(found, "premise")[0], against=against)


@dataclass(frozen=True)
class AboveLevel:
    """Each number is above a level, and not where its null is."""

    level: float

    @property
    def text(self) -> str:
        return (
            f"'not supported' where the interval of a number lies below {self.level:g}; where all "
            "lie above it, 'not distinguished from null' if all overlap their null's, otherwise "
            "'supported'"
        )

    def __call__(self, found: Evidence) -> Ruling:
        mine, nulls = _bounded(_some(found, "found")), _some(found, "null")
        if len(nulls) != len(mine):
            raise MissingError(f"a null for each of {len(mine)} numbers")
        each = [above(n.low, n.high, self.level) for n in mine]
        if NOT_SUPPORTED in each:
            shown = mine[each.index(NOT_SUPPORTED)]
            null = nulls[each.index(NOT_SUPPORTED)]
            return Ruling(NOT_SUPPORTED, f"{shown.label} is {shown.text()}", shown, null.text())
        if None in each:
            shown = mine[each.index(None)]
            raise MissingError(
                f"more layers: {shown.label}, {shown.text()}, may be on either side of "
                f"{self.level:g}"
            )
        same = [agree(n, null) for n, null in zip(mine, nulls, strict=True)]
        shown, null = mine[0], nulls[0]
        told = f"{shown.label} is {shown.text()}, the null {null.text()}"
        verdict = NOT_DISTINGUISHED if all(same) else SUPPORTED
        return Ruling(verdict, told, shown, null.text())


@dataclass(frozen=True)
class Reaches:
    """Each factor reaches the stated one and is more than noise."""

    @property
    def text(self) -> str:
        return (
            "'not supported' where the upper bound of a factor stays below the stated one; where "
            "all reach it, 'not distinguished from null' if one lies within the noise of a thing "
            "against itself, otherwise 'supported'"
        )

    def __call__(self, found: Evidence) -> Ruling:
        mine = _bounded(_some(found, "found"))
        told, noise = _some(found, "stated")[0], _bounded(_some(found, "null"))[0]
        for number in mine:
            if number.high < told.low:
                return Ruling(
                    NOT_SUPPORTED,
                    f"{number.label} is {number.text()}, below {spell(told.value)}",
                    number,
                    told.text(),
                )
        for number in mine:
            if number.low <= noise.high:
                return Ruling(
                    NOT_DISTINGUISHED,
                    f"{number.label}, {number.text()}, overlaps the noise, {noise.text()}",
                    number,
                    noise.text(),
                )
        shown = mine[0]
        return Ruling(SUPPORTED, f"{shown.label} is {shown.text()}", shown, told.text())


@dataclass(frozen=True)
class Faster:
    """Each ratio of times lies below the noise around 1."""

    @property
    def text(self) -> str:
        return (
            "'supported' where every ratio of times lies below the noise of a thing against itself,"
            " 'not supported' where one lies above it, otherwise 'not distinguished from null'"
        )

    def __call__(self, found: Evidence) -> Ruling:
        mine, nulls = _bounded(_some(found, "found")), _bounded(_some(found, "null"))
        if len(nulls) == 1:
            nulls *= len(mine)
        if len(nulls) != len(mine):
            raise MissingError(f"the noise of each of {len(mine)} ratios")
        each: list[Verdict] = []
        for number, noise in zip(mine, nulls, strict=True):
            over = max(noise.high, 1.0)
            under = min(noise.low, 1.0)
            each.append(
                NOT_SUPPORTED if number.low > over
                else SUPPORTED if number.high < under
                else NOT_DISTINGUISHED
            )  # fmt: skip
        return _ruling(mine, each, [noise.text() for noise in nulls], _FASTER)


def judged(rule: Rule, found: Evidence) -> tuple[Ruling, str]:
    """The ruling of a rule on evidence, and what is missing for another; nothing is raised."""
    missing = found.missing
    if not missing:
        try:
            return rule(found), ""
        except MissingError as lacking:
            missing = str(lacking)
    number = next(iter(found.of("found")), None)
    against = next((null.text() for null in found.of("null")), "")
    return Ruling(NOT_TESTABLE, f"needs {missing}", number, against), missing


def _no_worse(found: Evidence, margin: float, before: str) -> Ruling:
    mine = _bounded(_some(found, "found"))
    each = [no_worse(n.low, n.high, margin) for n in mine]
    if NOT_SUPPORTED in each:
        shown = mine[each.index(NOT_SUPPORTED)]
        why = f"{before}{shown.label} is {shown.text()}"
        return Ruling(NOT_SUPPORTED, why, shown, spell(-margin))
    if None in each:
        shown = mine[each.index(None)]
        raise MissingError(
            f"more seeds: {shown.label}, {shown.text()}, may be on either side of {-margin:g}"
        )
    shown = min(mine, key=lambda number: number.low)
    why = f"{before}the worst, {shown.label}, is {shown.text()}"
    return Ruling(SUPPORTED, why, shown, spell(-margin))


def _ruling(
    mine: Sequence[Number],
    each: Sequence[Verdict],
    against: Sequence[str],
    words: Mapping[Verdict, str],
) -> Ruling:
    """Of several quantities: the joined verdict, and the first number that has it."""
    verdict = joined(each)
    place = each.index(verdict)
    shown, count = mine[place], sum(one == verdict for one in each)
    so = f"{count} of {len(each)} {words[verdict]}"
    why = f"{so}: {shown.label} is {shown.text()}"
    return Ruling(verdict, why, shown, against[place])


def _some(found: Evidence, role: str) -> tuple[Number, ...]:
    held = tuple(number for number in found.numbers if number.role == role)
    if not held:
        raise MissingError(f"a number that is {role}")
    lost = [number.label for number in held if not math.isfinite(number.value)]
    if lost:
        raise MissingError(f"a value of {lost[0]}")
    return held


def _bounded(numbers: tuple[Number, ...]) -> tuple[Number, ...]:
    for number in numbers:
        if not (math.isfinite(number.low) and math.isfinite(number.high)):
            raise MissingError(f"an interval of {number.label} (more seeds or repeats)")
    return numbers


def _low(number: Number) -> float:
    return number.low if math.isfinite(number.low) else number.value


def _high(number: Number) -> float:
    return number.high if math.isfinite(number.high) else number.value
