"""Along training and between two checkpoints: steps from names, overlaps, angles, their nulls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_files import Arrays, joint, latent, wan, write
from safetensors.numpy import load_file

from mla_study.errors import UserError
from mla_study.probes.rank_probe import Options, Probed
from mla_study.probes.series import (
    compare,
    named_series,
    parse_series,
    probe_series,
    step_of,
)
from mla_study.probes.subspaces import overlap_null
from mla_study.probes.table import COLUMNS, EDGE, Source
from mla_study.probes.work import Store


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("run/step_000500.safetensors", 500),
        ("run/step-7/model.safetensors", 7),
        ("run3/ckpt_12.pt", 12),
        ("a/checkpoint-9000/diffusion_pytorch_model.safetensors", 9000),
        ("iter=3000_ema.bin", 3000),
        ("epoch2_step40.pt", 40),
        ("run/model_0100.safetensors", 100),
        ("run/0009-00001-of-00002.safetensors", 9),
        ("v2/17.safetensors", 17),
    ],
)
def test_steps_are_read_from_names(path: str, step: int) -> None:
    assert step_of(path) == step


def test_steps_by_a_pattern_of_ones_own() -> None:
    import re

    assert step_of("run/it12k.pt", re.compile(r"it(\d+)k")) == 12
    assert step_of("run/it12k.pt", re.compile(r"\d+")) == 12
    for pattern in (r"x(\d+)", r"(it)", r"(\d*)z?"):
        with pytest.raises(UserError, match="finds no whole number"):
            step_of("it.pt", re.compile(pattern))
    with pytest.raises(UserError, match="no training step in its name"):
        step_of("run/model.safetensors")
    with pytest.raises(UserError, match="too large"):
        step_of(f"run/step_{'9' * 30}.pt")


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def test_series_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    touch(tmp_path / "run", "step_9.pt", "step_10.pt", "step_100.pt", "log.txt", "config.json")
    found = parse_series([f"{tmp_path}/run/*"])
    assert [s.step for s in found] == [9, 10, 100]
    assert {s.series for s in found} == {""}
    assert found[0].path == found[0].label == f"{tmp_path}/run/step_9.pt"
    named = parse_series([f"svd={tmp_path}/run/*.pt", f"random={tmp_path}/run/step_1*"])
    assert [(s.series, s.step) for s in named] == [
        ("svd", 9), ("svd", 10), ("svd", 100), ("random", 10), ("random", 100),
    ]  # fmt: skip
    joined = parse_series([f"a={tmp_path}/run/step_9.pt", f"a={tmp_path}/run/step_*.pt"])
    assert [s.step for s in joined] == [9, 10, 100]


def test_unnamed_series_are_called_after_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "svd", "step_1.pt")
    touch(tmp_path / "random", "step_1.pt")
    monkeypatch.chdir(tmp_path)
    assert [s.series for s in parse_series(["svd/*", "random/*"])] == ["svd", "random"]


def test_several_series_in_one_word(tmp_path: Path) -> None:
    runs = tmp_path / "my [runs], all=of 3:5"
    touch(runs / "a", "step_9.pt", "step_10.pt")
    touch(runs / "b", "step_9.pt")
    found = named_series(f"svd:{runs}/a,random={runs}/b,x:{tmp_path}/none*.pt")
    assert list(found) == ["svd", "random", "x"] and found["x"] == f"{tmp_path}/none*.pt"
    sources = parse_series([f"{name}={found[name]}" for name in ("svd", "random")])
    assert [(s.series, s.step) for s in sources] == [("svd", 9), ("svd", 10), ("random", 9)]
    for text, told in (
        (f"{runs}/a", "names no series: give NAME:FOLDER"),
        ("", "names no series"),
        ("svd:", "names no series"),
        ("svd:a,svd:b", "'svd' is named twice"),
    ):
        with pytest.raises(UserError, match=told):
            named_series(text)


def test_folders_are_members_too(tmp_path: Path) -> None:
    touch(tmp_path / "run" / "checkpoint-5", "model.safetensors")
    touch(tmp_path / "run" / "checkpoint-20", "model.safetensors")
    assert [s.step for s in parse_series([f"{tmp_path}/run/checkpoint-*"])] == [5, 20]


def test_series_that_say_too_little(tmp_path: Path) -> None:
    touch(tmp_path, "a_1.pt", "b_1.pt", "x.pt")
    for texts, told in (
        ([f"{tmp_path}/no*"], "matches no file: quote the pattern"),
        ([f"{tmp_path}/[ab]_*"], "are both step 1"),
    ):
        with pytest.raises(UserError, match=told):
            parse_series(texts)
    with pytest.raises(UserError, match="--step-regex '\\(': "):
        parse_series([f"{tmp_path}/*"], "(")


# Two made-up training runs of ten checkpoints


def training(rng: np.random.Generator, start: Arrays, folder: Path, steps: int = 10) -> None:
    """A run that walks away from its start by a random part a step."""
    walk = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in start.items()}
    for step in range(steps):
        away = {k: v + np.float32(0.15 * step) * walk[k] for k, v in start.items()}
        write(folder / f"step_{step * 100:06d}.safetensors", away)


@pytest.fixture
def runs(tmp_path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    dense = wan(rng, layers=2, d=40)
    spectral: Arrays = {}
    for layer in range(2):
        u, s, vt = np.linalg.svd(joint(dense, layer), full_matrices=False)
        block = f"model.layers.{layer}.self_attn"
        spectral[f"{block}.kv_b_proj.weight"] = (u[:, :8] * s[:8] ** 0.5).astype(np.float32)
        spectral[f"{block}.kv_a_proj.weight"] = (s[:8, None] ** 0.5 * vt[:8]).astype(np.float32)
    training(rng, spectral, tmp_path / "svd")
    training(rng, latent(rng, layers=2, d=40, r=8, gain=False), tmp_path / "random")
    write(tmp_path / "dense.safetensors", dense)
    return tmp_path


def joint_of(path: Path, layer: int) -> np.ndarray:
    """The composed operator of a file, dense."""
    arrays = load_file(path)
    block = f"model.layers.{layer}.self_attn"
    up, down = (arrays[f"{block}.kv_{x}_proj.weight"].astype(np.float64) for x in "ba")
    return up @ down


def both(runs: Path, store: Path, workers: int = 1, **options: Any) -> Probed:
    sources = parse_series([f"svd={runs}/svd/*", f"random={runs}/random/*"])
    return probe_series(sources, Options.of(**options), Store(store), workers)


def test_two_runs_in_one_table_with_their_overlaps(runs: Path, tmp_path: Path) -> None:
    found = both(runs, tmp_path / "store")
    table = found.table
    assert tuple(table.columns) == COLUMNS and str(table["step"].dtype) == "Int64"
    [note] = found.notes
    assert note.startswith(f"{runs}/svd/step_000000.safetensors and 19 more: 2 self-attention")
    assert list(dict.fromkeys(table["series"])) == ["svd", "random"]
    assert sorted(set(table["step"])) == [100 * n for n in range(10)]
    ranks = table[(table["metric"] == "r_0.99") & (table["null"] == "gaussian_product")]
    assert len(ranks) == 2 * 10 * 2
    edges = (
        table[table["metric"] == EDGE].set_index(["series", "step", "layer", "null"]).sort_index()
    )
    for layer in range(2):
        sigma = np.linalg.svd(joint_of(runs / "svd/step_000300.safetensors", layer))[1][:8]
        at = edges.loc["svd", 300, layer]
        np.testing.assert_allclose(at["value"], sigma[-1] / sigma[0], rtol=1e-6)
    spaces = table[table["metric"].str.startswith("overlap")]
    assert set(spaces["metric"]) == {
        "overlap_with_start",
        "overlap_with_svd",
        "overlap_with_random",
    }
    assert len(spaces) == 2 * 10 * 2 * 2
    assert set(spaces["null"]) == {"gaussian"} and set(spaces["method"]) == {"row space"}
    assert set(spaces["operator"]) == {"composed"} and set(spaces["m"]) == {8}
    value, se = overlap_null(8, 8, 40)
    assert value == pytest.approx(8 / 40)
    np.testing.assert_allclose(spaces["null_value"], value)
    np.testing.assert_allclose(spaces["null_se"], se)
    start = spaces[spaces["metric"] == "overlap_with_start"].set_index(["series", "step", "layer"])
    assert (start.loc[(slice(None), 0, slice(None)), "value"] > 1 - 1e-9).all()
    medians = start.groupby(level="step")["value"].median().to_numpy()
    assert (np.diff(medians) < 0).all() and medians[-1] > value + 2 * se
    # from either side the overlap of two series is one number
    other = spaces[spaces["metric"] != "overlap_with_start"]
    sides = other.pivot(index=["step", "layer"], columns="series", values="value")
    np.testing.assert_allclose(sides["svd"], sides["random"], rtol=1e-12)
    # and two starts that know nothing of each other overlap as random subspaces do
    assert (np.abs(sides["svd"] - value) < 7 * se).all()


def test_the_first_step_is_the_row_space_it_was_made_of(runs: Path, tmp_path: Path) -> None:
    first = f"{runs}/svd/step_000000.safetensors"
    dense = f"{runs}/dense.safetensors"
    found = compare(
        Source(dense, "dense"), Source(first, "svd"), Options(), Store(tmp_path / "s"), 1
    ).table
    spaces = found[found["metric"] == "overlap"]
    np.testing.assert_allclose(spaces["value"], 1, atol=1e-9)
    assert set(spaces["m"]) == {8} and set(spaces["n"]) == {40}
    assert set(found["checkpoint"]) == {"dense ~ svd"}
    angles = found[found["metric"].str.startswith("principal_angle")]
    assert len(angles) == 6 and (angles["value"] < 1e-3).all()
    assert set(angles["null"]) == {"none"} and angles["null_value"].isna().all()


def test_workers_and_metrics_of_a_series(runs: Path, tmp_path: Path) -> None:
    one = both(runs, tmp_path / "one", metrics="r_0.99,overlap_with_start")
    two = both(runs, tmp_path / "two", 2, metrics="r_0.99,overlap_with_start")
    assert set(one.table["metric"]) == {"r_0.99", "overlap_with_start"}
    assert one.table.equals(two.table) and one.spectra.equals(two.spectra)
    assert one.inputs == two.inputs and len(one.inputs) == 20


def test_a_start_without_rank_is_left_out_and_said(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = latent(rng, layers=1, gain=False)
    training(rng, arrays, tmp_path / "run", 3)
    up = "model.layers.0.self_attn.kv_b_proj.weight"
    write(tmp_path / "run/step_000000.safetensors", {**arrays, up: np.zeros_like(arrays[up])})
    sources = parse_series([f"{tmp_path}/run/*"])
    found = probe_series(sources, Options(), Store(tmp_path / "s"), 1)
    assert not found.table["metric"].str.startswith("overlap").any()
    assert any("step_000000" in n and "rank is too small" in n for n in found.notes)


# Pairs


def test_unrelated_checkpoints_overlap_as_random_subspaces_do(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    paths = [write(tmp_path / f"{n}.safetensors", wan(rng, layers=4, d=64)) for n in "ab"]
    sources = [Source(str(p), p.stem) for p in paths]
    found = compare(sources[0], sources[1], Options(), Store(tmp_path / "s"), 1)
    spaces = found.table[found.table["metric"] == "overlap"]
    assert len(spaces) == 4 and found.spectra.empty
    scores = (spaces["value"] - spaces["null_value"]) / spaces["null_se"]
    assert (scores.abs() < 7).all()
    assert spaces["null_value"].iloc[0] == pytest.approx(8 / 64)
    assert set(found.inputs) == {"a", "b"}
    same = compare(sources[0], Source(str(paths[0]), "c"), Options(), Store(tmp_path / "t"), 1)
    np.testing.assert_allclose(same.table.query("metric == 'overlap'")["value"], 1)


def test_pairs_that_cannot_be_compared(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def pair(one: Arrays, two: Arrays, **options: Any) -> Probed:
        a, b = write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", two)
        sources = [Source(str(p), p.stem) for p in (a, b)]
        return compare(*sources, Options.of(**options), Store(tmp_path / "s"), 1)

    with pytest.raises(UserError, match=r"24 inputs in a and 32 in b"):
        pair(wan(rng, layers=1), wan(rng, layers=1, d=32))
    shifted = {k.replace("blocks.0", "blocks.7"): v for k, v in wan(rng, layers=1).items()}
    other = {**shifted, **{k.replace(".7.", ".8."): v for k, v in shifted.items()}}
    with pytest.raises(UserError, match="no block in common"):
        pair(wan(rng, layers=1), other)
    flat = {k: np.zeros_like(v) for k, v in wan(rng, layers=1).items()}
    with pytest.raises(UserError, match="no block has the rank"):
        pair(wan(rng, layers=1), flat)
    with pytest.raises(UserError, match="no block has the rank and the metrics"):
        pair(wan(rng, layers=1), wan(rng, layers=1), metrics="r_0.99")
    half = {**wan(rng, layers=2), **{k: np.zeros_like(v) for k, v in flat.items()}}
    found = pair(wan(rng, layers=2), half)
    assert set(found.table["layer"]) == {1}
    assert found.notes[-1] == "1 blocks are left out: their rank is too small."
