"""Claims about the size of the cache and the memory of a request."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mla_study.study.claims.definitions.common import MissingError, Reader
from mla_study.study.claims.model import Claim, Evidence, Number, evidence, stated
from mla_study.study.claims.rules import Agrees
from mla_study.study.claims.sources import one, rows

BY_ARITHMETIC = "nothing to chance: the number follows from the sizes that were chosen"
TOLERANCE = 0.05
FULL, DEFAULT, MADE = "21 frames", 192, "k_nope and v"
UNIT = "GB a request"
FITTED = (
    "The closed form has one number that was fitted to the paper's dense row: 0.22 GB of "
    "activations."
)
READINGS = ("1 + 6 + chunk", "1 + 6 with chunk")


def sizes(reader: Reader) -> dict[str, float]:
    """The paper's hyperparameters that are numbers, by name."""
    table = reader.paper("table4_hyperparameters", columns=("name", "value"))
    values = pd.to_numeric(table["value"], errors="coerce")
    held = {str(name): float(value) for name, value in zip(table["name"], values, strict=True)}
    for name in ("heads", "head_dim", "width", "d_c", "d_nope", "d_rope"):
        if not held.get(name, 0) > 0:
            raise MissingError(f"{name} in results/paper/table4_hyperparameters.csv")
    return held


def cache_ratio(reader: Reader) -> Evidence:
    size = sizes(reader)
    dense = 2 * size["heads"] * size["head_dim"]
    latent = size["d_c"] + size["d_rope"]
    by_size = reader.paper("table5a_latent_dim", columns=("d_c", "cache_compression"))
    told = [stated("dense over latent", "13.71", "x"), stated("saved", "92.7", "%")]
    found = [
        _counted("2 x heads x channels / (d_c + d_rope)", dense / latent, "x"),
        _counted("the share of it that is saved", 100 * (1 - latent / dense), "%"),
    ]
    for row in by_size.to_dict("records"):
        d_c = int(row["d_c"])
        told.append(stated(f"at d_c = {d_c}", f"{row['cache_compression']:.2f}", "x"))
        found.append(_counted(f"the same at d_c = {d_c}", dense / (d_c + size["d_rope"]), "x"))
    return evidence(found, told)


def cache_bytes(reader: Reader) -> Evidence:
    table = reader.table("bench_model", columns=("quantity", "value"))
    name = "cache, latent {} / dense bf16"
    measured = one(table, "bench_model", quantity=name.format("bf16"))
    saved = 100 * (1 - float(measured["value"]))
    beside = [
        Number(f"dense over latent in {kind}", 1 / float(row["value"]), unit="x", role="beside")
        for kind in ("int8 per channel", "int8 per token")
        for row in [one(table, "bench_model", quantity=name.format(kind))]
    ]
    return evidence(
        Number("bytes that the cache holds, saved", saved, unit="%"),
        Number("dense over latent", 1 / float(measured["value"]), unit="x"),
        stated("saved", "92.7", "%"),
        stated("dense over latent", "13.71", "x"),
        beside,
    )


def memory_slope(reader: Reader) -> Evidence:
    columns = ("layout", "window", "storage", "transient", "slope_gb", "reduction")
    table = reader.table("fig7_batch_scaling", columns=(*columns, "d_c", "counted_slope_gb"))
    paper = reader.paper(
        "fig7_batch_scaling_b200", columns=("layout", "d_c", "memory_slope_gb_per_request")
    )
    on_gpu = _gpu_slopes(reader)
    told: list[Number] = []
    found: list[Number] = []
    beside: list[Number] = []
    for row in paper.to_dict("records"):
        layout, value = str(row["layout"]), float(row["memory_slope_gb_per_request"])
        dense = layout == "dense"
        label = layout if dense else f"latent, d_c = {int(row['d_c'])}"
        mine = _row(table, layout, FULL, row["d_c"])
        counted = float(mine["counted_slope_gb"])
        beside.append(_beside(f"tensors counted, {label}", counted, UNIT))
        if on_gpu is None:
            found.append(_counted(f"closed form, {label}", float(mine["slope_gb"]), UNIT))
        elif dense or row["d_c"] == DEFAULT:
            found.append(Number(f"on the GPU, {label}", on_gpu[layout], unit=UNIT))
        else:
            continue
        off = TOLERANCE * value
        told.append(
            Number(
                label, value, value - off, value + off, UNIT, "stated", "paper-quoted",
                f"within {TOLERANCE:.0%}",
            )
        )  # fmt: skip
    for window in (FULL, *READINGS):
        saved = float(_row(table, "mla", window, DEFAULT)["reduction"])
        beside.append(_beside(f"saved by the latent, both at {window}", 100 * saved, "%"))
    return evidence(found, told, beside, about=() if on_gpu else (FITTED,))


