"""Measured quantities beside their goals: one row each, printed as they come, kept as a result."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import eq, ge, gt, le, lt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from mla_study.evaluation.timing import Spread
from mla_study.study.notebooks import Project
from mla_study.study.runs import Provenance, Validity, write_result

if TYPE_CHECKING:
    import torch

Sign = Literal["<", "<=", ">", ">=", "=="]
_HOLDS = {"<": lt, "<=": le, ">": gt, ">=": ge, "==": eq}


@dataclass(frozen=True)
class Goal:
    """What a quantity should reach."""

    sign: Sign
    value: float

    def met(self, value: float) -> bool:
        """Whether it does."""
        return bool(_HOLDS[self.sign](value, self.value))


@dataclass(frozen=True)
class Row:
    """One quantity; ``spread`` where it was measured more than once."""

    quantity: str
    value: float
    unit: str
    setting: str = ""
    goal: Goal | None = None
    spread: Spread | None = None
    provenance: Provenance = "measured"

    @classmethod
    def of(
        cls, quantity: str, spread: Spread, unit: str, setting: str = "", goal: Goal | None = None
    ) -> Row:
        """A row of repeated measurements: their median, with quartiles."""
        return cls(quantity, spread.median, unit, setting, goal, spread)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        return None if self.goal is None else self.goal.met(self.value)

    def text(self) -> str:
        """The row as a line."""
        spread = f" [{self.spread.low:.4g}, {self.spread.high:.4g}]" if self.spread else ""
        mark = ""
        if self.goal is not None:
            verdict = "met" if self.met else "MISSED"
            mark = f"  goal {self.goal.sign} {self.goal.value:.6g}: {verdict}"
        setting = f"  ({self.setting})" if self.setting else ""
        return f"{self.quantity:<46}{self.value:>10.4g}{spread} {self.unit}{mark}{setting}"

    def flat(self) -> dict[str, Any]:
        """The row as columns."""
        nan = float("nan")
        return {
            "quantity": self.quantity,
            "value": self.value,
            "low": self.spread.low if self.spread else nan,
            "high": self.spread.high if self.spread else nan,
            "unit": self.unit,
            "setting": self.setting,
            "sign": self.goal.sign if self.goal else "",
            "goal": self.goal.value if self.goal else nan,
            "met": self.met,
            "provenance": self.provenance,
        }


def show(rows: Sequence[Row]) -> None:
    """Print rows on stdout, at once."""
    for row in rows:
        print(row.text(), flush=True)


def say(program: str, line: str) -> None:
    """Progress, on stderr."""
    print(f"{program}: {line}", file=sys.stderr, flush=True)


def table_of(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a tidy table with the column ``met``."""
    table = pd.DataFrame([row.flat() for row in rows])
    table["met"] = table["met"].astype("boolean")
    return table


def results_name(name: str, device: torch.device) -> str:
    """Folder of a result: a GPU's stands beside the CPU's."""
    return name if device.type == "cpu" else f"{name}_{device.type}"


def write_rows(
    name: str,
    rows: Sequence[Row],
    *,
    config: Mapping[str, Any],
    modules: Sequence[str],
    more: Mapping[str, pd.DataFrame] | None = None,
    validity: Validity = "full",
    notes: Sequence[str] = (),
    observed: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``results/data/NAME`` and return that folder; ``more`` are further tables."""
    folder = Project.find().data / name
    write_result(
        folder,
        {"table": table_of(rows), **(more or {})},
        config=config,
        inputs={},
        seed=0,
        modules=modules,
        provenance="measured",
        validity=validity,
        units={"value": "see column unit", "low": "first quartile", "high": "third quartile"},
        notes=notes,
        observed=observed,
    )
    return folder
