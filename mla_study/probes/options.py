"""What a probe measures: operators, gauges, metrics, and what the checkpoint does not say."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from mla_study.errors import UserError
from mla_study.probes.layer import DEFAULT_OPERATORS, OPERATORS, Request
from mla_study.probes.spectrum import DEFAULT_KS, METRICS
from mla_study.probes.stacks import GAUGES
from mla_study.probes.table import EDGE

UNITS = {
    "r_*": "singular values (count)",
    "energy_at_*": "fraction of the squared Frobenius norm",
    "functional_error_at_*": "relative RMS error of the output",
    "overlap*": "fraction of the subspace dimension",
    "principal_angle_*": "radians",
    "stable_rank": "singular values (count)",
    "entropy_rank": "singular values (count)",
    "participation_ratio": "singular values (count)",
    "spectral_norm": "units of the operator in its gauge",
    "condition": "ratio",
    "tail_exponent": "exponent",
    EDGE: "ratio",
    "null_se": "units of the metric (standard deviation of one random matrix)",
    "sigma": "units of the operator in its gauge",
}
WEIGHTED_METRICS = tuple(f"functional_error_at_{k}" for k in (*DEFAULT_KS, "n/8"))
_OTHER_METRICS = ("overlap", "principal_angle")


def _words(given: str | Iterable[str]) -> tuple[str, ...]:
    text = given if isinstance(given, str) else " ".join(given)
    return tuple(dict.fromkeys(text.replace(",", " ").split()))


@dataclass(frozen=True)
class Options:
    """All that decides what a probe measures.

    Raises:
        UserError: an unknown operator, gauge or metric, or a count below 1.
    """

    operators: tuple[str, ...] = DEFAULT_OPERATORS
    gauges: tuple[str, ...] = GAUGES
    metrics: tuple[str, ...] = ()
    heads: int | None = None
    kv_heads: int | None = None
    layers: int | None = None
    config: str | None = None
    weights: str | None = None
    base: str | None = None
    maps: tuple[str, ...] = ()
    covariance: str | None = None
    source: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("operators", OPERATORS), ("gauges", GAUGES)):
            words = tuple(dict.fromkeys(getattr(self, name)))
            object.__setattr__(self, name, words)
            if not words:
                raise UserError(f"no {name} are named: choose from {', '.join(known)}")
            for word in words:
                if word not in known:
                    one = name.removesuffix("s")
                    raise UserError(f"there is no {one} {word!r}: choose from {', '.join(known)}")
        for pattern in self.metrics:
            if not fnmatch.filter(
                (*METRICS, *WEIGHTED_METRICS, EDGE), pattern
            ) and not pattern.startswith(_OTHER_METRICS):
                raise UserError(
                    f"no metric is called {pattern!r}: choose from {', '.join(METRICS)}"
                )
        for name in ("heads", "kv_heads", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, but it must be at least 1")
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}, but it must not be negative")

    @classmethod
    def of(cls, **given: Any) -> Options:
        """The same from what people type: lists as 'kv,k', paths as Path.

        Raises:
            UserError: also for an option that there is not.
        """
        known = {f.name for f in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise UserError(
                    f"there is no option {name!r}: choose from {', '.join(sorted(known))}"
                )
            if name in ("operators", "gauges", "metrics"):
                given[name] = _words(value)
            elif name == "maps":
                given[name] = (value,) if isinstance(value, str) else tuple(value)
            elif isinstance(value, PurePath):
                given[name] = str(value)
        return cls(**given)

    @property
    def request(self) -> Request:
        """What each block is asked for; a condition number asked for by name wants ``svdvals``."""
        named = [p for p in self.metrics if p.startswith("cond")]
        exact = any(fnmatch.fnmatchcase("condition", pattern) for pattern in named)
        return Request(self.operators, self.gauges, exact_tail=exact)

    def wants(self, metric: str) -> bool:
        """Whether a metric belongs into the table."""
        return not self.metrics or any(fnmatch.fnmatchcase(metric, p) for p in self.metrics)
