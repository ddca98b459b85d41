"""Tables in the shape of a finished study; their values follow simple formulas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mla_study.study.runs import write_result

SEEDS = (0, 1, 2)
LAYERS = 2
LOST = {"none": 0.0, "activation": 0.04, "spectral": 0.12, "spectral-raw": 0.2, "random": 0.5}
SLOW = {"none": 0.02, "activation": 0.2, "spectral": 0.6, "spectral-raw": 0.7, "random": 2.0}
TF = (0, 10, 25, 50, 100, 150, 200, 250)
CONDITIONS = {"no-clean-pass": -0.2, "int8-token": -0.004, "history-0": -0.3, "no-sink": -0.02}
Rows = list[dict[str, Any]]


def runs() -> Iterator[dict[str, Any]]:
    """What describes each run, and ``long``."""
    shapes = [("none", 0, 0), *((init, 12, 8) for init in LOST if init != "none")]
    shapes += [("activation", d_c, 8) for d_c in (2, 4, 24, 48)]
    shapes += [("activation", 12, d_rope) for d_rope in (6, 16, 24)]
    for seed in SEEDS:
        for init, d_c, d_rope in shapes:
            name = "dense" if init == "none" else f"{init}-{d_c}"
            name += f"-r{d_rope}" if d_rope not in (0, 8) else ""
            about = {"variant": "dense" if init == "none" else "latent", "init": init}
            about |= {"d_c": d_c, "d_rope": d_rope, "seed": seed}
            yield {"run": f"{name}-s{seed}", **about, "long": False}
            if init == "random":
                yield {"run": f"{name}-t1500-s{seed}", **about, "long": True}


def quality(run: dict[str, Any]) -> float:
    """Share of all-correct videos: less with the init's loss and for small d_c and d_rope."""
    lost = LOST[run["init"]] * (0.3 if run["long"] else 1.0)
    small = 0.0 if run["variant"] == "dense" else 0.5 / run["d_c"] + 0.1 * (run["d_rope"] < 8)
    return 0.8 - lost - small + 0.01 * run["seed"]


def loss(run: dict[str, Any], step: int) -> float:
    """Held-out loss, falling as 1 / (1 + step / 10) towards that of the run's quality."""
    return 0.5 * (1 - quality(run)) + SLOW[run["init"]] / (1 + step / 10)


def tables() -> dict[str, pd.DataFrame]:
    """All tables of a study by name."""
    made: dict[str, Rows] = {
        name: [] for name in ("scores", "drift", "curves", "ranks", "conversion", "spectra")
    }
    about: dict[str, Any] = {}
    for seed in SEEDS:
        about = {"run": "teacher", "variant": "teacher", "init": "none", "d_c": 0, "d_rope": 0,
                 "seed": seed, "stage": "teacher"}  # fmt: skip
        made["scores"] += _scores({**about, "condition": f"plain-s{seed}", "clips": 1}, 0.9)
    made["spectra"] += _spectrum({**about, "state": "teacher"}, "kv", "raw", 1.0)
    made["spectra"] += _spectrum({**about, "state": "teacher"}, "kv", "weighted-raw", 0.5)
    for run in runs():
        about = {name: value for name, value in run.items() if name != "long"}
        made["curves"] += _curves(run, about)
        made["ranks"] += _ranks(run, about)
        for stage in ("tf", "cd", "dmd"):
            plain = {**about, "stage": stage, "condition": "plain", "clips": 1}
            made["scores"] += _scores(plain, quality(run) - 0.05 * (stage != "dmd"))
        if run["d_c"] in (0, 12) and run["d_rope"] in (0, 8):
            made["scores"] += _scores({**plain, "clips": 10}, quality(run) - 0.02)
            made["drift"] += _drift({**plain, "clips": 10}, quality(run))
            if run["init"] in ("none", "activation"):
                made["drift"] += _drift({**plain, "clips": 100}, quality(run))
            for name, cost in CONDITIONS.items() if run["init"] == "activation" else ():
                other = {**plain, "clips": 10, "condition": name}
                made["scores"] += _scores(other, quality(run) + cost - 0.02)
                made["drift"] += _drift(other, quality(run) + cost)
        if run["variant"] == "latent" and not run["long"]:
            start = {**about, "stage": "start"}
            other = {**start, "init": "untrained", "run": f"untrained-{run['d_c']}-s{run['seed']}"}
            for layer in range(LAYERS):
                made["conversion"] += [
                    {**start, "layer": layer, "decision": name, "logit_error": 0.1,
                     "output_error": LOST[run["init"]] + 1 / run["d_c"]}
                    for name in ("kv_rank", "latent_norm")
                ]  # fmt: skip
            made["spectra"] += _spectrum({**start, "state": "start"}, "composed", "raw", 0.2)
            if run["init"] == "activation":
                never = {**other, "state": "untrained"}
                made["spectra"] += _spectrum(never, "composed", "raw", 0.1)
            last = {**about, "stage": "dmd", "state": "trained"}
            made["spectra"] += _spectrum(last, "composed", "raw", 0.25)
    return {name: pd.DataFrame(rows) for name, rows in made.items()}


