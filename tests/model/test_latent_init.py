"""Each decision of a conversion alone, where the others are vacuous, and all of them at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mla_study.config import LatentConfig, ModelConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import bidirectional
from mla_study.model.attention import DenseSelfAttention, Piece
from mla_study.model.conversion_report import DECISIONS, Probe, latent_module
from mla_study.model.dense_layer import DenseAttention, Moments, Projection
from mla_study.model.latent_init import (
    INITS,
    LayerConversion,
    Recipe,
    content_channels,
    default_pairs,
    factor,
    rotary_channels,
    shared_key,
)
from mla_study.model.rope import RotaryEmbedding

HEADS, HEAD, WIDTH = 3, 16, 48
GRID = (2, 3, 4)
LATENT = LatentConfig(d_c=WIDTH, d_q=WIDTH, d_nope=8, d_rope=8, rope_pairs=(2, 1, 1))
# Fast pairs turn by 1 a step; with this base all others stand still.
SLOW = 1e60


def config(base: float) -> ModelConfig:
    return ModelConfig(
        name="toy", layers=1, width=WIDTH, heads=HEADS, ffn_width=WIDTH, eps=1e-12, rope_base=base
    )


def orthogonal(rng: np.random.Generator, n: int = WIDTH) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def one_key_for_all(rng: np.random.Generator, keys: np.ndarray, latent: LatentConfig) -> np.ndarray:
    """Rotary key rows of all heads made one complex key times a factor a head and pair."""
    rows = rotary_channels(HEAD, latent.rope_pairs)
    out = keys.reshape(HEADS, HEAD, WIDTH).copy()
    base = out[0, rows[0::2]] + 1j * out[0, rows[1::2]]
    for h in range(HEADS):
        turned = np.exp(1j * rng.uniform(0, 6, len(base)))[:, None] * base * (0.5 + h)
        out[h, rows[0::2]], out[h, rows[1::2]] = turned.real, turned.imag
    return out.reshape(WIDTH, WIDTH)


def on_both_spheres(rng: np.random.Generator, keys: np.ndarray, count: int) -> np.ndarray:
    """Tokens of one norm whose keys have one norm as well."""
    values, vectors = np.linalg.eigh(keys.T @ keys)
    low, high = values[0], values[-1]
    x = rng.standard_normal((count, WIDTH)) @ vectors
    x[:, 0] = x[:, -1] = 0
    x *= 0.5 * (WIDTH / np.square(x).sum(1, keepdims=True)) ** 0.5
    norm = WIDTH - np.square(x).sum(1)
    size = WIDTH * (low + high) / 2 - np.square(x) @ values
    x[:, -1] = np.sqrt((size - low * norm) / (high - low))
    x[:, 0] = np.sqrt(norm - np.square(x[:, -1]))
    x[:, [0, -1]] *= rng.choice([-1, 1], (count, 2))
    return x @ vectors.T


def whole(conversion: LayerConversion) -> dict[str, torch.Tensor]:
    """All tensors of the latent layer."""
    tensors = {**conversion.tensors(), "o.weight": conversion.dense.o.weight}
    return {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}


def ladder(rng: np.random.Generator, switched_on: str | None, **change: Any) -> dict[str, float]:
    """Output (or logit, if larger) error after each decision; one decision is not vacuous."""
    latent = LATENT
    if switched_on == "kv_rank":
        latent = replace(latent, d_c=WIDTH // 2)
    if switched_on == "q_rank":
        latent = replace(latent, d_q=WIDTH // 2)
    keys = rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    if switched_on != "shared_key":
        keys = one_key_for_all(rng, keys, latent)
    queries = orthogonal(rng)
    total = int(np.prod(GRID))
    if switched_on == "qk_norm":
        x = rng.standard_normal((4 * total, WIDTH))
        x *= (WIDTH / np.square(x).sum(1, keepdims=True)) ** 0.5
    elif switched_on == "latent_norm":
        queries = orthogonal(rng) @ keys
        x = rng.standard_normal((4 * total, WIDTH))
        x *= (WIDTH / np.square(x @ keys.T).sum(1, keepdims=True)) ** 0.5
    else:
        x = on_both_spheres(rng, keys, 4 * total)
    nothing = np.zeros(WIDTH)
    dense = DenseAttention(
        HEADS,
        1e-12,
        Projection(queries, nothing),
        Projection(keys, nothing),
        Projection(rng.standard_normal((WIDTH, WIDTH)), rng.standard_normal(WIDTH)),
        Projection(rng.standard_normal((WIDTH, WIDTH)), rng.standard_normal(WIDTH)),
        np.full(WIDTH, 1.3),
        np.full(WIDTH, 0.7),
    )
    model = config(10.0 if switched_on == "band" else SLOW)
    recipe = Recipe(**{"init": "spectral", "rope_key": "svd", **change})
    conversion = LayerConversion(dense, latent, recipe, Moments.of(x))
    probe = Probe(dense, torch.from_numpy(x).unflatten(0, (4, total)), model, GRID)
    stored = whole(conversion)
    return {n: max(e.logits, e.output) for n, e in probe.steps(conversion, stored).items()}


@pytest.mark.parametrize("init", ["spectral", "spectral-raw", "activation"])
def test_no_error_where_every_decision_is_vacuous(init: str, seed: int) -> None:
    errors = ladder(np.random.default_rng(seed), None, init=init)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_decision_alone_leaves_its_own_error(decision: str, seed: int) -> None:
    errors = ladder(np.random.default_rng(seed), decision)
    at = DECISIONS.index(decision)
    assert all(errors[name] < 1e-5 for name in DECISIONS[:at]), errors
    assert errors[decision] > 1e-3
    # A cut latent is shorter for some tokens than for others, and so no longer blind to its norm.
    stop = -1 if decision in ("kv_rank", "q_rank") else None
    after = [errors[name] for name in DECISIONS[at:stop]]
    assert np.allclose(after, after[0], rtol=1e-5), errors


def test_the_mean_key_is_vacuous_only_for_equal_heads(seed: int) -> None:
    errors = ladder(np.random.default_rng(seed), None, rope_key="mean")
    assert errors["band"] < 1e-5 < 1e-2 < errors["shared_key"]


def dense_module(rng: np.random.Generator, model: ModelConfig) -> DenseSelfAttention:
    module = DenseSelfAttention(model).double().requires_grad_(False)
    for name, value in module.state_dict().items():
        size = WIDTH**-0.5 if value.ndim == 2 else 0.3
        value.copy_(torch.from_numpy(rng.standard_normal(tuple(value.shape)) * size))
        if name.startswith("norm"):
            value += 1
    return module


def arrays(module: DenseSelfAttention) -> DenseAttention:
    tensors = {name: value.numpy() for name, value in module.state_dict().items()}
    return DenseAttention.of(tensors, HEADS, module.norm_q.eps)


def tokens(rng: np.random.Generator, samples: int) -> torch.Tensor:
    """Tokens whose covariance falls off as those of trained models do, around a mean."""
    scale = np.arange(1, WIDTH + 1) ** -0.8
    x = rng.standard_normal((samples, int(np.prod(GRID)), WIDTH)) * scale + scale
    return torch.from_numpy(x @ orthogonal(np.random.default_rng(3)) * 3)


@pytest.mark.parametrize("init", INITS)
def test_measured_errors_are_those_of_the_modules(init: Any, seed: int) -> None:
    """The report against forward passes of both modules, biases and gains and all."""
    rng = np.random.default_rng(seed)
    model = config(100.0)
    module, latent = dense_module(rng, model), replace(LATENT, d_c=20, d_q=24)
    x = tokens(rng, 2)
    dense = arrays(module)
    conversion = LayerConversion(dense, latent, Recipe(init), Moments.of(x.flatten(0, 1).numpy()))
    stored = whole(conversion)
    probe = Probe(dense, x, model, GRID)

    def forward(attention: Any, kept: Any) -> torch.Tensor:
        table = RotaryEmbedding(HEAD, 100.0, kept).table(range(GRID[0]), *GRID[1:], torch.float64)
        assert bidirectional(GRID[0]).frames == GRID[0]
        return attention(x, [Piece(None, None, table, table)])

    constant = module.o.bias + module.o.weight @ module.v.bias
    ours, theirs = (
        forward(latent_module(model, latent, stored), LATENT.rope_pairs),
        forward(module, None),
    )
    relative = (ours - theirs).norm() / (theirs - constant).norm()
    assert probe.final(latent, stored).output == pytest.approx(float(relative), rel=1e-9)
    assert probe.steps(conversion, stored)["latent_norm"].output == pytest.approx(float(relative))


def test_the_bias_of_content_keys_changes_nothing(seed: int) -> None:
    """It adds the same to all logits of a query once keys do not turn."""
    rng = np.random.default_rng(seed)
    model = config(SLOW)
    module = dense_module(rng, model)
    module.k.bias *= 20
    x = tokens(rng, 1)
    dense = arrays(module)
    conversion = LayerConversion(dense, LATENT, Recipe(), Moments.of(x[0].numpy()))
    stored = whole(conversion)
    errors = Probe(dense, x, model, GRID).steps(conversion, stored)
    assert errors["band"].logits == pytest.approx(errors["qk_norm"].logits, rel=1e-9)
    assert errors["band"].output == pytest.approx(errors["qk_norm"].output, rel=1e-9)


def test_smaller_ranks_are_cuts_of_larger_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = arrays(dense_module(rng, config(100.0)))
    moments = Moments.of(tokens(rng, 3).flatten(0, 1).numpy())
    for init in INITS:
        whole = LayerConversion(dense, LATENT, Recipe(init, seed=5), moments, layer=2)
        small = replace(LATENT, d_c=12, d_q=16)
        direct = LayerConversion(dense, small, Recipe(init, seed=5), moments, layer=2).tensors()
        for name, value in whole.tensors(12, 16).items():
            # Eigenvectors have no sign.
            assert np.allclose(np.abs(value), np.abs(direct[name]), atol=1e-9), (init, name)


def test_factor_is_the_best_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = [rng.standard_normal((m, 15)) for m in (7, 11)]
    root = rng.standard_normal((15, 15))
    second = root @ root.T
    for metric, transform in ((None, np.eye(15)), (second, root)):
        cut = factor(blocks, 6, [1.0, 3.0], metric)
        left = np.concatenate([blocks[0], 3 * blocks[1]])
        ours = np.concatenate([cut.ups[0], 3 * cut.ups[1]]) @ cut.down
        sigma = np.linalg.svd(left @ transform, compute_uv=False)
        assert np.linalg.norm((left - ours) @ transform) == pytest.approx(
            np.linalg.norm(sigma[6:]), rel=1e-4
        )


def test_the_norm_of_the_query_latent_stands_in_for_norm_q(seed: int) -> None:
    """At full rank and without a bias its queries are the dense ones, token by token."""
    rng = np.random.default_rng(seed)
    module = dense_module(rng, config(SLOW))
    module.q.bias.zero_()
    x = tokens(rng, 2)
    conversion = LayerConversion(arrays(module), LATENT, Recipe(), Moments.of(x[0].numpy()))
    stored = whole(conversion)
    nope, _ = latent_module(config(SLOW), LATENT, stored).query(x)
    dense = module.query(x)[0][..., content_channels(HEAD, LATENT.rope_pairs)]
    assert (nope - dense).norm() < 1e-5 * dense.norm()


def test_shared_key_is_the_best_complex_rank_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = Projection(rng.standard_normal((HEADS * 4, WIDTH)), np.zeros(HEADS * 4))
    split = rows.weight.reshape(HEADS, 2, 2, WIDTH)
    keys = split[:, :, 0] + 1j * split[:, :, 1]
    x = tokens(rng, 2).flatten(0, 1).numpy()
    for moments, root in (
        (Moments(), np.eye(WIDTH)),
        (Moments.of(x), np.linalg.qr(x, mode="r").T / len(x) ** 0.5),
    ):
        left: dict[str, float] = {}
        for how in ("svd", "mean"):
            shared = shared_key(rows, HEADS, how, moments)  # type: ignore[arg-type]
            w = shared.key.weight.reshape(2, 2, WIDTH)
            ours = shared.u.T[:, :, None] * (w[:, 0] + 1j * w[:, 1])
            left[how] = float(np.linalg.norm((keys - ours) @ root))
        best = [np.linalg.svd(keys[:, p] @ root, compute_uv=False)[1:] for p in range(2)]
        assert left["svd"] == pytest.approx(np.linalg.norm(np.concatenate(best)), rel=1e-9)
        assert left["svd"] < left["mean"]


def test_channels_follow_wans_split() -> None:
    rotary = rotary_channels(128, (6, 5, 5))
    assert rotary.tolist() == [*range(12), *range(44, 54), *range(86, 96)]
    assert sorted([*rotary, *content_channels(128, (6, 5, 5))]) == list(range(128))
    assert default_pairs(32, 128) == (6, 5, 5) and default_pairs(8, 32) == (2, 1, 1)
    assert default_pairs(0, 32) == (0, 0, 0) and default_pairs(4, 32) == (2, 0, 0)
    with pytest.raises(UserError, match="come in pairs"):
        default_pairs(7, 32)
    with pytest.raises(UserError, match="exceed the pairs"):
        rotary_channels(32, (2, 6, 1))


@pytest.mark.parametrize(("d_nope", "pairs"), [(0, (4, 2, 2)), (16, (0, 0, 0))])
def test_all_rotary_and_all_content(d_nope: int, pairs: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    latent = LatentConfig(d_c=10, d_q=12, d_nope=d_nope, d_rope=16 - d_nope, rope_pairs=pairs)
    dense = arrays(dense_module(rng, config(100.0)))
    x = tokens(rng, 1)
    moments = Moments.of(x[0].numpy())
    for init in INITS:
        conversion = LayerConversion(dense, latent, Recipe(init), moments)
        stored = whole(conversion)
        errors = Probe(dense, x, config(100.0), GRID).final(latent, stored)
        assert np.isfinite([errors.logits, errors.output]).all()
