"""The claims on the committed tables: what they say follows from the data, and changes with it."""

from __future__ import annotations

import ast
import math
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import claim_tables
import numpy as np
import pandas as pd
import pytest
from claim_tables import BY_ID, RESULTS, Edit, Without, changed, judge, result

import mla_study.study.claims as package
from mla_study.errors import UserError
from mla_study.study.claims import CLAIMS, evaluate
from mla_study.study.claims.ledger import (
    altered_files,
    changes,
    claim_of,
    drifted,
    read,
    tables_of,
    write,
)
from mla_study.study.claims.model import Verdict
from mla_study.study.claims.report import counts, document, full_text, listing
from mla_study.study.claims.sources import MissingError, Reader, Tables, rows
from mla_study.study.notebooks import Project, discover

VERDICTS = get_args(Verdict)


@pytest.fixture(scope="module")
def outcomes() -> list[package.Outcome]:
    return evaluate(RESULTS)


def by_id(outcomes: list[package.Outcome], name: str) -> package.Outcome:
    return next(one for one in outcomes if one.id == name)


@pytest.fixture(scope="module")
def tables() -> Without:
    return Without(RESULTS)


def test_each_claim_is_judged_by_the_committed_tables(outcomes: list[package.Outcome]) -> None:
    assert len(outcomes) == len(CLAIMS) == len(BY_ID) >= 17
    for one in outcomes:
        assert one.verdict in VERDICTS and one.why and one.claim.statement.endswith(".")
        assert bool(one.missing) == (one.verdict == "not testable here"), one
        if one.verdict != "not testable here":
            assert one.number in one.numbers and one.sources
            assert all(math.isfinite(n.value) for n in one.of("found")), one.id
        for number in one.numbers:
            bounded = math.isfinite(number.low) or math.isfinite(number.high)
            assert not bounded or number.low <= number.value <= number.high, number
            assert number.role != "stated" or number.provenance == "paper-quoted"
            assert number.role != "null" or number.provenance != "modelled"
        measured = [s for s in one.sources if s.run_hash]
        assert all(len(s.run_hash) == 64 and s.hardware for s in measured)
        assert {s.provenance for s in one.sources} <= set(one.provenance)
    assert {one.verdict for one in outcomes} == set(VERDICTS), "every verdict occurs"
    assert {one.scale for one in outcomes} == {"full", "miniature", "arithmetic", "other models"}


def test_numbers_are_those_of_the_tables(outcomes: list[package.Outcome]) -> None:
    """A few read directly, past the queries."""
    model = pd.read_parquet(RESULTS / "data/bench_model/table.parquet").set_index("quantity")
    share = model.at["cache, latent bf16 / dense bf16", "value"]
    assert by_id(outcomes, "cache-bytes").numbers[0].value == pytest.approx(100 * (1 - share))
    factors = pd.read_parquet(RESULTS / "data/fig_attribution/factors.parquet")
    mine = factors[(factors["factor"] == "layout, reconstruct") & (factors["kind"] == "chunk")]
    assert [n.value for n in by_id(outcomes, "throughput-layout").of("found")] == list(
        mine["value"]
    )
    scores = pd.read_parquet(RESULTS / "data/study_scores/table.parquet")
    rows = scores[
        (scores["metric"] == "iou") & (scores["stage"] == "dmd") & (scores["clips"] == 1)
        & (scores["condition"] == "plain") & (scores["scope"] == "first")
    ]  # fmt: skip
    kept = rows.set_index("run")["value"]
    gaps = [kept[f"spectral-12-s{seed}"] - kept[f"dense-s{seed}"] for seed in range(3)]
    found = by_id(outcomes, "short-horizon-parity").of("found")[1]
    assert found.value == pytest.approx(np.mean(gaps))
    errors = rows.set_index("run")["se"]
    pairs = [errors[f"{run}-s{seed}"] for run in ("spectral-12", "dense") for seed in range(3)]
    half = max(
        4.302653 * np.std(gaps, ddof=1) / 3**0.5,
        1.96 * float(np.sqrt(np.square(pairs).sum())) / 3,
    )
    assert (found.low, found.high) == (
        pytest.approx(np.mean(gaps) - half), pytest.approx(np.mean(gaps) + half),
    )  # fmt: skip


def test_claims_hold_no_verdict() -> None:
    """Neither the words nor the constants; only rules name verdicts."""
    folder = Path(package.__file__).parent / "definitions"
    files = sorted(folder.glob("*.py"))
    assert len(files) > 5
    constants = {"SUPPORTED", "NOT_SUPPORTED", "NOT_DISTINGUISHED", "ARITHMETIC", "NOT_TESTABLE"}
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value.strip().lower() not in VERDICTS, (file.name, node.value)
            if isinstance(node, ast.ImportFrom):
                assert not constants & {alias.name for alias in node.names}, file.name
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert name not in {*constants, "Ruling", "verdict"}, (file.name, name)