def write(root: Path) -> Path:
    """A folder with all of the study's results, and the paper's values linked; the folder."""
    for name, frame in tables().items():
        write_result(
            root / "results" / "data" / f"study_{name}", {"table": frame}, config={}, inputs={},
            seed=0, modules=("analysis.miniature",), provenance="measured", validity="full",
        )  # fmt: skip
    (root / "results" / "paper").symlink_to(Path(__file__).parents[1] / "results" / "paper")
    return root


def _scores(about: dict[str, Any], level: float) -> Rows:
    values = {
        "all_correct": level, "iou": 0.5 + level / 2, "velocity_error": 1.5 - level,
        "colour_kept": 0.99, "phase_error": 3 - level, "colour": 0.98,
        "background": 0.2 + level,
    }  # fmt: skip
    scopes = ("first",) if about["clips"] == 1 else ("first", "last", "all")
    return [
        {
            **about,
            "scope": scope,
            "metric": name,
            "value": value,
            "se": 0.0005 if name == "iou" else 0.02,
            "n": 256,
        }
        for scope in scopes
        for name, value in values.items()
    ]


def _drift(about: dict[str, Any], level: float) -> Rows:
    rows: Rows = []
    for window in range(about["clips"]):
        for row in _scores({**about, "clips": 1}, level * (1 - 0.002 * window)):
            del row["scope"]
            row["value"] += 0.5 * window * (row["metric"] == "phase_error")
            rows.append({**row, "clips": about["clips"], "window": window,
                         "second": 1.5 * window + 0.75})  # fmt: skip
    return rows


def _observed(run: dict[str, Any]) -> Iterator[tuple[str, int]]:
    tf = 1500 if run["long"] else 250
    for step in sorted({*TF, *range(250, tf + 1, 250)}):
        yield "tf", step
    yield from (("cd", tf + 50), ("cd", tf + 100), ("dmd", tf + 120), ("dmd", tf + 140))


def _curves(run: dict[str, Any], about: dict[str, Any]) -> Rows:
    rows: Rows = []
    for stage, step in _observed(run):
        here = {**about, "stage": stage, "step": step}
        rows += [{**here, "name": name, "value": loss(run, step)} for name in ("held_out", "loss")]
    return rows


def _ranks(run: dict[str, Any], about: dict[str, Any]) -> Rows:
    latent, d_c = run["variant"] == "latent", run["d_c"] or 12
    other = "spectral" if run["init"] == "activation" else "activation"
    nulls = ("gaussian_product", "untrained") if latent else ("gaussian", "untrained")
    rows: Rows = []
    for stage, step in _observed(run):
        for layer in range(LAYERS):
            here = {**about, "stage": stage, "step": step, "layer": layer, "gauge": "raw",
                    "operator": "composed" if latent else "kv", "m": 168, "n": 96}  # fmt: skip
            rank = 0.97 * d_c + 0.01 * layer - 0.0001 * step
            for null in nulls:
                rows.append({**here, "metric": "r_0.99_interp", "value": rank, "null": null,
                             "null_value": 0.98 * d_c, "null_se": 0.01})  # fmt: skip
            overlaps = {"start": 1 - 0.001 * step**0.5}
            overlaps |= {other: 0.4 if run["init"] != "random" else d_c / 96} if latent else {}
            for name, value in overlaps.items():
                rows.append({**here, "metric": f"overlap_with_{name}", "value": value,
                             "null": "gaussian", "null_value": d_c / 96, "null_se": 0.01,
                             "m": d_c})  # fmt: skip
    return rows


def _spectrum(about: dict[str, Any], operator: str, gauge: str, fall: float) -> Rows:
    count = about["d_c"] or 96
    if gauge == "weighted-raw":
        sigma = 0.8 ** np.arange(count)
    else:
        sigma = 3 * (1 - fall * np.arange(count) / count / (1 if operator == "composed" else 1.1))
    return [
        {**about, "layer": layer, "operator": operator, "gauge": gauge, "index": i,
         "sigma": float(value) * (1 + 0.02 * layer * i / count), "m": 168, "n": 96}
        for layer in range(LAYERS)
        for i, value in enumerate(sigma, 1)
    ]  # fmt: skip
