"""The rules of the claims ledger on made-up numbers, at their edges."""

from __future__ import annotations

import math

import pytest

from mla_study.study.claims import rules
from mla_study.study.claims.model import Number, Role, Rule, Verdict, evidence, spell, stated
from mla_study.study.claims.sources import MissingError
from mla_study.study.statistics import median_interval

NAN = math.nan


def n(value: float, low: float = NAN, high: float = NAN, role: Role = "found") -> Number:
    return Number("a number", value, low, high, role=role)


@pytest.mark.parametrize(
    ("value", "low", "high", "margin", "verdict"),
    [
        (0.2, 0.1, 0.3, 0.05, "supported"),
        (0.2, 0.0, 0.4, 0.05, "not distinguished from null"),  # touches zero
        (0.04, 0.01, 0.07, 0.05, "not distinguished from null"),  # below the margin
        (0.05, 0.01, 0.09, 0.05, "not distinguished from null"),  # on the margin
        (-0.2, -0.3, -0.1, 0.05, "not supported"),
        (-0.2, -0.4, 0.0, 0.05, "not distinguished from null"),
        (0.0, 0.0, 0.0, 0.0, "not distinguished from null"),
    ],
)
def test_more(value: float, low: float, high: float, margin: float, verdict: Verdict) -> None:
    assert rules.more(value, low, high, margin) == verdict
    assert rules.MoreThanNull(margin)(evidence(n(value, low, high))).verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.04, 0.1, "supported"),
        (-0.2, -0.06, "not supported"),
        (-0.05, 0.1, None),  # touches the margin from inside
        (-0.2, -0.05, None),  # and from outside
        (-0.2, 0.1, None),
    ],
)
def test_no_worse(low: float, high: float, verdict: Verdict | None) -> None:
    assert rules.no_worse(low, high, 0.05) == verdict
    rule, found = rules.NoWorse(0.05), evidence(n((low + high) / 2, low, high))
    if verdict is None:
        with pytest.raises(MissingError, match="more seeds"):
            rule(found)
    else:
        assert rule(found).verdict == verdict


def test_one_against_is_enough_and_no_answer_is_no_support() -> None:
    good, bad, wide = n(0, -0.01, 0.01), n(-0.2, -0.3, -0.1), n(0, -0.3, 0.3)
    rule = rules.NoWorse(0.05)
    assert rule(evidence(good, bad, wide)).verdict == "not supported"
    with pytest.raises(MissingError):
        rule(evidence(good, wide))
    assert rules.joined(["supported", "not distinguished from null"]) == (
        "not distinguished from null"
    )
    assert rules.joined(["supported", "not distinguished from null", "not supported"]) == (
        "not supported"
    )
    assert rules.joined(["supported", "supported"]) == "supported"


