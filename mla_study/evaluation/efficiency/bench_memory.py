"""``mla-study bench memory`` and ``bench batch``: cache, peak of a step, and Fig. 7's slopes.

Closed form (:mod:`memory`) and count of live tensors (:mod:`step_memory`) are of class
``modelled`` and need no GPU; a small model is measured on the CPU, Wan's own on a GPU where one is.

Example::

    mla-study bench batch --no-write
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mla_study.config import LatentConfig, ModelConfig, WindowConfig, wan_1_3b
from mla_study.evaluation.efficiency.memory import (
    CAPACITIES,
    GB,
    Channels,
    max_batch,
    slope,
    text_bytes,
    weight_bytes,
    with_latent_dim,
)
from mla_study.evaluation.efficiency.model_cost import WINDOWS, variant_of
from mla_study.evaluation.efficiency.step_memory import (
    Step,
    StepMemory,
    counted,
    counted_slope,
    in_child,
    measured,
)
from mla_study.evaluation.goals import Goal, Row, say, show, table_of
from mla_study.evaluation.timing import free_device_memory, out_of_memory
from mla_study.model.storage import Storage
from mla_study.study.notebooks import Project
from mla_study.study.runs import file_sha256, round_significant, write_result

PROGRAM = "bench"
MODULES = ("mla_study.evaluation.efficiency.bench_memory",)
PAPER = "results/paper/fig7_batch_scaling_b200.csv"
NO_GPU = "not measured on a GPU yet"
LATENT_DIMS = (64, 128, 192, 256, 512)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
UNITS = {
    "_gb": "1e9 bytes (a request, for slopes and their parts)",
    "max_batch": "requests beside weights and 0.75 GB of runtime",
    "error": "closed form over the paper's slope, less 1",
}


@dataclass(frozen=True)
class Kind:
    """A way to run self-attention and to keep its cache."""

    form: str = "dense"
    storage: Storage = "bf16"
    head_group: int | None = None
    channels: Channels = "made"

    @property
    def transient(self) -> str:
        """What reconstruction makes at a time."""
        if self.form != "reconstruct":
            return "none" if self.form == "dense" else "absorbed queries"
        every = "all channels" if self.channels == "all" else "k_nope and v"
        return every if self.head_group is None else f"{every}, {self.head_group} head at a time"

    def step(self, config: ModelConfig, window: WindowConfig, **more: Any) -> Step:
        """The pass that it makes."""
        return Step(
            config, window, self.form, storage=self.storage, head_group=self.head_group, **more
        )


KINDS = (
    Kind(),
    Kind("reconstruct"),
    Kind("reconstruct", head_group=1),
    Kind("absorbed"),
    Kind("reconstruct", "int8-channel", 1),
    Kind("reconstruct", "int8-token", 1),
    Kind("absorbed", "int8-token"),
)
BATCH_KINDS = (
    Kind("reconstruct"),
    Kind("reconstruct", channels="all"),
    Kind("reconstruct", head_group=1),
    Kind("reconstruct", "int8-token", 1),
)


def small(latent: bool) -> ModelConfig:
    """A quarter of Wan's width in two blocks, for what is measured on a CPU."""
    return replace(
        wan_1_3b(), name="quarter", layers=2, width=384, heads=3, ffn_width=2240,
        latent_size=(16, 26), latent=LatentConfig(d_c=48, d_q=192) if latent else None,
    )  # fmt: skip


def closed_form(kind: Kind, window: str, d_c: int | None = None) -> dict[str, Any]:
    """One row at Wan 1.3B: the parts of the slope, its count, and the largest batch a card."""
    config, rule = wan_1_3b(kind.form != "dense"), WINDOWS[window]
    if config.latent is not None and d_c is not None:
        config = with_latent_dim(config, d_c)
    each = slope(
        config, rule, kind.form,
        storage=kind.storage, channels=kind.channels, head_group=kind.head_group,
    )  # fmt: skip
    row: dict[str, Any] = {
        "layout": "dense" if config.latent is None else "mla",
        "d_c": float("nan") if config.latent is None else float(config.latent.d_c),
        "form": variant_of(config, kind.form),
        "storage": kind.storage,
        "transient": kind.transient,
        "window": window,
        "frames": rule.key_frames,
        "weights_gb": weight_bytes(config) / GB,
        "cache_gb": each.cache / GB,
        "text_gb": text_bytes(config) / GB,
        "activations_gb": each.activations / GB,
        "transient_gb": each.transient / GB,
        "slope_gb": each.total / GB,
        "counted_slope_gb": counted_slope(kind.step(config, rule)) / GB,
    }
    for card, gigabytes in CAPACITIES.items():
        row[f"max_batch_{card.split()[0]}"] = max_batch(config, each, gigabytes * GB)
    return row | {"provenance": "modelled"}


