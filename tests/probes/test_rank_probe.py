"""The walk over checkpoints: known random matrices, real files, gauges, nulls, sources, notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from probe_files import Arrays, as_bf16, config, gqa, latent, wan, write

from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import find_operators
from mla_study.errors import UserError
from mla_study.probes.nulls import gaussian_null, gaussian_product_null
from mla_study.probes.rank_probe import Options, Probed, inspect, probe_sources
from mla_study.probes.spectrum import METRICS, effective_rank
from mla_study.probes.stacks import Weights
from mla_study.probes.table import Source
from mla_study.probes.work import Store


def probed(folder: Path, *paths: Path, **options: Any) -> Probed:
    sources = [Source(str(p), p.name) for p in paths]
    return probe_sources(sources, Options.of(**options), Store(folder / "store"), workers=1)


def one(found: Probed, **where: Any) -> Any:
    table = found.table
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1, f"{len(table)} rows have {where}"
    return table.iloc[0]


def z(row: Any) -> float:
    return (row["value"] - row["null_value"]) / row["null_se"]


# Random matrices whose ranks are known


def test_a_gaussian_layer_looks_like_its_null(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {
        f"blocks.0.self_attn.{r}.weight": rng.standard_normal((1536, 1536), dtype=np.float32)
        for r in "kv"
    }
    found = probed(tmp_path, write(tmp_path / "w.safetensors", arrays), operators="kv")
    rank = one(found, metric="r_0.99", gauge="raw")
    assert rank["value"] == pytest.approx(1424, abs=4)
    assert (rank["m"], rank["n"], rank["method"]) == (3072, 1536, "gram")
    for metric in ("r_0.99", "energy_at_192", "energy_at_n/8", "stable_rank", "entropy_rank"):
        for gauge in ("raw", "balanced"):
            assert abs(z(one(found, metric=metric, gauge=gauge))) < 7, (metric, gauge)
    assert one(found, metric="energy_at_192", gauge="raw")["value"] == pytest.approx(
        0.292, abs=2e-3
    )
    assert abs(z(one(found, metric="spectral_norm", gauge="raw"))) < 7


def test_a_gaussian_product_looks_like_its_null(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    block = "model.layers.0.self_attn"
    arrays = {
        f"{block}.kv_a_proj.weight": rng.standard_normal((192, 1536), dtype=np.float32),
        f"{block}.kv_b_proj.weight": rng.standard_normal((3072, 192), dtype=np.float32),
    }
    found = probed(tmp_path, write(tmp_path / "w.safetensors", arrays))
    rank = one(found, metric="r_0.99", null="gaussian_product")
    assert rank["value"] == pytest.approx(187, abs=1)
    assert (rank["operator"], rank["method"]) == ("composed", "factors")
    for metric in ("r_0.99", "entropy_rank", "participation_ratio", "stable_rank"):
        assert abs(z(one(found, metric=metric, null="gaussian_product"))) < 7, metric
    against_full = one(found, metric="r_0.99", null="gaussian")
    assert z(against_full) < -500


def test_k_times_eight_moves_the_raw_gauge_only(tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=1, d=64)
    k, v = (f"blocks.0.self_attn.{role}.weight" for role in "kv")
    arrays[v] *= np.linalg.norm(arrays[k]) / np.linalg.norm(arrays[v])
    before = probed(tmp_path, write(tmp_path / "a.safetensors", arrays), operators="kv,ov", heads=4)
    arrays[k] *= np.float32(8)
    after = probed(tmp_path, write(tmp_path / "b.safetensors", arrays), operators="kv,ov", heads=4)
    keys = ["operator", "head", "gauge", "metric", "null"]
    both = before.table.merge(after.table, on=keys)
    assert len(both) == len(before.table)
    still = np.isclose(both["value_x"], both["value_y"], rtol=1e-9, equal_nan=True)
    moved = both[~still]
    assert set(moved["gauge"]) == {"raw"} and set(moved["operator"]) == {"kv"}
    # K alone is left of the joint operator, with fewer directions than K and V have together
    for metric in ("entropy_rank", "r_0.99"):
        mine, theirs = (
            one(p, metric=metric, operator="kv", gauge="raw")["value"] for p in (before, after)
        )
        # the integer rank of a matrix so small may stand still by chance
        assert mine > theirs or (metric == "r_0.99" and mine == theirs)


# Real files


REAL = [
    "minilm_l6_attention_fp16",
    "smollm2_135m_kv_q4dequant_fp16",
    "dinov2s_saliency_attention_fp16",
    "gmflow_transformer",
    "terrain_consistency_unet_attention",
    "stories260K",
]


@pytest.mark.assets
@pytest.mark.parametrize("name", REAL)
def test_real_files_agree_with_svdvals(name: str, assets: Path, tmp_path: Path) -> None:
    path = assets / "weights" / f"{name}.safetensors"
    options = Options(operators=("kv", "k", "v"), gauges=("raw",))
    found = probe_sources([Source(str(path), name)], options, Store(tmp_path), workers=1)
    checkpoint = open_checkpoint(str(path))
    keys = ["layer", "attention", "operator"]
    spectra = {key: g["sigma"].to_numpy() for key, g in found.spectra.groupby(keys)}
    rows = found.table.set_index([*keys, "metric"])
    checked = 0
    for attention in find_operators(checkpoint).attentions:
        weights = Weights(checkpoint)
        for operator in ("kv", "k", "v"):
            blocks = [weights.values(attention.parts[role]) for role in operator]
            want = scipy.linalg.svdvals(np.concatenate(blocks).astype(np.float64))
            key = (attention.layer, attention.kind, operator)
            sigma = spectra[key]
            bound = 1e-10 * want[0] * np.maximum(1, 1e-5 * want[0] / want)
            assert (np.abs(sigma - want) <= bound).all(), key
            for tau in (0.5, 0.9, 0.95, 0.99, 0.999):
                assert rows.loc[(*key, f"r_{tau:g}"), "value"] == effective_rank(want, tau), key
            method = "svdvals" if want[-1] / want[0] < 1e-4 else "gram"
            assert rows.loc[(*key, "r_0.99"), "method"] == method, key
            checked += 1
    assert checked == len(spectra) > 0


@pytest.mark.assets
def test_a_condition_number_takes_the_tail_from_svdvals(assets: Path, tmp_path: Path) -> None:
    path = assets / "weights" / "stories260K.safetensors"
    found = probed(tmp_path, path, metrics="condition")
    assert set(found.table["method"]) == {"svdvals"}
    assert set(found.table["metric"]) == {"condition"}
    assert "gram" in set(probed(tmp_path, path, metrics="*").table["method"])


@pytest.mark.assets
def test_known_energies_of_real_files(assets: Path, tmp_path: Path) -> None:
    # The second is 384 x 576: an eighth of 384.
    for name, energy in ((REAL[0], 0.446), (REAL[1], 0.448)):
        path = assets / "weights" / f"{name}.safetensors"
        found = probed(tmp_path, path, operators="kv", gauges="raw", metrics="energy_at_n/8")
        assert found.table["value"].median() == pytest.approx(energy, abs=1e-3)


# Shapes, gauges, nulls


def test_every_row_that_is_due_and_no_other(tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=2, d=24, cross=True)
    found = probed(tmp_path, write(tmp_path / "w.safetensors", arrays))
    rows = found.table.drop_duplicates(["layer", "attention", "operator", "gauge"])
    made = list(zip(rows["layer"], rows["attention"], rows["operator"], rows["gauge"], strict=True))
    expected = [
        (layer, kind, op, gauge)
        for layer in (0, 1)
        for kind in ("self", "cross")
        for op, gauges in (
            ("kv", ("raw", "balanced", "folded")),
            ("k", ("raw", "folded")),
            ("v", ("raw",)),
        )
        for gauge in gauges
    ]
    assert made == expected
    assert len(found.table) == len(expected) * len(METRICS)
    assert set(found.table["null"]) == {"gaussian"}
    assert not found.table.duplicated().any()
    assert found.notes == [
        "w.safetensors: 2 self-attention and 2 cross-attention blocks found; "
        "no config to compare with."
    ]
    assert found.validity == "full"


def test_nulls_are_those_of_the_shape(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = probed(
        tmp_path, write(tmp_path / "w.safetensors", gqa(rng)), operators="kv,qk", heads=6, seed=3
    )
    row = one(found, layer=1, operator="kv", gauge="raw", metric="entropy_rank")
    assert (row["m"], row["n"]) == (16, 24)
    assert (row["null_value"], row["null_se"]) == gaussian_null(16, 24, 3)["entropy_rank"]
    row = one(found, layer=0, head=2, metric="stable_rank", null="gaussian_product")
    assert (row["null_value"], row["null_se"]) == gaussian_product_null(24, 4, 24, 3)["stable_rank"]


def test_several_checkpoints_are_one_table(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = write(tmp_path / "a.safetensors", wan(rng, layers=1))
    b = write(tmp_path / "b.safetensors", gqa(rng, layers=3))
    found = probed(tmp_path, a, b)
    assert list(dict.fromkeys(found.table["checkpoint"])) == ["a.safetensors", "b.safetensors"]
    assert len(found.reports) == 2 and set(found.inputs) == {"a.safetensors", "b.safetensors"}
    alone = probed(tmp_path, b)
    assert alone.inputs["b.safetensors"] == found.inputs["b.safetensors"]


def test_inputs_tell_values_apart_and_names_do_not(tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=2)
    a = probed(tmp_path, write(tmp_path / "x/w.safetensors", arrays))
    b = probed(tmp_path, write(tmp_path / "y/w.safetensors", arrays))
    assert a.inputs == b.inputs
    for role, counts in (("v", True), ("k", True), ("q", False)):  # what is not read does not
        name = f"blocks.1.self_attn.{role}.weight"
        path = write(tmp_path / role / "w.safetensors", {**arrays, name: arrays[name] + 1})
        assert (probed(tmp_path, path).inputs != a.inputs) == counts


@pytest.mark.parametrize("workers", [1, 2])
def test_only_k_and_v_are_read(workers: int, tmp_path: Path, seed: int) -> None:
    arrays, dtypes = as_bf16(wan(np.random.default_rng(seed), layers=3, d=256, cross=True))
    path = write(tmp_path / "w.safetensors", arrays, dtypes)
    found = probe_sources([Source(str(path), "w")], Options(), Store(tmp_path / "s"), workers)
    kv = 3 * 2 * 2 * 256 * 256 * 2
    assert kv <= found.bytes_read <= 1.05 * kv
    assert found.bytes_read < 0.55 * path.stat().st_size


# Sources of composed operators


def latent_and_dense(rng: np.random.Generator, folder: Path) -> tuple[Path, Path, Arrays]:
    dense = {k: v for k, v in gqa(rng, layers=2, kv=6).items() if "k_proj" in k or "v_proj" in k}
    return (
        write(folder / "latent.safetensors", latent(rng, layers=2)),
        write(folder / "dense.safetensors", dense),
        dense,
    )


def test_a_cut_dense_source_is_a_null(tmp_path: Path, seed: int) -> None:
    mla, dense, arrays = latent_and_dense(np.random.default_rng(seed), tmp_path)
    found = probed(tmp_path, mla, source=str(dense))
    blocks = [arrays[f"model.layers.1.self_attn.{r}_proj.weight"] for r in "kv"]
    sigma = scipy.linalg.svdvals(np.concatenate(blocks).astype(np.float64))[:5]
    row = one(found, layer=1, metric="stable_rank", null="truncated_source")
    assert row["null_value"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2)
    assert row["null_se"] == 0
    assert set(found.inputs) == {"latent.safetensors", str(dense)}


def test_a_source_that_does_not_fit(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mla, dense, _ = latent_and_dense(rng, tmp_path)
    other = write(tmp_path / "other.safetensors", gqa(rng, layers=2, d=20))
    with pytest.raises(UserError, match=r"20 inputs in layer 0, but latent.safetensors has 24"):
        probed(tmp_path, mla, source=str(other))
    with pytest.raises(UserError, match="no dense self-attention"):
        probed(tmp_path, mla, source=str(mla))
    unused = probed(tmp_path, other, source=str(dense))
    assert "--source is not used: no block has a composed operator." in unused.notes
    short = write(tmp_path / "short.safetensors", gqa(rng, layers=1, kv=6))
    lacking = probed(tmp_path, mla, source=str(short))
    assert f"{short} has no dense layer 1." in lacking.notes
    cut = lacking.table[lacking.table["null"] == "truncated_source"]
    assert set(cut["layer"]) == {0}


# Options and notes


def test_what_was_asked_for_and_cannot_be_made_is_said(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = write(tmp_path / "w.safetensors", gqa(rng, layers=3))
    found = probed(tmp_path, path, operators="kv,qk,composed")
    assert [n for n in found.notes if "not measured" in n] == [
        "w.safetensors: qk is not measured in 3 blocks: the number of heads is unknown: "
        "give --heads N (and --kv-heads N).",
        "w.safetensors: composed is not measured in 3 blocks: the attention is not latent (MLA).",
    ]
    assert set(found.table["operator"]) == {"kv"}
    assert not [n for n in probed(tmp_path, path).notes if "not measured" in n]
    with pytest.raises(UserError, match=r"none of the operators qk.*q, k, v, o.*give --heads N"):
        probed(tmp_path, path, operators="qk")
    with pytest.raises(UserError, match="in the gauges folded"):
        probed(tmp_path, path, gauges="folded")
    with pytest.raises(UserError, match="functional errors need --covariance"):
        probed(tmp_path, path, metrics="functional_error_at_64")


def test_a_missing_block_makes_a_result_partial(tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=4)
    cut = {k: v for k, v in arrays.items() if not k.startswith("blocks.1.")}
    path = write(tmp_path / "w.safetensors", cut)
    found = probed(tmp_path, path, layers=4)
    assert found.validity == "partial"
    assert "3 self-attention blocks found, 4 layers expected: block 1 missing." in found.notes[0]
    given = config(tmp_path / "other.json", num_layers=6)
    assert "blocks 1, 4, 5 missing" in probed(tmp_path, path, config=str(given)).notes[0]
    assert sorted(set(found.table["layer"])) == [0, 2, 3]
    alone = write(tmp_path / "one.safetensors", wan(np.random.default_rng(seed), layers=1))
    assert probed(tmp_path, alone, layers=1).notes == [
        "one.safetensors: 1 self-attention block found, 1 layer expected."
    ]


def test_options_take_lists_and_text_and_refuse_the_rest() -> None:
    assert Options.of(operators="kv, k").operators == ("kv", "k")
    assert Options(operators=("kv", "k", "kv")).operators == ("kv", "k")
    assert Options.of(metrics="r_0.99,cond*").request.exact_tail
    assert Options.of(maps="a -> k", config=Path("c.json")).maps == ("a -> k",)
    assert Options.of(config=Path("c.json")).config == "c.json"
    assert not Options(metrics=("*",)).request.exact_tail
    assert not Options().request.exact_tail
    assert Options(metrics=("overlap*", "principal_angle_min")).wants("overlap")
    assert Options(metrics=("functional_error*",)).wants("functional_error_at_n/8")
    for bad, told in (
        ({"operators": "kw"}, "no operator 'kw': choose from q, k"),
        ({"operators": ""}, "no operators are named"),
        ({"gauges": "flat"}, "no gauge 'flat'"),
        ({"metrics": "rank"}, "no metric is called 'rank'"),
        ({"heads": 0}, "heads is 0"),
        ({"layers": -1}, "layers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"gauge": "raw"}, "no option 'gauge'"),
    ):
        with pytest.raises(UserError, match=told):
            Options.of(**bad)


def test_an_inspected_checkpoint_is_open_and_a_refused_one_closed(
    tmp_path: Path, seed: int
) -> None:
    path = write(tmp_path / "w.safetensors", wan(np.random.default_rng(seed), layers=1))
    report, checkpoint = inspect(Source(str(path), "w"), Options())
    assert checkpoint.read("blocks.0.self_attn.k.weight").shape == (24, 24)
    assert report.config_path is None and report.format == "safetensors"
    checkpoint.close()
    with pytest.raises(UserError, match="no attention"):
        inspect(Source(str(write(tmp_path / "n.safetensors", {"x": np.eye(3)})), "n"), Options())