RULES: tuple[Rule, ...] = (
    rules.Agrees(), rules.First(), rules.MoreThanNull(), rules.NoWorse(0.05),
    rules.Despite(0.5, 0.05), rules.AboveLevel(0.5), rules.Reaches(), rules.Faster(),
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_what_is_not_there_gives_no_verdict(rule: Rule) -> None:
    """No number, a NaN, and for those that need it one seed without an interval."""
    others = [n(1, 0.9, 1.1, role) for role in ("stated", "null", "premise")]
    for found in (evidence(), evidence(others), evidence(n(NAN, 0, 1), others)):
        ruling, missing = rules.judged(rule, found)
        assert ruling.verdict == "not testable here" and missing and missing in ruling.why
    if not isinstance(rule, rules.Agrees | rules.First):
        ruling, missing = rules.judged(rule, evidence(n(1.0), others))
        assert ruling.verdict == "not testable here" and "an interval of a number" in missing


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_what_a_query_lacks_stands_above_its_numbers(rule: Rule) -> None:
    full = [n(1, 0.9, 1.1, role) for role in ("found", "stated", "null", "premise")]
    ruling, missing = rules.judged(rule, evidence(full, missing="Wan's weights"))
    assert ruling.verdict == "not testable here" and missing == "Wan's weights"
    assert len(rule.text) > 40


def test_agreement_is_support_only_where_it_was_measured() -> None:
    told = stated("saved", "92.7", "%")
    assert (told.low, told.high) == (pytest.approx(92.65), pytest.approx(92.75))
    measured = Number("bytes", 92.74)
    counted = Number("formula", 92.74, provenance="modelled")
    rule = rules.Agrees()
    assert rule(evidence(measured, told)).verdict == "supported"
    assert rule(evidence(counted, told)).verdict == "arithmetic only"
    # one stated number is that of all; one that is only computed makes it arithmetic
    assert rule(evidence(measured, counted, told)).verdict == "arithmetic only"
    off = rule(evidence(measured, Number("bytes", 92.76), told))
    assert off.verdict == "not supported" and "1 of 2" in off.why
    assert off.number == Number("bytes", 92.76)
    with pytest.raises(MissingError):
        rule(evidence(measured, measured, measured, told, told))


def test_places() -> None:
    first, second = Number("a", 1), Number("b", 2)
    assert rules.First()(evidence(first, first)).verdict == "arithmetic only"
    lost = rules.First()(evidence(first, second))
    assert lost.verdict == "not supported" and "b: place 2" in lost.why


def test_above_a_level_and_its_null() -> None:
    rule, null = rules.AboveLevel(0.5), n(0.93, 0.92, 0.94, "null")
    assert rule(evidence(n(0.86, 0.83, 0.9), null)).verdict == "supported"
    assert rule(evidence(n(0.9, 0.85, 0.92), null)).verdict == "not distinguished from null"
    assert rule(evidence(n(0.4, 0.3, 0.49), null)).verdict == "not supported"
    for low, high in ((0.5, 0.6), (0.4, 0.5), (0.4, 0.6)):
        with pytest.raises(MissingError):
            rule(evidence(n(0.5, low, high), null))
    with pytest.raises(MissingError, match="a null for each"):
        rule(evidence(n(0.86, 0.83, 0.9), n(0.86, 0.83, 0.9), null))


def test_quality_in_spite_of_a_prediction() -> None:
    rule, null = rules.Despite(0.5, 0.05), n(0.7, 0.6, 0.8, "null")
    large, small = n(0.6, 0.55, 0.65, "premise"), n(0.1, 0.05, 0.2, "premise")
    good, bad = n(0, -0.02, 0.02), n(-0.3, -0.4, -0.2)
    assert rule(evidence(good, large, null)).verdict == "supported"
    assert rule(evidence(bad, large, null)).verdict == "not supported"
    for quality in (good, bad):
        assert rule(evidence(quality, small, null)).verdict == "not supported"
    with pytest.raises(MissingError):
        rule(evidence(good, n(0.5, 0.45, 0.55, "premise"), null))


def test_a_factor_must_reach_what_is_stated_and_beat_noise() -> None:
    told, noise = n(1.23, 1.22, 1.24, "stated"), n(1, 0.95, 1.02, "null")
    rule = rules.Reaches()
    assert rule(evidence(n(1.25, 1.2, 1.3), told, noise)).verdict == "supported"
    assert rule(evidence(n(1.2, 1.1, 1.22), told, noise)).verdict == "supported"  # touches
    assert rule(evidence(n(1.03, 1.0, 1.05), told, noise)).verdict == "not supported"
    wide = n(1.2, 1.02, 1.4)
    assert rule(evidence(wide, told, noise)).verdict == "not distinguished from null"
    both = evidence(n(1.25, 1.2, 1.3), n(1.03, 1.0, 1.05), told, noise)
    assert rule(both).verdict == "not supported"


def test_faster_than_noise() -> None:
    rule, noise = rules.Faster(), n(1, 0.95, 1.02, "null")
    assert rule(evidence(n(0.8, 0.7, 0.9), noise)).verdict == "supported"
    assert rule(evidence(n(1.5, 1.4, 1.6), noise)).verdict == "not supported"
    for low, high in ((0.9, 0.95), (1.02, 1.1), (0.99, 1.01)):
        assert rule(evidence(n(1, low, high), noise)).verdict == "not distinguished from null"
    # noise that lies to one side of 1 does not make 1 an effect
    aside = n(0.9, 0.88, 0.94, "null")
    assert rule(evidence(n(0.98, 0.97, 0.99), aside)).verdict == "not distinguished from null"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (13.714285, "13.71"), (0.0006603, "0.0006603"), (187.0, "187"), (-0.05, "-0.05"),
     (4680.0, "4680"), (1.2e-7, "1.2e-07"), (1234567.0, "1.23e+06"), (12340.6, "12341")],
)  # fmt: skip
def test_spelling(value: float, text: str) -> None:
    assert spell(value) == text


def test_interval_of_a_median_needs_no_distribution() -> None:
    import numpy as np

    assert median_interval(np.arange(1, 31)) == (15.5, 10, 21)
    assert median_interval(np.array([3.0, 1, 2, 4])) == (2.5, 1, 4)
    assert median_interval(np.array([2.0])) == (2, 2, 2)
    assert np.isnan(median_interval(np.array([1.0, NAN]))).all()
    assert np.isnan(median_interval(np.array([]))).all()
    rng = np.random.default_rng(0)
    held = [
        low <= 0 <= high
        for _ in range(400)
        for _, low, high in [median_interval(rng.standard_cauchy(30))]
    ]
    assert 0.92 < np.mean(held) <= 1
