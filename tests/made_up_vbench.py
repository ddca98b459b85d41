"""Results in the shape of ``mla-study vbench run``; their values follow simple formulas."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mla_study.evaluation.vbench.dimensions import DIMENSIONS, OVERALL_6, SUBSTITUTES
from mla_study.evaluation.vbench.scores import composites
from mla_study.study.runs import Provenance, Validity, write_result

PAPER = Path(__file__).resolve().parents[1] / "results" / "paper"
STAND_IN_VALUES = {
    "dynamic_degree[raft-small]": 0.4,
    "imaging_quality[niqe]": 6.5,
    "motion_smoothness[rife]": 0.97,
}


def raw(place: int = 0) -> dict[str, float]:
    """Raw scores of the 16 dimensions: normalised 0.5 and more, rising from one to the next."""
    return {
        name: d.low + (d.high - d.low) * (0.5 + 0.02 * i + 0.01 * place)
        for i, (name, d) in enumerate(DIMENSIONS.items())
    }


def row(model: str, scorer: str, value: float, **more: Any) -> dict[str, Any]:
    """A row of ``table``."""
    made = {
        "model": model, "scorer": scorer, "dimension": scorer.partition("[")[0], "label": scorer,
        "value": value, "low": value - 0.02, "high": value + 0.02, "better": "higher",
        "videos": 10, "prompts": 5, "wanted": 10, "validity": "full", "mode": "short",
        "horizon_s": 5.0,
    }  # fmt: skip
    return made | more


def with_composites(model: str, values: dict[str, float], **more: Any) -> list[dict[str, Any]]:
    """Rows of scores and of the composites that they allow."""
    every = values | composites(values)
    return [row(model, name, value, **more) for name, value in every.items()]


def drift_rows(model: str, values: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    """Each score falling by a tenth along the video, at six times."""
    return [
        {
            "model": model, "scorer": name, "second": float(second), "videos": 8,
            "validity": "substitute" if name in SUBSTITUTES else "full",
            "value": value * (1 - 0.1 * second / seconds),
            "low": value * (1 - 0.1 * second / seconds) - 0.01,
            "high": value * (1 - 0.1 * second / seconds) + 0.01,
        }
        for name, value in values.items()
        for second in np.linspace(1, seconds, 6)
    ]  # fmt: skip


def write(
    folder: Path, rows: list[dict[str, Any]], drift: list[dict[str, Any]] | None = None,
    provenance: Provenance = "measured", validity: Validity = "full",
) -> Path:  # fmt: skip
    """A result folder of these rows."""
    table = pd.DataFrame(rows)
    for name in ("videos", "prompts", "wanted"):
        table[name] = table[name].astype("Int64")
    tables = {"table": table} | ({} if drift is None else {"drift": pd.DataFrame(drift)})
    write_result(
        folder, tables, config={"protocol": {"size": "832x480"}, "name": folder.name},
        inputs={}, seed=0, modules=("mla_study.evaluation.vbench.scores",), provenance=provenance,
        validity=validity,
    )  # fmt: skip
    return folder


def checkout(root: Path) -> Path:
    """A project root with the quoted tables and no result."""
    shutil.copytree(PAPER, root / "results" / "paper")
    return root


def study(root: Path) -> Path:
    """A project root with a short suite, long videos of two models, and the miniature's."""
    data = checkout(root) / "results" / "data"
    extras = {"clip_t": 0.31, "clip_f": 0.97}
    suite = [
        *with_composites("latent", raw(3)),
        *(row("latent", name, value, wanted=None) for name, value in extras.items()),
    ]
    write(data / "vbench_latent_short", suite)
    for place, model in enumerate(("dense", "latent")):
        long = {name: 0.8 + 0.02 * i + 0.005 * place for i, name in enumerate(OVERALL_6)}
        write(
            data / f"vbench_{model}_long",
            with_composites(model, long, mode="long", horizon_s=30.0, wanted=None),
            drift_rows(model, long, 30.0),
        )
    for model in ("miniature dense", "miniature latent"):
        for seconds in (15.0, 150.0):
            rows = [
                row(model, name, value, validity="substitute", mode="custom", horizon_s=seconds)
                for name, value in STAND_IN_VALUES.items()
            ]
            rows.append(
                row(model, "temporal_flickering", 0.98, validity="partial", mode="custom",
                    horizon_s=seconds)
            )  # fmt: skip
            shift = 0.02 * (model == "miniature latent")
            values = {k: v - shift for k, v in (*STAND_IN_VALUES.items(),
                                                ("temporal_flickering", 0.98))}  # fmt: skip
            name = f"vbench_{model.replace(' ', '_')}_{seconds:g}"
            write(data / name, rows, drift_rows(model, values, seconds), validity="substitute")
    assert set(STAND_IN_VALUES) == set(SUBSTITUTES)
    return root
