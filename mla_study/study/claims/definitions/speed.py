"""Claims about arithmetic and time."""

from __future__ import annotations

from types import ModuleType

import pandas as pd

from mla_study.study.claims.definitions.cache import sizes
from mla_study.study.claims.definitions.common import Reader
from mla_study.study.claims.model import Claim, Evidence, Number, evidence
from mla_study.study.claims.rules import Agrees, Faster, Reaches
from mla_study.study.claims.sources import MissingError, one, rows
from mla_study.study.formulas import evaluated

GPU = ("bench_rollout_full_beside", "bench_rollout_full_within")
QUARTER = "fig_attribution"
NOISE = "noise (A/A)"
READINGS = ("1 + 6 + chunk", "1 + 6 with chunk")
OURS, RIVAL = "VideoMLA", "LongSANA"
QUERIES, KEYS = (1560, 4680), 15600
MANY = 10**6


def compute_ratio(reader: Reader) -> Evidence:
    size = sizes(reader)
    formulas = reader.paper("table1_costs", columns=("metric", "causal_local", "mla_local"))
    row = one(formulas, "table1_costs.csv", metric="compute_nth_token")
    letters = {"W": MANY, "D": size["width"], "n": size["heads"], "d_h": size["head_dim"]}
    letters |= {"d_c": size["d_c"], "d_rope": size["d_rope"], "N": MANY}
    told = evaluated(str(row["mla_local"]), letters) / evaluated(str(row["causal_local"]), letters)
    cost = _cost()
    shape = cost.Shape(
        1, MANY, heads=int(size["heads"]), d_c=int(size["d_c"]), d_rope=int(size["d_rope"]),
        d_head=int(size["head_dim"]),
    )  # fmt: skip
    dense = cost.dense_cost(shape).flops
    wide, narrow = (
        sum(phase.flops for phase in made.phases if phase.kind == "attention")
        for made in (cost.absorbed_cost(shape, value_is_key=True), cost.absorbed_cost(shape))
    )
    measured = [
        Number(f"measured time, {rest}", float(row["value"]), float(row["low"]),
               float(row["high"]), "x", "beside", bounds="quartiles")
        for row, rest in _attention(reader, "layer, absorbed / dense")
    ]  # fmt: skip
    return evidence(
        Number("counted, values d_c + d_rope wide", wide / dense, unit="x",
               provenance="modelled"),
        Number(f"{row['mla_local']} over {row['causal_local']}", told, unit="x", role="stated",
               provenance="paper-quoted"),
        Number("counted, values d_c wide", narrow / dense, unit="x", role="beside",
               provenance="modelled"),
        measured,
    )  # fmt: skip


def layout_speed(reader: Reader) -> Evidence:
    paper = reader.paper("table3_efficiency", columns=("model", "throughput_fps_b200"))
    own, rival = (
        float(one(paper, "table3_efficiency.csv", model=name)["throughput_fps_b200"])
        for name in (OURS, RIVAL)
    )
    tables = [reader.table(name, "factors") for name in GPU if reader.has(name, "factors")]
    full = bool(tables)
    if not full:
        tables = [reader.table(QUARTER, "factors")]
    table = pd.concat(tables, ignore_index=True)
    table = rows(table, "the factors of a rollout", kind="chunk")
    found = [
        _factor(row, f"layout, reconstruct, {reading}", "found")
        for reading in READINGS
        for row in _of(table, reading, "layout, reconstruct")
    ]
    if not found:
        raise MissingError("the factor 'layout, reconstruct' of a rollout")
    beside = [
        _factor(row, f"{factor}, {reading}", "beside")
        for factor in ("window", "all, reconstruct", "layout, reconstruct, d_c 192",
                       "layout, absorbed, d_c 192")
        for reading in READINGS
        for row in _of(table, reading, factor)
    ]  # fmt: skip
    noise = _factor(one(table, "the factors of a rollout", factor=NOISE), "noise, A/A", "null")
    counted = [
        Number(f"FLOPs at Wan 1.3B, {factor}, {reading}", float(row["predicted_full"]), unit="x",
               role="beside", provenance="modelled")
        for factor in ("window", "layout, reconstruct")
        for reading in READINGS
        for row in _of(table, reading, factor)
    ]  # fmt: skip
    ratio = own / rival
    return evidence(
        found, noise,
        Number(f"{OURS} over {RIVAL}, Table 3", ratio, ratio - 0.001, ratio + 0.001, "x",
               "stated", "paper-quoted", "rounding"),
        beside, counted, scale="full" if full else None,
        about=() if full else ("Measured on a model with a quarter of Wan 1.3B's sizes, on one "
                               "CPU thread.",),
    )  # fmt: skip


