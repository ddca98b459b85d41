"""What is printed: the right gauge and null beside each number, and one JSON document."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from probe_files import gqa, latent, wan, write

from mla_study.probes.activations import save_covariance
from mla_study.probes.rank_probe import Options, Probed, inspect
from mla_study.probes.table import COLUMNS, Source
from mla_study.study.probe_report import (
    describe,
    document,
    listing,
    records,
    shown_metrics,
    shown_rows,
    summary,
    text_table,
    warn_lines,
    wide,
)
from mla_study.study.probing import Job, execute


def probed(*paths: Path, **options: Any) -> tuple[Probed, dict[str, Any]]:
    return execute(Job(tuple(map(str, paths))), Options.of(**options), None, 1)


@pytest.fixture
def files(tmp_path: Path, seed: int) -> dict[str, Path]:
    rng = np.random.default_rng(seed)
    made = {
        "wan": wan(rng, layers=3, cross=True),
        "gqa": gqa(rng, layers=2),
        "mla": latent(rng, layers=2),
    }
    return {name: write(tmp_path / f"{name}.safetensors", a) for name, a in made.items()}


def test_each_checkpoint_is_shown_in_the_gauge_that_it_has(files: dict[str, Path]) -> None:
    """One checkpoint without a qk-norm must not lose its rows beside one that has it."""
    found, _ = probed(files["wan"], files["gqa"])
    for gauge, of_wan, of_gqa in (
        ("raw", "raw", "raw"),
        ("balanced", "balanced", "balanced"),
        ("folded", "folded", "raw"),
    ):
        rows = wide(found, gauge).query("operator == 'kv'").set_index("checkpoint")
        assert set(rows.loc[str(files["wan"]), "gauge"]) == {of_wan}
        assert set(rows.loc[str(files["gqa"]), "gauge"]) == {of_gqa}
        counts = wide(found, gauge).groupby("checkpoint").size()
        assert counts[str(files["wan"])] == 3 * 2 * 3 and counts[str(files["gqa"])] == 2 * 3
    singles = wide(found, "balanced").query("operator == 'k' and attention == 'self'")
    assert set(singles["gauge"]) == {"raw"}


def test_products_are_shown_beside_the_null_of_products(files: dict[str, Path]) -> None:
    found, _ = probed(files["mla"], files["gqa"], operators="kv,composed,ov", heads=6)
    rows = shown_rows(found.table, "raw")
    by_operator = rows.groupby("operator")["null"].unique().to_dict()
    assert {op: list(nulls) for op, nulls in by_operator.items()} == {
        "composed": ["gaussian_product"],
        "ov": ["gaussian_product"],
        "kv": ["gaussian"],
    }
    one = rows[(rows["metric"] == "stable_rank") & (rows["operator"] == "composed")].iloc[0]
    assert one["z"] == pytest.approx((one["value"] - one["null_value"]) / one["null_se"])
    table = wide(found, "raw")
    heads = table[table["operator"] == "ov"]
    assert len(heads) == 2 and set(heads["of"]) == {4}
    ranks = found.table.query("operator == 'ov' and metric == 'r_0.99' and layer == 1")
    value = ranks[ranks["null"] == "gaussian_product"]["value"]
    assert len(value) == 6 and heads.iloc[1]["r_0.99 value"] == value.median()


def test_the_cut_source_stands_in_the_summary(files: dict[str, Path], tmp_path: Path) -> None:
    dense = write(tmp_path / "dense.safetensors", gqa(np.random.default_rng(1), kv=6))
    found, _ = probed(files["mla"], source=str(dense))
    [entry] = summary(found, "raw")
    cut = found.table.query("null == 'truncated_source' and metric == 'r_0.99'")["null_value"]
    assert entry["r_0.99"]["truncated_source"] == cut.median()
    assert re.search(rf"cut source {cut.median():g}[;\n]", text_table(found, "raw") + "\n")


def test_medians_and_ranges(files: dict[str, Path]) -> None:
    found, _ = probed(files["wan"])
    entry = next(
        e for e in summary(found, "raw") if (e["operator"], e["attention"]) == ("kv", "self")
    )
    ranks = found.table.query(
        "operator == 'kv' and attention == 'self' and gauge == 'raw' and metric == 'r_0.99'"
    )
    assert entry["layers"] == 3 and entry["of"] == 24 and entry["step"] is None
    assert entry["r_0.99"]["median"] == ranks["value"].median()
    assert entry["r_0.99"]["min"] == ranks["value"].min()
    assert entry["r_0.99"]["max"] == ranks["value"].max()
    assert entry["r_0.99"]["null"] == ranks["null_value"].iloc[0]


def test_the_text_names_gauge_null_and_notes(files: dict[str, Path]) -> None:
    found, _ = probed(files["wan"], layers=4)
    text = text_table(found, "folded")
    lines = text.splitlines()
    assert lines[0] == str(files["wan"])
    assert lines[1].split()[:8] == [
        "layer", "attention", "operator", "gauge", "r_.99", "of", "null", "z",
    ]  # fmt: skip
    assert len([line for line in lines if re.match(r" +[012] (self|cross)", line)]) == 3 * 2 * 3
    widths = {len(line) for line in lines[1 : 2 + 18]}
    assert len(widths) == 1, "columns line up"
    assert "gauge 'folded' where an operator has it" in text
    assert "self kv (folded): r_.99" in text and "self v (raw): r_.99" in text
    assert lines[-1].startswith("note: ") and "block 3 missing" in lines[-1]
    assert max(map(len, lines[:20])) <= 120


def test_a_gauge_that_nothing_has_is_said(files: dict[str, Path]) -> None:
    found, _ = probed(files["gqa"])
    assert "no operator here has the gauge 'folded'" in text_table(found, "folded")
    assert "no operator here" not in text_table(found, "balanced")


def test_other_metrics_than_the_usual_are_shown_too(files: dict[str, Path]) -> None:
    found, run = probed(files["gqa"], metrics="condition,tail_exponent,spectral_norm")
    assert shown_metrics(found.table) == ["spectral_norm", "condition"]
    text = text_table(found, "raw")
    assert "spectral_norm" in text.splitlines()[1] and "condition" in text.splitlines()[1]
    assert "self kv (raw): spectral_norm" in text
    assert json.loads(json.dumps(document(found, run, "raw")))["summary"][0]["condition"]["median"]
    one, _ = probed(files["gqa"], metrics="stable_rank")
    assert "stable_rank" in text_table(one, "raw")


def test_weighted_rows_follow_the_plain_ones(files: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((99, 24)) * np.geomspace(3, 0.1, 24)
    path = tmp_path / "c.safetensors"
    save_covariance(path, {str(n): inputs.T @ inputs / 99 for n in range(3)})
    for name, operator in (("wan", "kv"), ("mla", "composed")):
        found, _ = probed(files[name], covariance=path)
        rows = wide(found, "raw")
        gauges = rows[(rows["attention"] == "self") & (rows["operator"] == operator)]["gauge"]
        assert set(gauges) == {"raw", "weighted-raw"}, name
    folded = wide(probed(files["wan"], covariance=path)[0], "folded")
    assert set(folded.query("attention == 'self' and operator == 'kv'")["gauge"]) == {
        "folded",
        "weighted-folded",
    }


def test_a_series_prints_its_medians_by_step(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for step in (5, 10):
        write(tmp_path / "run" / f"step_{step}.safetensors", wan(rng, layers=7, d=16))
    found, run = execute(Job(series=(f"svd={tmp_path}/run/*",)), Options(), None, 1)
    text = text_table(found, "raw")
    assert len(text.splitlines()) < 20
    assert re.search(r"svd: step 5, self kv \(raw\): r_\.99", text)
    overlaps = [line.split() for line in text.splitlines() if "overlap_with_start" in line]
    assert [line[:2] for line in overlaps] == [["svd", "5"], ["svd", "10"]]
    assert float(overlaps[0][5]) == 1 and float(overlaps[0][6]) == pytest.approx(2 / 16, abs=1e-4)
    entries = summary(found, "raw")
    assert [e["step"] for e in entries] == [5, 5, 5, 10, 10, 10]
    told = json.loads(json.dumps(document(found, run, "raw")))
    assert {row["step"] for row in told["table"]} == {5, 10}


def test_a_pair_prints_its_layers(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    paths = [write(tmp_path / f"{n}.safetensors", wan(rng, layers=2, d=16)) for n in "ab"]
    found, run = execute(Job(pair=(str(paths[0]), str(paths[1]))), Options(), None, 1)
    text = text_table(found, "raw")
    assert text.splitlines()[0] == f"{paths[0]} ~ {paths[1]}"
    assert len(re.findall(r"^ +[01] self +kv +overlap ", text, re.MULTILINE)) == 2
    assert len(re.findall(r"principal_angle_(?:min|median|max)", text)) == 6
    told = document(found, run, "raw")
    assert told["spectra"] == [] and told["summary"] == [] and len(told["table"]) == 8


# JSON


def test_the_document_holds_everything(files: dict[str, Path]) -> None:
    found, run = probed(files["wan"], files["mla"])
    told = json.loads(json.dumps(document(found, run, "folded"), allow_nan=False))
    assert set(told) == {
        "schema", "run", "gauge", "summary", "notes", "checkpoints", "table", "spectra",
    }  # fmt: skip
    assert told["gauge"] == "folded" and told["run"]["run_hash"] == run["run_hash"]
    assert len(told["table"]) == len(found.table) and tuple(told["table"][0]) == COLUMNS
    for row, (_, want) in zip(told["table"], found.table.iterrows(), strict=True):
        for name in ("value", "null_value", "null_se"):
            same = want[name] if math.isfinite(want[name]) else None
            assert row[name] == same
        assert row["step"] is None and isinstance(row["layer"], int)
    assert sum(len(entry["sigma"]) for entry in told["spectra"]) == len(found.spectra)
    first = told["spectra"][0]
    assert first["sigma"] == found.spectra["sigma"].tolist()[: len(first["sigma"])]
    assert [c["format"] for c in told["checkpoints"]] == ["safetensors"] * 2
    block = told["checkpoints"][0]["blocks"][0]
    assert block["parts"]["k"] == {
        "tensor": "blocks.0.self_attn.k.weight", "rows": [[0, 24]], "shape": [24, 24],
    }  # fmt: skip
    assert told["notes"] == found.notes


def test_records_are_plain_values() -> None:
    frame = pd.DataFrame(
        {
            "a": [1.5, float("nan"), float("inf")],
            "b": pd.array([1, None, 3], dtype="Int64"),
            "c": ["x", "", "y"],
            "d": np.array([1, 2, 3]),
        }
    )
    made = records(frame)
    assert made == [
        {"a": 1.5, "b": 1, "c": "x", "d": 1},
        {"a": None, "b": None, "c": "", "d": 2},
        {"a": None, "b": 3, "c": "y", "d": 3},
    ]
    assert {type(v) for row in made for v in row.values()} <= {float, int, str, type(None)}


# --list


def test_the_list_says_what_was_found_and_left_out(files: dict[str, Path], tmp_path: Path) -> None:
    arrays = {**wan(np.random.default_rng(0), layers=2), "head.weight": np.eye(3, dtype=np.float32)}
    plain = np.eye(4, dtype=np.float32)
    arrays |= {f"blocks.{n}.ffn.{i}.weight": plain for n in (0, 1) for i in (0, 2)}
    path = write(tmp_path / "x.safetensors", arrays)
    report, checkpoint = inspect(Source(str(path), "x"), Options(layers=3))
    checkpoint.close()
    text = listing([report])
    assert text.splitlines()[0] == "x (safetensors)"
    assert "q[24,24]  k[24,24]  v[24,24]  o[24,24]  norms: q_norm  k_norm" in text
    assert "left out: 5 tensors" in text
    assert "1 x head.weight: no attention role in its name" in text
    assert re.search(r"[24] x blocks\.\*\.ffn\.[*02]\.weight: no attention role", text)
    assert "block 2 missing" in text
    told = json.loads(json.dumps(describe(report)))
    assert told["missing_layers"] == [2] and told["left_out"]["head.weight"]
    assert warn_lines([report]) == [note for note in told["notes"] if "missing" in note]
    grouped = inspect(Source(str(files["gqa"]), "g"), Options(heads=6))
    grouped.checkpoint.close()
    assert "6/2 x 4" in listing([grouped.report])


def test_addresses_in_lists_have_no_secrets(files: dict[str, Path]) -> None:
    report, checkpoint = inspect(Source(str(files["gqa"]), "g"), Options())
    checkpoint.close()
    report.source = Source("https://h/m?token=SECRET", "https://h/m")
    report.notes.append("https://u:SECRET@h/m?sig=SECRET: read as it is.")
    assert "SECRET" not in listing([report]) + json.dumps(describe(report))