def _gpu_slopes(reader: Reader) -> dict[str, float] | None:
    """Slopes of total memory against batch that a GPU showed, by layout; None: no GPU measured."""
    if not reader.has("fig7_batch_scaling", "measured"):
        return None
    columns = ("device", "status", "window", "form", "transient", "storage", "batch", "total_gb")
    table = reader.table("fig7_batch_scaling", "measured", columns)
    good = table[(table["device"] != "cpu") & (table["status"] == "ok")]
    good = good[(good["window"] == FULL) & (good["storage"] == "bf16")]
    found: dict[str, float] = {}
    for layout, form, transient in (("dense", "dense", "none"), ("mla", "reconstruct", MADE)):
        mine = good[(good["form"] == form) & (good["transient"] == transient)]
        if mine["batch"].nunique() > 1:
            fit = np.polyfit(mine["batch"].to_numpy(float), mine["total_gb"].to_numpy(float), 1)
            found[layout] = float(fit[0])
    if len(found) < 2:
        raise MissingError(f"two batches of each layout on a GPU at {FULL}")
    return found


def _row(table: pd.DataFrame, layout: str, window: str, d_c: object) -> pd.Series:
    where: dict[str, object] = {"layout": layout, "window": window}
    if layout != "dense":
        where |= {"d_c": d_c, "storage": "bf16", "transient": MADE}
    return rows(table, "fig7_batch_scaling", **where).iloc[0]


def _counted(label: str, value: float, unit: str) -> Number:
    return Number(label, value, unit=unit, provenance="modelled")


def _beside(label: str, value: float, unit: str) -> Number:
    return Number(label, value, unit=unit, role="beside", provenance="modelled")


CLAIMS = (
    Claim(
        id="cache-ratio",
        statement="The latent cache of a token is 13.71 times smaller than dense keys and values, "
        "92.7 % less.",
        place="headline number; Tables 4 and 5a",
        quantity="scalars cached a token and layer, dense over latent",
        unit="x, %",
        scale="arithmetic",
        null=BY_ARITHMETIC,
        query=cache_ratio,
        rule=Agrees(),
        figure="table1_cache",
        command="make figures FIG=table1_cache",
        reading="Whoever picks d_c = 192 gets this number, whatever the model has learnt. It is "
        "the size of the cache, not of all that a request takes (see memory-slope).",
    ),
    Claim(
        id="cache-bytes",
        statement="The cache of the model as it runs takes 92.7 % fewer bytes.",
        place="headline number",
        quantity="bytes that the cache allocates at Wan 1.3B's sizes, bf16",
        unit="x, %",
        scale="full",
        null="a dense cache of the same window, type and code",
        query=cache_bytes,
        rule=Agrees(),
        figure="table1_cache",
        command="make bench-model",
        reading="Allocated bytes of a rolling cache, not a formula; weights are not needed for it.",
    ),
    Claim(
        id="memory-slope",
        statement="One more request takes 0.82 GB in place of 6.26 GB.",
        place="Fig. 7",
        quantity="memory that one more request adds",
        unit="GB a request",
        scale="full",
        null="dense attention over the same 21 frames",
        query=memory_slope,
        rule=Agrees(),
        figure="fig7_batch_scaling",
        command="mla-study bench batch",
        reading="A closed form stands against the paper's slopes, where every layout keeps 21 "
        "frames; what the latent saves at the rollout's own, shorter windows is listed "
        "beside. Only a GPU's numbers can make this more than arithmetic.",
    ),
)  # fmt: skip