def test_each_claim_names_its_figure_and_its_command() -> None:
    known = {figure.id for figure in discover(Project(RESULTS.parent))}
    for claim in CLAIMS:
        assert claim.figure in known, claim.id
        assert claim.command.startswith(("make ", "mla-study ", "rank-probe ")), claim.id
        assert claim.place and claim.quantity and claim.null and claim.reading and claim.unit
        assert len(claim.statement) < 200, "one line"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_without_a_table_a_claim_is_not_testable(claim: package.Claim, tables: Without) -> None:
    full = claim_tables.judged_without(claim, "", tables)
    for source in full.sources:
        lost = claim_tables.judged_without(claim, source.file, tables)
        assert lost.verdict == "not testable here"
        assert source.file.rsplit("/", 1)[0].replace("paper", "results/paper") in lost.missing or (
            f"results/{source.file}" in lost.missing
        )


def put(column: str, value: object, **where: object) -> Edit:
    """Set a column where others have these values; at least one row must be meant."""

    def edit(frame: pd.DataFrame) -> None:
        meant = np.logical_and.reduce([frame[name] == held for name, held in where.items()])
        assert meant.any(), where
        frame.loc[meant, column] = value

    return edit


SCORES, RANKS = "data/study_scores/table.parquet", "data/study_ranks/table.parquet"
PLAIN = {"stage": "dmd", "condition": "plain", "scope": "first", "clips": 1, "d_c": 12}
EDITS: list[tuple[str, str, Edit, Verdict]] = [
    ("cache-ratio", "paper/table4_hyperparameters.csv", put("value", "128", name="d_c"),
     "not supported"),
    ("cache-bytes", "data/bench_model/table.parquet",
     put("value", 0.08, quantity="cache, latent bf16 / dense bf16"), "not supported"),
    ("memory-slope", "data/fig7_batch_scaling/table.parquet",
     put("slope_gb", 1.2, d_c=192, window="21 frames", transient="k_nope and v", storage="bf16"),
     "not supported"),
    ("full-rank-miniature", RANKS,
     put("value", 30.0, metric="r_0.99", gauge="raw", operator="kv", step=0), "not supported"),
    ("unlike-language-models", "paper/wan_spectrum.csv",
     put("high", 0.9, quantity="energy_at_192"), "not distinguished from null"),
    ("spectral-error-weights", SCORES,
     put("value", 0.5, metric="iou", init="spectral", **PLAIN), "not supported"),
    ("rank-filled-quoted", "paper/fig8_rank_saturation.csv",
     put("r_0.99_median", 150, init="random", training_step_k=9.5), "not supported"),
    ("rank-both-inits", RANKS,
     put("null_value", 9.0, metric="r_0.99_interp", null="gaussian_product", operator="composed"),
     "supported"),
    ("rank-kept-by-training", RANKS,
     put("value", 10.0, metric="r_0.99_interp", operator="composed", step=0), "supported"),
    ("short-horizon-parity", SCORES,
     put("value", 0.7, metric="iou", init="spectral", **PLAIN), "not supported"),
    ("long-horizon-best", "paper/table2_long_horizon.csv",
     put("overall", 0.9, model="VideoMLA", horizon_s=30), "arithmetic only"),
    ("user-study", "paper/table2_user_study.csv",
     put("prompt_adherence", 2.0, model="VideoMLA"), "not supported"),
    ("throughput-rows", "paper/table3_efficiency.csv",
     put("latency_s_b200", 3.0, model="VideoMLA"), "not supported"),
    ("compute-ratio", "paper/table1_costs.csv",
     put("mla_local", "W (d_c + d_rope)", metric="compute_nth_token"), "not supported"),
    ("absorbed-form", "data/bench_attention/table.parquet",
     put("low", 0.9, quantity="layer, absorbed / reconstruct"), "not distinguished from null"),
    ("relative-positions-motion", SCORES,
     put("value", 0.9, metric="iou", condition="absolute", scope="all"), "not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "edit", "verdict"), EDITS, ids=[e[0] for e in EDITS])
def test_other_data_give_another_verdict(
    name: str, file: str, edit: Edit, verdict: Verdict, tmp_path: Path,
    outcomes: list[package.Outcome],
) -> None:  # fmt: skip
    before, after = by_id(outcomes, name), judge(name, changed(file, edit, tmp_path))
    assert after.verdict == verdict
    assert not altered_files([after])
    if name not in ("unlike-language-models", "throughput-rows"):
        assert before.verdict != after.verdict
    else:
        assert before.numbers != after.numbers


def test_wan_joins_when_its_weights_are_given(tmp_path: Path) -> None:
    def probed(rank: float, energy: float) -> pd.DataFrame:
        return pd.DataFrame(
            {"checkpoint": "Wan2.1-T2V-1.3B", "layer": layer, "attention": "self",
             "operator": "kv", "gauge": "raw", "metric": metric, "value": value + layer,
             "null_value": 1424.0, "null_se": 0.6, "m": 3072, "n": 1536}
            for layer in range(10)
            for metric, value in (("r_0.99", rank), ("energy_at_192", energy - layer),
                                  ("energy_at_n/8", energy - layer))
        )  # fmt: skip

    high = result(tmp_path / "a", "wan_spectra", {"table": probed(1340, 0.46)})
    found = judge("full-rank-wan", high)
    assert found.verdict == "supported" and found.hardware == ("a made-up card",)
    assert found.of("found")[0].value == pytest.approx(1340 / 1536)
    low = result(tmp_path / "b", "wan_spectra", {"table": probed(700, 0.9)})
    assert judge("full-rank-wan", low).verdict == "not supported"
    assert judge("unlike-language-models", low).verdict == "not supported"


def test_a_gpu_turns_arithmetic_into_measurement(tmp_path: Path) -> None:
    columns = {"device": "card", "status": "ok", "window": "21 frames", "storage": "bf16"}
    measured = pd.DataFrame(
        {**columns, "form": form, "transient": transient, "batch": batch,
         "total_gb": 3 + slope * batch}
        for form, transient, slope in (("dense", "none", 6.3), ("reconstruct", "k_nope and v", 0.8))
        for batch in (1, 2, 4)
    )  # fmt: skip
    table = pd.read_parquet(RESULTS / "data/fig7_batch_scaling/table.parquet")
    both = {"table": table, "measured": measured}
    folder = result(tmp_path / "a", "fig7_batch_scaling", both)
    found = judge("memory-slope", folder)
    assert found.verdict == "supported" and len(found.of("found")) == 2
    measured.loc[measured["form"] == "dense", "total_gb"] *= 2
    assert judge("memory-slope", result(folder, "fig7_batch_scaling", both)).verdict == (
        "not supported"
    )
    short = {"table": table, "measured": measured[measured["batch"] == 1]}
    assert judge("memory-slope", result(folder, "fig7_batch_scaling", short)).verdict == (
        "not testable here"
    )

    factors = pd.read_parquet(RESULTS / "data/fig_attribution/factors.parquet")
    factors.loc[factors["factor"] == "layout, reconstruct", ["value", "low", "high"]] = 1.3
    made = result(tmp_path / "b", "bench_rollout_full_beside", {"factors": factors})
    faster = judge("throughput-layout", made)
    assert (faster.verdict, faster.scale) == ("supported", "full")
    assert judge("throughput-layout").scale == "miniature"


def vbench(folder: Path, kind: str, total: float, **unlike: object) -> None:
    table = pd.DataFrame(
        {"scorer": ["total"], "label": "Total (4:1)", "value": total, "low": total - 0.002,
         "high": total + 0.002, "validity": "full"}
    )  # fmt: skip
    protocol: dict[str, Any] = {
        "mode": "short", "prompts": "p", "extended": None, "extended_by": "", "samples": 5,
        "size": "832x480", "fps": "16", "frames": "81", "vbench": "0.1.5", "patches": [],
        "static_filter": True, "long_configs": None, "aggregation": "", "clip_to_clip": None,
        "weights": {},
    }  # fmt: skip
    result(folder, f"vbench_{kind}", {"table": table}, {"protocol": {**protocol, **unlike}})


def test_two_runs_of_vbench_are_compared_if_they_are_alike(tmp_path: Path) -> None:
    vbench(tmp_path, "dense", 0.84)
    alone = judge("short-horizon-vbench", tmp_path)
    assert alone.verdict == "not testable here" and "vbench_latent" in alone.missing
    for total, verdict in ((0.838, "supported"), (0.80, "not supported"),
                           (0.83, "not testable here")):  # fmt: skip
        vbench(tmp_path, "latent", total)
        assert judge("short-horizon-vbench", tmp_path).verdict == verdict
    vbench(tmp_path, "latent", 0.838, prompts="q")
    unlike = judge("short-horizon-vbench", tmp_path)
    assert unlike.verdict == "not testable here" and "prompt file" in unlike.missing


def test_a_single_seed_counts_its_videos(tmp_path: Path) -> None:
    folder = changed(SCORES, lambda frame: frame[frame["seed"] == 0], tmp_path)
    found = judge("short-horizon-parity", folder).of("found")[1]
    assert "1 seed" in found.label and found.bounds == "95 %, over the videos of one seed"
    assert found.low < found.value < found.high
    none = changed(SCORES, lambda frame: frame.assign(se=np.nan), tmp_path / "b")
    one = changed(SCORES, lambda frame: frame[frame["seed"] == 0].assign(se=np.nan), tmp_path / "c")
    assert judge("short-horizon-parity", none).verdict == "supported"
    lost = judge("short-horizon-parity", one)
    assert lost.verdict == "not testable here" and "an interval" in lost.missing


def test_a_ledger_is_read_back_and_held_against_the_data(
    tmp_path: Path, outcomes: list[package.Outcome]
) -> None:
    write(outcomes, tmp_path / "claims")
    kept = read(tmp_path / "claims")
    assert list(kept.table["id"]) == [claim.id for claim in CLAIMS]
    assert (
        kept.run["identity"]["inputs"][SCORES]
        == by_id(outcomes, "short-horizon-parity").sources[0].sha256
    )
    assert changes(kept, outcomes) == [] and drifted(kept, outcomes) == []

    folder = changed(SCORES, put("value", 0.7, metric="iou", init="spectral", **PLAIN), tmp_path)
    now = judge("short-horizon-parity", folder)
    others = [one for one in outcomes if one.id != now.id]
    [change] = changes(kept, [now, *others])
    assert (change.old, change.new) == ("supported", "not supported")
    assert change.text() == (
        f"short-horizon-parity: supported -> not supported (changed: results/{SCORES})"
    )
    [gone] = changes(kept, others)
    assert gone.new == "no such claim"
    slight = changed(
        SCORES, put("value", 0.79, metric="iou", init="spectral", **PLAIN), tmp_path / "b"
    )
    near = judge("short-horizon-parity", slight)
    assert changes(kept, [near, *others]) == [] and drifted(kept, [near, *others]) == [near.id]


def test_what_is_written_is_what_a_page_shows(outcomes: list[package.Outcome]) -> None:
    made = tables_of(outcomes)
    assert len(made["table"]) == len(outcomes)
    assert len(made["numbers"]) == sum(len(one.numbers) for one in outcomes)
    lines = listing(outcomes).splitlines()
    assert len(lines) == len(outcomes) + 3 and lines[-1] == counts(outcomes)
    narrow = listing(outcomes, 80).splitlines()
    assert all(len(line) <= 80 for line in narrow if line.startswith("    "))
    for one, plain in zip(outcomes, document(outcomes), strict=True):
        text = " ".join(full_text(one).replace("\u00a0", " ").split())
        assert one.claim.statement in text and one.claim.command in text
        for source in one.sources:
            assert source.file in text and source.run_hash[:12] in text
        assert [n["value"] for n in plain["numbers"]] == [n.value for n in one.numbers]
        assert all(n["low"] is None or math.isfinite(n["low"]) for n in plain["numbers"])
    found = Counter(one.verdict for one in outcomes)
    assert all(f"{count} {verdict}" in counts(outcomes) for verdict, count in found.items())


def test_names_of_claims() -> None:
    with pytest.raises(UserError, match="did you mean cache-ratio"):
        claim_of("cache-ration")
    with pytest.raises(UserError, match="claims list"):
        claim_of("zzzz")


def test_a_changed_table_is_read_and_told(tmp_path: Path) -> None:
    folder = changed(SCORES, put("value", 0.7, metric="iou", init="spectral", **PLAIN), tmp_path,
                     honest=False)  # fmt: skip
    found = judge("short-horizon-parity", folder)
    assert found.verdict == "not supported" and altered_files([found]) == [SCORES]
    assert "ALTERED" in full_text(found)
    with pytest.raises(UserError, match="is not the table that its run record describes"):
        write([found], tmp_path / "claims")


def test_folders_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of results"):
        Tables(tmp_path)
    folder = tmp_path / "data" / "study_scores"
    folder.mkdir(parents=True)
    reader = Reader(Tables(tmp_path))
    with pytest.raises(MissingError, match="results/data/study_scores"):
        reader.table("study_scores")
    for content in ("{", "{}", '{"tables": [], "observed": {}}'):
        (folder / "run.json").write_text(content)
        with pytest.raises(UserError, match="no run record"):
            reader.table("study_scores")
    result(tmp_path / "data", "study_scores", {"table": pd.DataFrame({"a": [1]})})
    with pytest.raises(MissingError, match="column b of data/study_scores"):
        reader.table("study_scores", columns=("a", "b"))
    with pytest.raises(MissingError, match="results/data/study_scores/other"):
        reader.table("study_scores", "other")
    with pytest.raises(MissingError, match="with a = 2"):
        rows(reader.table("study_scores"), "it", a=2)
    with pytest.raises(MissingError, match="column c of it"):
        rows(reader.table("study_scores"), "it", c=2)
    (tmp_path / "data/study_scores/table.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as a table"):
        Reader(Tables(tmp_path)).table("study_scores")
