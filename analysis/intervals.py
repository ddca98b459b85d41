"""What intervals say: the words for a difference, a cost, a break or a correlation.

Each takes the ends of a 95 % interval; what it does not carry is :data:`OPEN`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from analysis.miniature import MARGIN

OPEN = "not settled"
LEAST = 1e-6
"""What is nearer to 0 is rounding: the tables keep shares, losses and IoU to seven digits."""
Verdict = Callable[[float, float], str]


def sign(less: str, more: str, same: str = "not told apart") -> Verdict:
    """Verdict of a difference: below zero, above it, or an interval with zero in it."""

    def verdict(low: float, high: float) -> str:
        if not np.isfinite([low, high]).all():
            return OPEN
        return more if low > 0 else less if high < 0 else same

    return verdict


def cost(low: float, high: float) -> str:
    """Verdict of a difference of shares or IoU from a reference, with the margin :data:`MARGIN`."""
    if not np.isfinite([low, high]).all():
        return OPEN
    if low > 0:
        return "gains"
    if high < -MARGIN:
        return f"costs more than {MARGIN:g}"
    if low > -MARGIN:
        return f"costs less than {MARGIN:g}" if high < 0 else f"no cost of {MARGIN:g}"
    return "costs" if high < 0 else OPEN


def breaks(low: float, high: float) -> str:
    """Verdict of a difference from the dense student: is it beyond :data:`MARGIN`?"""
    if not np.isfinite([low, high]).all():
        return OPEN
    return "breaks" if high < -MARGIN else "holds" if low > -MARGIN else OPEN


def predicts(expected: int) -> Verdict:
    """Verdict of a rank correlation whose sign should be ``expected``."""

    def verdict(low: float, high: float) -> str:
        if not np.isfinite([low, high]).all():
            return "the same for all"
        low, high = sorted((expected * low, expected * high))
        return "predicts" if low > 0 else "predicts the reverse" if high < 0 else "does not predict"

    return verdict


def beyond_size(verdict: str, gain: float, low: float) -> str:
    """Verdict of a predictor beside the null that orders runs by d_c alone.

    Args:
        verdict: of the predictor by itself, see :func:`predicts`.
        gain, low: what its correlation has more than the null's, and the interval's lower end.
    """
    if verdict != "predicts":
        return verdict
    if gain < LEAST:
        return "no more than $d_c$ itself"
    return "predicts, more than $d_c$" if low > 0 else f"predicts; more than $d_c$: {OPEN}"
