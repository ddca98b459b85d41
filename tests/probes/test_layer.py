"""Per-head products, latent operators, adapters and row spaces, against dense float64 matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from probe_files import Arrays, gqa, joint, latent, wan, write

from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import Heads, find_operators
from mla_study.errors import UserError
from mla_study.probes.layer import (
    OPERATORS,
    Request,
    is_adapter,
    measure_attention,
    subspace_of,
    subspace_rank,
    unavailable,
)
from mla_study.probes.stacks import Spectrum, Weights

ALL = Request(OPERATORS)


def measured(
    path: Path, request: Request = ALL, root: np.ndarray | None = None, layer: int = 0, **heads: Any
) -> list[Spectrum]:
    checkpoint = open_checkpoint(str(path))
    attention = find_operators(checkpoint, **heads).attentions[layer]
    return measure_attention(Weights(checkpoint), attention, request, root)


def close(sigma: np.ndarray, dense: np.ndarray, rank: int | None = None) -> None:
    want = scipy.linalg.svdvals(dense)[:rank]
    assert sigma.shape == want.shape
    np.testing.assert_allclose(sigma, want, atol=1e-12 * max(want[0], 1e-300))


def test_heads_of_grouped_queries(tmp_path: Path, seed: int) -> None:
    arrays = gqa(np.random.default_rng(seed), layers=1)  # 6 query heads, 2 key heads of 4
    path = write(tmp_path / "w.safetensors", arrays)
    found = measured(path, Request(("qk", "ov")), heads=6)
    q, k, v, o = (
        arrays[f"model.layers.0.self_attn.{role}_proj.weight"].astype(np.float64) for role in "qkvo"
    )
    assert [(s.operator, s.head) for s in found] == [
        (op, h) for op in ("qk", "ov") for h in range(6)
    ]
    for spectrum in found:
        h, g = spectrum.head, spectrum.head // 3
        mine, shared = slice(4 * h, 4 * h + 4), slice(4 * g, 4 * g + 4)
        dense = q[mine].T @ k[shared] if spectrum.operator == "qk" else o[:, mine] @ v[shared]
        close(spectrum.sigma, dense, 4)
        assert (spectrum.m, spectrum.n, spectrum.inner) == (24, 24, 4)
        assert (spectrum.gauge, spectrum.method) == ("raw", "factors")


def test_values_with_heads_of_their_own_size(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = gqa(rng, layers=1)
    block = "model.layers.0.self_attn"
    arrays[f"{block}.v_proj.weight"] = rng.standard_normal((2 * 3, 24), dtype=np.float32)
    arrays[f"{block}.o_proj.weight"] = rng.standard_normal((24, 6 * 3), dtype=np.float32)
    checkpoint = open_checkpoint(str(write(tmp_path / "w.safetensors", arrays)))
    [attention] = find_operators(checkpoint).attentions
    attention = replace(attention, heads=Heads(6, 2, 4))
    found = measure_attention(Weights(checkpoint), attention, Request(("ov",)))
    o, v = (arrays[f"{block}.{role}_proj.weight"].astype(np.float64) for role in "ov")
    close(found[4].sigma, o[:, 12:15] @ v[3:6], 3)
    wrong = replace(attention, heads=Heads(4, 2, 6))
    assert "do not fit" in unavailable(checkpoint, wrong, ("ov",))["ov"]


def test_scores_behind_a_qk_norm_take_the_folded_gains(tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=1, d=24)
    path = write(tmp_path / "w.safetensors", arrays)
    found = measured(path, Request(("qk",)), heads=4)
    q, k = (
        joint(arrays, 0, role)
        * arrays[f"blocks.0.self_attn.norm_{role}.weight"].astype(np.float64)[:, None]
        * np.sqrt(24)
        / np.linalg.norm(joint(arrays, 0, role))
        for role in "qk"
    )
    for spectrum in found:
        mine = slice(6 * spectrum.head, 6 * spectrum.head + 6)
        close(spectrum.sigma, q[mine].T @ k[mine], 6)
        assert spectrum.gauge == "folded"


def test_a_factor_on_k_leaves_scores_and_outputs_alone(tmp_path: Path, seed: int) -> None:
    arrays = wan(np.random.default_rng(seed), layers=1, d=24)
    request = Request(("qk", "ov"))
    before = measured(write(tmp_path / "a.safetensors", arrays), request, heads=4)
    arrays["blocks.0.self_attn.k.weight"] *= np.float32(8)
    after = measured(write(tmp_path / "b.safetensors", arrays), request, heads=4)
    for one, two in zip(before, after, strict=True):
        np.testing.assert_allclose(one.sigma, two.sigma, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gain", [True, False])
def test_the_composed_operator_holds_the_latent_norms_gain(
    gain: bool, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = latent(rng, layers=1, gain=gain)
    block = "model.layers.0.self_attn"
    up = arrays[f"{block}.kv_b_proj.weight"].astype(np.float64)
    down = arrays[f"{block}.kv_a_proj.weight"].astype(np.float64)
    if gain:
        up = up * arrays[f"{block}.kv_a_layernorm.weight"].astype(np.float64)
    half = np.diag(np.geomspace(2, 0.1, 24))
    path = write(tmp_path / "w.safetensors", arrays)
    raw, weighted = measured(path, Request(("composed", "kv")), half)
    close(raw.sigma, up @ down, 5)
    close(weighted.sigma, up @ down @ half, 5)
    assert (raw.operator, raw.m, raw.n, raw.inner, raw.method) == ("composed", 48, 24, 5, "factors")
    assert (raw.gauge, weighted.gauge) == ("raw", "weighted-raw")
    [few] = measured(path, Request(("composed",)), half[:, :3])[1:]
    close(few.sigma[:3], up @ down @ half[:, :3])
    assert few.sigma.shape == (5,) and not few.sigma[3:].any()
    [other] = measured(path, Request(("composed",)), np.eye(7))
    assert other.gauge == "raw"


def adapter(rng: np.random.Generator, d: int = 20, r: int = 3) -> Arrays:
    arrays: Arrays = {}
    for role in "qkv":
        stem = f"base_model.model.model.layers.0.self_attn.{role}_proj"
        arrays[f"{stem}.lora_A.weight"] = rng.standard_normal((r, d), dtype=np.float32)
        arrays[f"{stem}.lora_B.weight"] = rng.standard_normal((d, r), dtype=np.float32)
    return arrays


def test_an_adapters_own_product(tmp_path: Path, seed: int) -> None:
    arrays = adapter(np.random.default_rng(seed))
    path = write(tmp_path / "lora.safetensors", arrays)
    checkpoint = open_checkpoint(str(path))
    products = [
        checkpoint.read(name).astype(np.float64)
        for name in checkpoint.tensors
        if "q_proj" not in name
    ]
    norms = [np.linalg.norm(p) for p in products]
    found = {(s.operator, s.gauge): s for s in measured(path, Request(("kv", "k", "qk")))}
    assert set(found) == {("kv", "raw"), ("kv", "balanced"), ("k", "raw")}
    close(found["kv", "raw"].sigma, np.concatenate(products), 6)
    halves = [p / n for p, n in zip(products, norms, strict=True)]
    close(found["kv", "balanced"].sigma, np.concatenate(halves), 6)
    assert found["kv", "raw"].inner == 6 and found["k", "raw"].inner == 3
    [only] = measured(path, Request(("kv",), ("balanced",)))
    assert only.gauge == "balanced"
    arrays[next(name for name in arrays if "v_proj.lora_B" in name)][1, 1] = np.nan
    with pytest.raises(UserError, match=r"v_proj.*NaN"):
        measured(write(tmp_path / "bad.safetensors", arrays))


def test_what_cannot_be_made_has_a_reason(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def reasons(arrays: Arrays, name: str, **heads: Any) -> dict[str, str]:
        checkpoint = open_checkpoint(str(write(tmp_path / f"{name}.safetensors", arrays)))
        attention = find_operators(checkpoint, **heads).attentions[-1]
        found = unavailable(checkpoint, attention, OPERATORS)
        made = {s.operator for s in measure_attention(Weights(checkpoint), attention, ALL)}
        assert made | set(found) == set(OPERATORS) and not made & set(found)
        return found

    found = reasons(gqa(rng), "gqa")
    assert set(found) == {"qk", "ov", "composed"} and "--heads" in found["qk"]
    assert set(reasons(gqa(rng), "gqa", heads=6)) == {"composed"}
    bare = {k: v for k, v in gqa(rng).items() if "q_proj" not in k and "o_proj" not in k}
    assert reasons(bare, "bare")["qk"] == "there is no q projection"
    cross = wan(rng, layers=1, cross=True)
    assert set(reasons(cross, "cross", heads=4)) == {"qkv", "composed"}
    assert set(reasons(latent(rng), "latent")) == set(OPERATORS) - {"composed"}
    assert "--base" in reasons(adapter(rng), "adapter", heads=4)["qk"]


def test_row_spaces(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = wan(rng, layers=1, d=24)
    checkpoint = open_checkpoint(str(write(tmp_path / "w.safetensors", arrays)))
    [attention] = find_operators(checkpoint).attentions
    weights = Weights(checkpoint)
    k = subspace_rank(attention)
    assert k == 3
    basis = subspace_of(weights, attention, k)
    assert basis is not None
    _, _, vectors = np.linalg.svd(joint(arrays, 0))
    np.testing.assert_allclose(basis @ basis.T, vectors[:3].T @ vectors[:3], atol=1e-9)
    assert subspace_of(weights, attention, 25) is None
    arrays = latent(rng, layers=1)
    checkpoint = open_checkpoint(str(write(tmp_path / "l.safetensors", arrays)))
    [attention] = find_operators(checkpoint).attentions
    assert subspace_rank(attention) == 5
    basis = subspace_of(Weights(checkpoint), attention, 5)
    assert basis is not None
    down = arrays["model.layers.0.self_attn.kv_a_proj.weight"].astype(np.float64)
    np.testing.assert_allclose(basis @ (basis.T @ down.T), down.T, atol=1e-9)
    assert not is_adapter(checkpoint, attention)