def small_scale(batches: Sequence[int] = (1, 2)) -> Iterator[dict[str, Any]]:
    """Rows measured on the CPU: peak resident memory of one pass, beside what is counted."""
    for kind in KINDS:
        if kind.form == "reconstruct" and kind.head_group is None:
            continue  # on the CPU heads are made one by one in any case
        storage: Storage = "fp32" if kind.storage == "bf16" else kind.storage
        config = small(kind.form != "dense")
        for batch in batches:
            step = replace(
                kind.step(config, WindowConfig(), batch=batch, dtype="fp32"), storage=storage
            )
            row = {
                "form": kind.form,
                "storage": storage,
                "batch": batch,
                "model": config.name,
                "device": "cpu",
                "counted_peak_gb": counted(step).peak / GB,
            }
            try:
                yield row | _bytes_of(in_child(step)) | {"status": "ok"}
            except MemoryError:
                yield row | {"status": "OOM"}


def on_gpu(kinds: Sequence[Kind], windows: Sequence[str], batches: Sequence[int]) -> Iterator[Any]:
    """Rows measured at Wan 1.3B's real shapes: bytes that torch allocated at the peak of a pass.

    A batch that runs out of memory gives a row that says OOM, and ends its kind.
    """
    device = torch.device("cuda")
    for window in windows:
        for kind in kinds:
            config = wan_1_3b(kind.form != "dense")
            for batch in batches:
                row = {
                    "form": kind.form,
                    "storage": kind.storage,
                    "transient": kind.transient,
                    "window": window,
                    "batch": batch,
                    "model": config.name,
                    "device": torch.cuda.get_device_name(device),
                }
                found = _unless_full(kind.step(config, WINDOWS[window], batch=batch), device)
                if found is None:
                    free_device_memory()
                    yield row | {"status": "OOM"}
                    break
                yield row | _bytes_of(found) | {"status": "ok"}


