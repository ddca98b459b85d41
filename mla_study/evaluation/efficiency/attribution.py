"""How much of a speed-up is the window, how much the layout: each step of the change timed alone.

The paper compares a latent model of a short window with dense models of 21 frames (Table 3). Here
every change is made alone, at both readings of its window, and its factor is the median of ratios
turn by turn, beside what FLOPs predict and what a roofline allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from mla_study.config import WindowConfig
from mla_study.evaluation.efficiency.ceilings import Ceilings
from mla_study.evaluation.efficiency.model_cost import WINDOWS, ModelCost
from mla_study.evaluation.efficiency.rollout_bench import Kind
from mla_study.evaluation.efficiency.variants import Scale, Variant, full
from mla_study.evaluation.timing import Times
from mla_study.kernels.latent_attention.cost import Calibration, Rates
from mla_study.rollout.accelerate import Acceleration

EVERYTHING = WINDOWS["21 frames"]
READINGS: Mapping[str, WindowConfig] = {
    name: window for name, window in WINDOWS.items() if window != EVERYTHING
}
PAPER_D_C = 192


@dataclass(frozen=True)
class Factor:
    """``before`` over ``after``: above 1 where the change makes it faster."""

    name: str
    reading: str
    before: Variant
    after: Variant


def factors(scale: Scale, reading: str) -> list[Factor]:
    """The changes of one reading of the window; what needs a GPU only where the scale has one."""
    window = READINGS[reading]
    everything, dense = Variant(EVERYTHING), Variant(window)
    rebuilt = Variant(window, latent=True, form="reconstruct")
    absorbed = replace(rebuilt, form="absorbed")
    auto = replace(rebuilt, form="auto")
    pairs = [
        ("window", everything, dense),
        ("layout, reconstruct", dense, rebuilt),
        ("layout, absorbed", dense, absorbed),
        ("layout, auto", dense, auto),
    ]
    if scale.latent.d_c != PAPER_D_C:
        pairs += [
            (f"layout, reconstruct, d_c {PAPER_D_C}", dense, replace(rebuilt, d_c=PAPER_D_C)),
            (f"layout, absorbed, d_c {PAPER_D_C}", dense, replace(absorbed, d_c=PAPER_D_C)),
        ]
    pairs += [
        ("no clean pass, dense", dense, replace(dense, clean_pass=False)),
        ("no clean pass, latent", auto, replace(auto, clean_pass=False)),
        ("int8 cache, dense", dense, replace(dense, storage="int8-channel")),
        ("int8 cache, latent", auto, replace(auto, storage="int8-channel")),
    ]
    if scale.where.type == "cuda":
        graph = replace(auto, how=Acceleration(graph=True))
        both = replace(auto, how=Acceleration(compile=True, graph=True))
        eight = replace(auto, how=Acceleration(compile=True, graph=True, fp8=True))
        pairs += [
            ("layout, fused absorbed", dense, replace(absorbed, form="absorbed_triton")),
            ("graph", auto, graph),
            ("compile", auto, replace(auto, how=Acceleration(compile=True))),
            ("compile + graph", auto, both),
            ("compile + graph, dense", dense, replace(dense, how=both.how)),
            ("fp8 on top", both, eight),
            ("fp8 + graph + no clean pass", auto, replace(eight, clean_pass=False)),
        ]
    pairs += [("all, reconstruct", everything, rebuilt), ("all, auto", everything, auto)]
    return [Factor(name, reading, before, after) for name, before, after in pairs]


def variants_of(given: Sequence[Factor]) -> list[Variant]:
    """The variants that factors name, each once, the baseline first."""
    return list(dict.fromkeys(v for factor in given for v in (factor.before, factor.after)))


def predicted(factor: Factor, scale: Scale) -> float:
    """Ratio of the FLOPs of a chunk."""
    return factor.before.cost(scale).flops / factor.after.cost(scale).flops


def roofline(factor: Factor, scale: Scale, tops: Ceilings) -> float:
    """Ratio of the chunk's seconds, each phase at the ceiling that binds it."""
    rates = Rates(tops.matmul.median)
    ideal = Calibration(
        "ceilings", scale.dtype, 1, tops.matmul.median, tops.copy.median, rates, rates
    )

    def seconds(variant: Variant) -> float:
        cost: ModelCost = variant.cost(scale)
        form: Any = variant.resolved(scale).removesuffix("_triton")
        return cost.seconds(ideal, form)

    return seconds(factor.before) / seconds(factor.after)


def rows_of(
    given: Sequence[Factor], scale: Scale, times: Mapping[Kind, Times], tops: Ceilings
) -> pd.DataFrame:
    """A row a factor and kind: median and quartiles of the ratios of turns, and predictions.

    ``predicted_full`` is the FLOP ratio at Wan 1.3B, 480x832. A factor whose variants have no
    number is left out; ``noise`` is the first variant against itself.
    """
    rows: list[dict[str, Any]] = []
    for kind, taken in times.items():
        for factor in given:
            before, after = factor.before.name, factor.after.name
            if before not in taken.seconds or after not in taken.seconds:
                continue
            if kind == "step" and factor.before.passes(scale) != factor.after.passes(scale):
                continue
            found = taken.ratio(before, after)
            rows.append(
                {
                    "kind": kind, "reading": factor.reading, "factor": factor.name,
                    "before": before, "after": after, "form": factor.after.resolved(scale),
                    "value": found.median, "low": found.low, "high": found.high,
                    "predicted": predicted(factor, scale),
                    "roofline": roofline(factor, scale, tops),
                    "predicted_full": _at_full(factor, scale),
                }
            )  # fmt: skip
        noise = taken.noise
        rows.append(
            {
                "kind": kind, "reading": "", "factor": "noise (A/A)", "before": "", "after": "",
                "form": "", "value": noise.median, "low": noise.low, "high": noise.high,
                "predicted": 1.0, "roofline": 1.0, "predicted_full": 1.0,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _at_full(factor: Factor, scale: Scale) -> float:
    """The prediction at full size, d_c as there; ``auto`` is the form of fewer FLOPs there."""
    there = full("cpu")

    def flops(variant: Variant) -> float:
        moved = replace(variant, d_c=None)
        if variant.latent and variant.form == "auto":
            each = [replace(moved, form=form) for form in ("reconstruct", "absorbed")]
            return min(v.cost(there).flops for v in each)
        return moved.cost(there).flops

    return flops(factor.before) / flops(factor.after)


def line(row: Mapping[str, Any]) -> str:
    """A factor as text."""
    return (
        f"{row['kind']:<6}{row['reading']:<18}{row['factor']:<34}{row['value']:>7.3f}x "
        f"[{row['low']:.3f}, {row['high']:.3f}]  FLOPs {row['predicted']:.3f}x, "
        f"roofline {row['roofline']:.3f}x, FLOPs at 1.3B {row['predicted_full']:.3f}x"
    )