def _cost() -> ModuleType:
    """The cost model, whose package needs PyTorch. Raises MissingError: it is not installed."""
    try:
        from mla_study.kernels.latent_attention import cost
    except ImportError:
        raise MissingError("PyTorch, for the cost model") from None
    return cost


def _of(table: pd.DataFrame, reading: str, factor: str) -> list[pd.Series]:
    mine = table[(table["reading"] == reading) & (table["factor"] == factor)]
    return [row for _, row in mine.iterrows()]


def _factor(row: pd.Series, label: str, role: str) -> Number:
    return Number(
        label, float(row["value"]), float(row["low"]), float(row["high"]), "x",
        "found" if role == "found" else "null" if role == "null" else "beside",
        bounds="quartiles",
    )  # fmt: skip


def absorbed_form(reader: Reader) -> Evidence:
    size = sizes(reader)
    pairs = {rest: row for row, rest in _attention(reader, "layer, absorbed / reconstruct")}
    noise = {rest: row for row, rest in _attention(reader, "noise, dense / itself")}
    both = [rest for rest in pairs if rest in noise]
    if not both:
        raise MissingError(f"attention at {QUERIES[-1]} queries, with its noise")
    beside = [
        _factor(row, f"absorbed / reconstruct, {rest}", "beside")
        for row, rest in _attention(reader, "layer, absorbed / reconstruct", few=True)
    ]
    at = _cost().crossover(int(size["d_c"]), int(size["d_rope"]), int(size["head_dim"]))
    return evidence(
        [_factor(pairs[rest], f"absorbed / reconstruct, {rest}", "found") for rest in both],
        [_factor(noise[rest], f"dense / itself, {rest}", "null") for rest in both],
        Number("queries below which absorbed has fewer FLOPs", at, unit="queries", role="beside",
               provenance="modelled"),
        beside,
    )  # fmt: skip


def _attention(reader: Reader, quantity: str, few: bool = False) -> list[tuple[pd.Series, str]]:
    """Rows of a ratio at Wan's width and window, of a frame and a chunk or of few queries."""
    _, table = reader.first("bench_attention_cuda", "bench_attention")
    mine = rows(table, "bench_attention", quantity=quantity)
    found: list[tuple[pd.Series, str]] = []
    for _, row in mine.iterrows():
        setting = str(row["setting"])
        if not setting.startswith("full width") or f"K {KEYS}" not in setting:
            continue
        chunk = any(f"M {count}," in setting for count in QUERIES)
        if chunk != few:
            found.append((row, setting.removeprefix("full width, ")))
    return found


CLAIMS = (
    Claim(
        id="compute-ratio",
        statement="A token of absorbed latent attention costs n (d_c + d_rope) / D times one of "
        "local attention, 1.75 at the default.",
        place="Table 1",
        quantity="multiply-adds of attention a query token, over causal local attention",
        unit="x",
        scale="arithmetic",
        null="nothing to chance: the number follows from the sizes that were chosen",
        query=compute_ratio,
        rule=Agrees(),
        figure="table1_cache",
        command="make figures FIG=table1_cache",
        reading="Attention's arithmetic alone: above 1 the latent computes more than dense "
        "local attention, and what it gains is memory.",
    ),
    Claim(
        id="throughput-layout",
        statement="Latent attention makes streaming 1.23 times faster.",
        place="headline number; Table 3",
        quantity="times faster a chunk: dense to latent at the same window",
        unit="x",
        scale="miniature",
        null="a dense model against itself",
        query=layout_speed,
        rule=Reaches(),
        figure="fig_attribution",
        command="make data FIG=fig_attribution",
        reading="The paper's models differ in window and layout at once; here each is changed "
        "alone, and the window's factor is listed beside. `mla-study bench gpu` "
        "measures Wan's own sizes.",
    ),
    Claim(
        id="absorbed-form",
        statement="The absorbed form, which never expands the cache, is the one to infer with.",
        place="method",
        quantity="seconds of absorbed over reconstruct, one layer of Wan 1.3B's width, a frame and "
        "a chunk of queries",
        unit="x",
        scale="full",
        null="dense attention against itself",
        query=absorbed_form,
        rule=Faster(),
        figure="fig_crossover",
        command="make bench",
        reading="Which form wins depends on how many queries share a pass: a frame has 1560, a "
        "chunk 4680; few queries are listed beside. Measured on the hardware named "
        "here; `mla-study bench gpu` measures a GPU.",
    ),
)
