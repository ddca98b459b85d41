"""Operators on real inputs: weighted gauges, functional errors and their nulls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from probe_files import joint, latent, wan, write

from mla_study.probes.activations import save_covariance
from mla_study.probes.rank_probe import Options, Probed, probe_sources
from mla_study.probes.table import Source
from mla_study.probes.work import Store


def probed(folder: Path, path: Path, **options: Any) -> Probed:
    source = Source(str(path), path.name)
    return probe_sources([source], Options.of(**options), Store(folder / "store"), workers=1)


def one(found: Probed, **where: Any) -> Any:
    table = found.table
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1, f"{len(table)} rows have {where}"
    return table.iloc[0]


def z(row: Any) -> float:
    return (row["value"] - row["null_value"]) / row["null_se"]


def test_weighted_gauges_and_functional_errors(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = wan(rng, layers=2, d=24, cross=True)
    path = write(tmp_path / "w.safetensors", arrays)
    inputs = [rng.standard_normal((90, 24)) * np.geomspace(3, 0.1, 24) for _ in range(2)]
    held = {f"blocks.{n}.self_attn.k": x.T @ x / 90 for n, x in enumerate(inputs)}
    save_covariance(tmp_path / "c.safetensors", held)
    found = probed(tmp_path, path, covariance=str(tmp_path / "c.safetensors"), operators="kv,q")
    w, x = joint(arrays, 1), inputs[1]
    u, s, _ = np.linalg.svd(w @ scipy.linalg.sqrtm(held["blocks.1.self_attn.k"]).real)
    sigma = found.spectra.query("layer == 1 and operator == 'kv' and gauge == 'weighted-raw'")
    np.testing.assert_allclose(sigma["sigma"], s, rtol=1e-8)
    # the best rank-3 operator on these inputs, applied to them
    best = u[:, :3] @ u[:, :3].T @ w
    error = np.linalg.norm(x @ (w - best).T) / np.linalg.norm(x @ w.T)
    row = one(found, layer=1, operator="kv", gauge="weighted-raw", metric="functional_error_at_n/8")
    assert row["value"] == pytest.approx(error, rel=1e-7)
    assert (row["null"], row["provenance"]) == ("gaussian", "measured")
    assert 0 < row["null_se"] < row["null_value"] < 1
    gauges = set(found.table.query("attention == 'self' and operator == 'kv'")["gauge"])
    assert {"weighted-raw", "weighted-balanced", "weighted-folded"} <= gauges
    assert not found.table.query("attention == 'cross'")["gauge"].str.startswith("weighted").any()
    assert any("2 of 4 blocks (cross-attention) have no covariance" in n for n in found.notes)
    # plain spectra are what they were, but for the folded gauge's measured RMS
    plain = probed(tmp_path, path, operators="kv")
    for gauge, same in (("raw", True), ("balanced", True), ("folded", False)):
        key = {"layer": 0, "attention": "self", "operator": "kv", "gauge": gauge}
        a, b = (one(p, metric="r_0.5_interp", **key)["value"] for p in (found, plain))
        assert (a == b) == same


def test_a_random_operator_on_real_inputs_looks_like_its_null(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = write(tmp_path / "w.safetensors", wan(rng, layers=1, d=80))
    inputs = rng.standard_normal((400, 80)) * np.geomspace(3, 0.1, 80)
    save_covariance(tmp_path / "c.safetensors", {"0": inputs.T @ inputs / 400})
    found = probed(tmp_path, path, covariance=str(tmp_path / "c.safetensors"), operators="k")
    for metric in ("entropy_rank", "energy_at_64", "functional_error_at_n/8", "stable_rank"):
        assert abs(z(one(found, gauge="weighted-raw", metric=metric))) < 7, metric


def test_composed_operators_on_real_inputs_have_a_products_null(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = write(tmp_path / "w.safetensors", latent(rng, layers=1, gain=False))
    inputs = rng.standard_normal((90, 24)) * np.geomspace(3, 0.1, 24)
    save_covariance(tmp_path / "c.safetensors", {"layers.0": inputs.T @ inputs / 90})
    found = probed(tmp_path, path, covariance=str(tmp_path / "c.safetensors"))
    weighted = found.table[found.table["gauge"] == "weighted-raw"]
    assert set(weighted["null"]) == {"gaussian", "gaussian_product"}
    assert (
        abs(z(one(found, gauge="weighted-raw", metric="entropy_rank", null="gaussian_product"))) < 7
    )