def _unless_full(step: Step, device: torch.device) -> StepMemory | None:
    """What a step takes, None where memory runs out; only then is all that it held let go of."""
    try:
        return measured(step, device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def _bytes_of(found: StepMemory) -> dict[str, Any]:
    total = sum(asdict(found).values())
    parts = {f"{name}_gb": size / GB for name, size in asdict(found).items()}
    return {**parts, "total_gb": total / GB, "provenance": "measured"}


def batch_table(paper: pd.DataFrame) -> pd.DataFrame:
    """Fig. 7: slopes of every layout, window and transient, the paper's beside those of 21 frames.

    Args:
        paper: columns layout, d_c, memory_slope_gb_per_request.
    """
    rows = [closed_form(Kind(), window) for window in WINDOWS]
    rows += [
        closed_form(kind, window, d_c)
        for window in WINDOWS
        for kind in BATCH_KINDS
        for d_c in LATENT_DIMS
    ]
    table = pd.DataFrame(rows)
    quoted = paper.rename(columns={"memory_slope_gb_per_request": "paper_slope_gb"})
    table = table.merge(quoted[["layout", "d_c", "paper_slope_gb"]], "left", ["layout", "d_c"])
    table.loc[table["window"] != next(iter(WINDOWS)), "paper_slope_gb"] = float("nan")
    table["error"] = table["slope_gb"] / table["paper_slope_gb"] - 1
    dense = table[table["layout"] == "dense"].set_index("window")
    for name in ("slope_gb", "max_batch_80"):
        table[f"{name}_dense"] = table["window"].map(dense[name])
    table["headroom"] = table["max_batch_80"] / table.pop("max_batch_80_dense")
    table["reduction"] = 1 - table["slope_gb"] / table.pop("slope_gb_dense")
    return round_significant(table)


def batch_goals(table: pd.DataFrame) -> list[Row]:
    """What Fig. 7's table should reach, at both readings of the paper's window."""
    made = (table["transient"] == "k_nope and v") | (table["layout"] == "dense")
    bf16, grouped = table["storage"] == "bf16", table["transient"].str.endswith("head at a time")
    default = table["d_c"] == 192
    worst = table.loc[made & bf16, "error"].abs().max()
    rows = [
        Row("slopes over the paper's, largest error", float(worst), "ratio",
            "21 frames, k_nope and v", Goal("<=", 0.05), provenance="modelled"),
        Row("the same with all channels",
            float(table.loc[table["transient"] == "all channels", "error"].abs().max()), "ratio",
            "21 frames, the variant that does not fit", provenance="modelled"),
    ]  # fmt: skip
    for window in list(WINDOWS)[1:]:
        here = default & (table["window"] == window)
        for what, chosen, goal in (
            ("bf16", here & made & bf16, 0.45),
            ("bf16, head by head", here & grouped & bf16, 0.45),
            ("int8, head by head", here & grouped & ~bf16, 0.30),
        ):
            row = table[chosen].iloc[0]
            for form, column in (("closed form", "slope_gb"), ("counted", "counted_slope_gb")):
                rows.append(
                    Row(f"slope, d_c 192, {what}", float(row[column]), "GB a request",
                        f"{window}, {form}", Goal("<=", goal), provenance="modelled")
                )  # fmt: skip
        row = table[here & made & bf16].iloc[0]
        rows.append(
            Row("largest batch at 80 GB over dense", float(row["headroom"]), "ratio",
                f"{window}, both", Goal(">=", 4.0), provenance="modelled")
        )  # fmt: skip
    return rows


def bench_memory(write: bool = True, measure: bool = True) -> int:
    """Print and keep cache bytes and the peak of a step for each variant and window.

    Args:
        measure: also what needs a device: a small model here, Wan's on a GPU.
    """
    modelled = round_significant(
        pd.DataFrame([closed_form(kind, window) for window in WINDOWS for kind in KINDS])
    )
    shown = ["window", "form", "storage", "transient", "cache_gb", "slope_gb", "counted_slope_gb"]
    print(modelled[shown].to_string(index=False))
    rows: list[dict[str, Any]] = []
    if measure:
        say(PROGRAM, "one pass of a small model, each in a process of its own")
        rows += _told(small_scale())
        if torch.cuda.is_available():
            rows += _told(on_gpu(KINDS, list(WINDOWS), (1, 2)))
    note = _gpu_note(rows)
    if write:
        found = {"measured": pd.DataFrame(rows)} if rows else {}
        folder = Project.find().data / "bench_memory"
        _keep(folder, {"table": modelled, **found}, {}, note)
    return 0


def bench_batch(write: bool = True, measure: bool = True, folder: Path | None = None) -> int:
    """Print and keep Fig. 7: slopes against batch, their goals, and what a GPU allocates.

    Args:
        folder: where the tables go, by default ``results/data/fig7_batch_scaling``.
    """
    project = Project.find()
    paper = project.root / PAPER
    table = batch_table(pd.read_csv(paper))
    cards = [f"max_batch_{card.split()[0]}" for card in CAPACITIES]
    shown = ["window", "d_c", "storage", "transient", "slope_gb", "paper_slope_gb", *cards]
    plain = (table["layout"] == "dense") | (table["transient"] == "k_nope and v")
    print(table.loc[plain, shown].to_string(index=False, na_rep=""))
    goals = batch_goals(table)
    show(goals)
    rows: list[dict[str, Any]] = []
    if measure and torch.cuda.is_available():
        rows += _told(on_gpu((KINDS[0], *BATCH_KINDS[::2]), list(WINDOWS), BATCHES))
    note = _gpu_note(rows)
    if write:
        found = {"measured": pd.DataFrame(rows)} if rows else {}
        tables = {"table": table, "goals": table_of(goals), **found}
        where = folder or project.data / "fig7_batch_scaling"
        _keep(where, tables, {Path(PAPER).name: file_sha256(paper)}, note)
    return 0


def _told(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in rows:
        peak = f"peak {row['peak_gb']:.4g} GB" if row["status"] == "ok" else row["status"]
        if row["status"] == "ok" and "counted_peak_gb" in row:
            peak += f", {row['peak_gb'] / row['counted_peak_gb']:.3f} of what is counted"
        where = f"{row.get('window', '')} {row['form']} {row['storage']} batch {row['batch']}"
        print(f"{row['model']} on {row['device']}: {where.strip()}: {peak}", flush=True)
        found.append(row)
    return found


def _gpu_note(rows: Sequence[dict[str, Any]]) -> str:
    devices = sorted({row["device"] for row in rows if row["device"] != "cpu"})
    note = f"measured on {', '.join(devices)}" if devices else NO_GPU
    print(note)
    return note


def _keep(folder: Path, tables: dict[str, pd.DataFrame], inputs: dict[str, str], note: str) -> None:
    config = {
        "model": asdict(wan_1_3b(True)),
        "windows": {name: asdict(window) for name, window in WINDOWS.items()},
    }
    write_result(
        folder, tables, config=config, inputs=inputs, seed=0, modules=MODULES,
        provenance="modelled", validity="full", units=UNITS,
        notes=[note, "activations_gb is fitted on the dense row of the paper's Fig. 7"],
    )  # fmt: skip
    say(PROGRAM, f"wrote {folder}")
