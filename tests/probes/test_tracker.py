"""A model in memory against dense float64 matrices, and against the same model probed in files."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model.tiny import BOTH, DENSE, LATENT, make
from torch import Tensor, nn

from mla_study.checkpoints.wan.save import save_model
from mla_study.config import LatentConfig, ModelConfig, mini
from mla_study.errors import UserError
from mla_study.model.transformer import WanTransformer
from mla_study.probes.rank_probe import Options
from mla_study.probes.series import named_series, parse_series, probe_series
from mla_study.probes.subspaces import overlap_null
from mla_study.probes.table import EDGE
from mla_study.probes.tracker import METRICS, TRACKED, Tracker, attention_inputs
from mla_study.probes.work import Store

D, D_C = 36, 11


def moved(model: WanTransformer, size: float, seed: int) -> WanTransformer:
    """The same model some steps later."""
    torch.manual_seed(seed)
    later = WanTransformer(model.config)
    with torch.no_grad():
        for new, old in zip(later.parameters(), model.parameters(), strict=True):
            new.copy_(old + size * old.std(correction=0) * torch.randn_like(old))
    return later


def weights(model: WanTransformer, layer: int) -> np.ndarray:
    """[W_K; W_V] or the composed operator, dense in float64."""
    at: Any = model.blocks[layer].self_attn  # pyright: ignore[reportAttributeAccessIssue]
    if model.config.latent is None:
        return torch.cat([at.k.weight, at.v.weight]).detach().double().numpy()
    up = torch.cat([at.k_up.weight, at.v_up.weight]).double()
    return (up @ (at.kv_norm.weight.double()[:, None] * at.kv_down.weight)).detach().numpy()


def run(model: WanTransformer, seed: int) -> Any:
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 4, 6, 6)
    context = model.condition(torch.randn(2, 3, 7))
    return lambda: model(x, torch.tensor([900.0, 300.0]), context)


def interpolated(sigma: np.ndarray, tau: float) -> float:
    left = tau * float((sigma**2).sum())
    for k, s in enumerate(sigma):
        if left <= s**2:
            return k + left / s**2
        left -= s**2
    raise AssertionError


@pytest.mark.parametrize("kind", ["dense", "latent"])
def test_values_are_those_of_dense_float64_matrices(kind: str, seed: int) -> None:
    model = make(BOTH[kind], seed)
    inputs = attention_inputs(model, run(model, seed))
    rows = Tracker().measure(model, 7, inputs)
    assert all(tuple(row) == TRACKED for row in rows)
    table = pd.DataFrame(rows)
    assert set(table["step"]) == {7} and set(table["layer"]) == {0, 1}
    operator, k = ("kv", D // 8) if kind == "dense" else ("composed", D_C)
    assert set(table["operator"]) == {operator}
    held = table.drop_duplicates(["layer", "gauge", "metric"])
    found = held.set_index(["layer", "gauge", "metric"])["value"]
    for layer in (0, 1):
        w, x = weights(model, layer), inputs[layer].double().numpy()
        for gauge, matrix in (("raw", w), ("weighted-raw", x @ w.T / len(x) ** 0.5)):
            sigma = np.linalg.svd(matrix, compute_uv=False)
            sigma = sigma[: D_C if kind == "latent" else D]
            p = sigma**2 / (sigma**2).sum()
            want = {
                "r_0.95_interp": interpolated(sigma, 0.95),
                "r_0.99_interp": interpolated(sigma, 0.99),
                "r_0.99": np.ceil(interpolated(sigma, 0.99)),
                "entropy_rank": np.exp(-(p * np.log(p)).sum()),
                "participation_ratio": 1 / (p**2).sum(),
                "stable_rank": 1 / p[0],
                EDGE: sigma[k - 1] / sigma[0],
            }
            for metric, value in want.items():
                assert found[layer, gauge, metric] == pytest.approx(value, rel=1e-8), metric
        assert found[layer, "raw", "overlap_with_start"] == pytest.approx(1)
    assert set(table["metric"]) == {*METRICS, "overlap_with_start"}


def test_the_tracker_and_series_of_files_are_one(tmp_path: Path, seed: int) -> None:
    source, first = make(DENSE, seed), make(LATENT, seed + 1)
    models = {0: first, 40: moved(first, 0.3, seed)}
    other = {0: make(LATENT, seed + 2), 40: make(LATENT, seed + 3)}
    save_model(source, tmp_path / "source")
    for name, held in (("mine", models), ("other", other)):
        for step, model in held.items():
            save_model(model, tmp_path / name / f"step_{step:06d}", layout="latent")
    named = named_series(f"mine:{tmp_path}/mine,other:{tmp_path}/other")
    options = Options(source=str(tmp_path / "source"), gauges=("raw",))
    probed = probe_series(
        parse_series([f"{k}={v}" for k, v in named.items()]), options, Store(tmp_path / "s"), 1
    ).table
    probed = probed[(probed["series"] == "mine") & (probed["attention"] == "self")]
    keys = ["step", "layer", "operator", "gauge", "metric", "null"]
    tracked: list[dict[str, Any]] = []
    start = models[0].state_dict()
    for step, model in models.items():
        references = {"start": start, "other": other[step].state_dict()}
        tracker = Tracker(source.state_dict(), references=references)
        tracked += tracker.measure(model, step)
    mine = pd.DataFrame(tracked).set_index(keys)
    theirs = probed.astype({"step": "int64"}).set_index(keys).add_suffix("_of_file")
    both = mine.join(theirs, how="inner")
    assert len(both) == len(mine) == 2 * 2 * (2 * len(METRICS) + 2)
    for column in ("value", "null_value", "null_se", "m", "n"):
        np.testing.assert_allclose(both[column], both[f"{column}_of_file"], rtol=1e-9)


def test_outputs_stand_beside_nulls_on_the_same_inputs(seed: int) -> None:
    source, model = make(DENSE, seed), make(LATENT, seed + 1)
    never = make(LATENT, seed + 2)
    inputs = attention_inputs(model, run(model, seed))
    tracker = Tracker(source.state_dict(), never.state_dict(), draws=5, seed=3)
    table = pd.DataFrame(tracker.measure(model, 0, inputs))
    assert not table.duplicated().any()
    ranks = table[(table["layer"] == 1) & (table["metric"] == "r_0.99_interp")]
    nulls = ranks.set_index(["gauge", "null"])
    x = inputs[1].double().numpy()
    for gauge, of in (("raw", lambda w: w), ("weighted-raw", lambda w: x @ w.T)):
        untrained = np.linalg.svd(of(weights(never, 1)), compute_uv=False)[:D_C]
        best = np.linalg.svd(of(weights(source, 1)), compute_uv=False)[:D_C]
        for null, sigma in (("untrained", untrained), ("truncated_source", best)):
            want = interpolated(sigma, 0.99)
            assert nulls.loc[(gauge, null), "null_value"] == pytest.approx(want, rel=1e-8)
        rng = np.random.default_rng(seed)
        up, down = rng.standard_normal((300, 70, D_C)), rng.standard_normal((300, D_C, D))
        drawn = [
            interpolated(np.linalg.svd(of(a @ b), compute_uv=False)[:D_C], 0.99)
            for a, b in zip(up, down, strict=True)
        ]
        product: Any = nulls.loc[(gauge, "gaussian_product")]
        tolerance = float(6 * np.std(drawn) / 5**0.5 + 0.05)
        assert product["null_value"] == pytest.approx(np.mean(drawn), abs=tolerance)
        assert 0 < product["null_se"] < 5 * np.std(drawn)
    assert set(ranks["null"]) == {"gaussian_product", "truncated_source", "untrained"}
    # the null of the last over the first, of a product and of a spectrum
    edge = table[(table["layer"] == 1) & (table["metric"] == EDGE)].set_index(["gauge", "null"])
    assert edge.loc[("weighted-raw", "truncated_source"), "null_value"] == pytest.approx(
        best[-1] / best[0], rel=1e-8
    )
    assert edge.loc[("raw", "untrained"), "null_value"] == pytest.approx(
        np.divide(*np.linalg.svd(weights(never, 1), compute_uv=False)[[D_C - 1, 0]]), rel=1e-8
    )


def test_subspaces_leave_the_start_and_stay_strange_to_the_other(seed: int) -> None:
    first, other = make(LATENT, seed), make(LATENT, seed + 1)
    tracker = Tracker(references={"other": other.state_dict()})
    rows: list[dict[str, Any]] = []
    for step in range(4):
        rows += tracker.measure(moved(first, 0.4 * step, seed), step)
    spaces = pd.DataFrame(rows)[lambda t: t["metric"].str.startswith("overlap")]
    means = spaces.groupby(["metric", "step"])["value"].mean()
    starts = means["overlap_with_start"].to_numpy()
    assert starts[0] == pytest.approx(1) and (np.diff(starts) < 0).all()
    value, se = overlap_null(D_C, D_C, D)
    np.testing.assert_allclose(spaces["null_value"], D_C / D)
    assert (np.abs(means["overlap_with_other"] - value) < 7 * se).all()
    q = [np.linalg.svd(weights(m, 0))[2][:D_C].T for m in (first, other)]
    want = np.square(q[0].T @ q[1]).sum() / D_C
    at = spaces.set_index(["metric", "step", "layer"])["value"]
    assert at["overlap_with_other", 0, 0] == pytest.approx(want, rel=1e-6)
    # a dense reference gives as many directions as the latent has
    found = pd.DataFrame(
        Tracker(references={"dense": make(DENSE, seed).state_dict()}).measure(first, 0)
    )
    assert (found[found["metric"] == "overlap_with_dense"]["null_value"] == D_C / D).all()


def test_inputs_are_what_the_attention_gets(seed: int) -> None:
    model = make(LATENT, seed)
    seen: list[Tensor] = []
    handle = model.blocks[1].self_attn.kv_down.register_forward_pre_hook(  # pyright: ignore
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    call = run(model, seed)
    inputs = attention_inputs(model, lambda: (call(), call()))
    handle.remove()
    assert list(inputs) == [0, 1] and not inputs[1].requires_grad
    torch.testing.assert_close(inputs[1], torch.cat(seen))
    few = attention_inputs(model, call, limit=7)
    assert few[0].shape == (7, D)
    rows = {tuple(row.tolist()) for row in inputs[0]}
    assert {tuple(row.tolist()) for row in few[0]} <= rows
    wrapped = nn.Module()
    wrapped.module = model
    assert list(attention_inputs(wrapped, call)) == [0, 1]
    assert not any(block.self_attn._forward_pre_hooks for block in model.blocks)  # pyright: ignore
    for broken, does in ((model, lambda: None), (nn.Linear(2, 2), lambda: None)):
        with pytest.raises(UserError, match="no tokens reached"):
            attention_inputs(broken, does)


def test_a_layer_with_fewer_tokens_than_channels_and_half_precision(seed: int) -> None:
    model = make(LATENT, seed)
    few = {1: torch.randn(5, D, generator=torch.Generator().manual_seed(seed))}
    table = pd.DataFrame(Tracker(make(DENSE, seed).state_dict()).measure(model, 0, few))
    assert set(table[table["gauge"] == "weighted-raw"]["layer"]) == {1}
    ranks = table[(table["metric"] == "r_0.99") & (table["gauge"] == "weighted-raw")]
    assert (ranks["value"] <= 5).all() and (ranks["null_value"] <= 5).all()
    half = model.to(torch.bfloat16)
    rounded = WanTransformer(LATENT)
    rounded.load_state_dict(half.state_dict())
    mine, theirs = (pd.DataFrame(Tracker().measure(m, 0)) for m in (half, rounded))
    pd.testing.assert_frame_equal(mine, theirs)


def test_what_does_not_fit_is_named(seed: int) -> None:
    model = make(LATENT, seed)
    dense = make(DENSE, seed).state_dict()
    shallow = make(replace(DENSE, layers=1), seed).state_dict()
    with pytest.raises(UserError, match=r"the source lacks self-attention layer 1.* has 36 inputs"):
        Tracker(shallow).measure(model, 0)
    wide = make(replace(DENSE, width=40), seed).state_dict()
    with pytest.raises(UserError, match=r"reference 'x' has 40 inputs in self-attention layer 0"):
        Tracker(references={"x": wide}).measure(model, 0)
    with pytest.raises(UserError, match="the untrained state is separate in layer 0"):
        Tracker(untrained=dense).measure(model, 0)
    with pytest.raises(UserError, match=r"inputs of layer 0 are \[3, 9\]"):
        Tracker().measure(model, 0, {0: torch.ones(3, 9)})
    with pytest.raises(UserError, match="layer 1 hold NaN"):
        Tracker().measure(model, 0, {1: torch.full((3, D), torch.nan)})
    with pytest.raises(UserError, match="the tracked model"):
        Tracker().measure({"a.weight": torch.ones(2, 2)}, 0)
    with torch.no_grad():
        model.blocks[1].self_attn.k_up.weight[0, 0] = torch.inf  # pyright: ignore
    with pytest.raises(UserError, match=r"the tracked model: .*blocks.1.self_attn.k_up.*Inf"):
        Tracker().measure(model, 0)


def test_a_call_is_cheap(seed: int) -> None:
    """60 ms for the miniature on one thread, measured; here with room for a busy machine."""
    config: ModelConfig = mini(latent=True)
    assert config.latent == LatentConfig(12, 48, 24, 8, (2, 1, 1))
    torch.manual_seed(seed)
    model, source = WanTransformer(config), WanTransformer(mini())
    tracker = Tracker(source.state_dict(), WanTransformer(config).state_dict())
    took: list[float] = []
    for step in range(5):
        inputs = {layer: torch.randn(432, 96) for layer in range(4)}
        before = time.process_time()
        tracker.measure(model, step, inputs)
        took.append(time.process_time() - before)
    assert min(took) < 0.18
