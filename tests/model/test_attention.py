"""Attention inside the model: forms, caches and masks give one function."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.tiny import BOTH, CPU, LATENT, error, make, rolled, step

from mla_study.config import LatentConfig, ModelConfig, WindowConfig, wan_1_3b
from mla_study.kernels.latent_attention import PORTABLE
from mla_study.kernels.masks import Positions, bidirectional, chunk_causal, teacher_forcing
from mla_study.model import attention as attention_module
from mla_study.model.attention import LatentSelfAttention
from mla_study.model.cache import RollingCache
from mla_study.model.layers import RMSNorm
from mla_study.model.transformer import Block, Conditioning, WanTransformer, meta_model


def use(model: WanTransformer, form: str, group: int | None = None) -> WanTransformer:
    for block in model.blocks:
        attention = cast(Block, block).self_attn
        assert isinstance(attention, LatentSelfAttention)
        attention.form, attention.head_group = form, group
    return model


def random_pass(
    model: WanTransformer, batch: int, frames: int, seed: int, rows: int = 4
) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    torch.manual_seed(seed + 1)
    dtype = model.patch_embedding.weight.dtype
    c = model.config
    x = torch.randn(batch, c.in_channels, frames, rows, 6, dtype=dtype)
    t = torch.rand(batch, frames) * 999
    return x, t, model.condition(torch.randn(batch, 3, c.text_dim, dtype=dtype))


def test_one_layer_of_wan_in_all_forms(seed: int) -> None:
    """1.3B widths, few tokens: the float32 module, its attention done in float64 or in a form."""
    config = replace(wan_1_3b(latent=True), layers=1, ffn_width=8, text_dim=8)
    torch.manual_seed(seed)
    attention = LatentSelfAttention(config, cast(LatentConfig, config.latent))
    x = torch.randn(1, 18, 1536)
    rule = chunk_causal(3, 1, WindowConfig(1, 1, 1), "relative")
    pieces = meta_model(config).pieces(rule, 2, 3, CPU)
    with torch.no_grad():
        attention.form = "reference"
        truth = attention(x, pieces)
        for form in PORTABLE:
            attention.form = form
            assert error(attention(x, pieces), truth) < 2e-6


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@settings(max_examples=12)
@given(
    heads=st.integers(2, 3),
    pairs=st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1)),
    d_c=st.integers(1, 12),
    d_q=st.integers(1, 12),
    sink=st.integers(0, 2),
    history=st.integers(0, 3),
    chunk=st.integers(1, 2),
    positions=st.sampled_from(["absolute", "relative"]),
    draw=st.integers(0, 2**31),
)
def test_forms_with_and_without_cache(
    heads: int, pairs: tuple[int, int, int], d_c: int, d_q: int, sink: int, history: int,
    chunk: int, positions: Positions, draw: int,
) -> None:  # fmt: skip
    """Across evictions: every form, masked in one pass and through a cache, against the oracle."""
    rope = 2 * sum(pairs)
    config = ModelConfig(
        name="odd", layers=2, width=10 * heads, heads=heads, ffn_width=9, freq_dim=6, text_dim=5,
        text_len=3, in_channels=1, out_channels=1,
        latent=LatentConfig(d_c, d_q, 10 - rope, rope, pairs),
    )  # fmt: skip
    window, frames = WindowConfig(sink, history, chunk), 4 * chunk
    model = make(config, draw)
    x, t, conditioning = random_pass(model, 2, frames, draw, rows=2)
    rule = chunk_causal(frames, chunk, window, positions)
    with torch.no_grad():
        truth = use(model, "reference")(x, t, conditioning, rule)
        for form in PORTABLE:
            use(model, form, group=2)
            # a latent of one channel has its norm divided away: fp32 leaves a few 1e-6 there
            assert error(model(x, t, conditioning, rule), truth) < 1e-5
            assert error(rolled(model, x, t, conditioning, window, positions), truth) < 1e-5


def keep(model: WanTransformer, yes: bool) -> WanTransformer:
    for block in model.blocks:
        attention = cast(Block, block).self_attn
        assert isinstance(attention, LatentSelfAttention)
        attention.keep_expanded = yes
    return model


@pytest.mark.parametrize(("sink", "history", "chunk"), [(1, 2, 2), (0, 3, 2), (2, 0, 1), (1, 4, 3)])
def test_kept_expansions_change_nothing(sink: int, history: int, chunk: int, seed: int) -> None:
    """Several passes a chunk, evictions, a reset, a second cache and a restored one."""
    window = WindowConfig(sink, history, chunk)
    model = make(LATENT, seed, torch.float64)
    x, t, conditioning = random_pass(model, 2, 5 * chunk, seed)
    caches = [RollingCache(model.config, window, 2, 6, "fp64") for _ in range(3)]

    def passes(cache: RollingCache, number: int, noise: float) -> torch.Tensor:
        ids = range(number * chunk, (number + 1) * chunk)
        inside = slice(ids.start, ids.stop)
        outs = [
            step(model, x[:, :, inside] * (noise - k), t[:, inside], conditioning, cache, ids)
            for k in range(3)
        ]
        return torch.stack(outs)

    def everything() -> torch.Tensor:
        outs: list[torch.Tensor] = []
        for cache in caches:
            cache.reset()
        for number in range(5):
            outs += [passes(cache, number, 3.0 + i) for i, cache in enumerate(caches[:2])]
        caches[2].restore(caches[0].state())
        outs.append(passes(caches[2], 4, 1.0))
        caches[0].reset()
        outs.append(passes(caches[0], 0, 2.0))
        return torch.stack(outs)

    with torch.no_grad():
        truth = everything()
        assert error(keep(model, True) and everything(), truth) < 1e-12
    x.requires_grad_()
    passes(caches[0], 0, 1.0).sum().backward()
    assert x.grad is not None


def test_kept_expansions_go_with_their_cache(seed: int) -> None:
    model = keep(make(LATENT, seed), True)
    x, t, conditioning = random_pass(model, 1, 2, seed)
    cache = RollingCache(model.config, WindowConfig(1, 2, 2), 1, 6, "fp32")
    view = cache.layers()[0]
    with torch.no_grad():
        step(model, x, t, conditioning, cache, range(2))
        made = view.held[0]
        step(model, x, t, conditioning, cache, range(2))
        assert view.held == [made]
    # weights may move between passes with gradients
    step(model, x, t, conditioning, cache, range(2))
    assert not view.held
    with torch.no_grad():
        step(model, x, t, conditioning, cache, range(2))
    cache.reset()
    assert not view.held


@pytest.mark.parametrize("form", ["reconstruct", "absorbed"])
def test_autocast(form: str, seed: int) -> None:
    model = use(make(LATENT, seed), form)
    x, t, conditioning = random_pass(model, 1, 2, seed)
    with torch.no_grad():
        truth = model(x, t, conditioning)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(model(x, t, conditioning).float(), truth) < 5e-2


def test_auto_takes_the_form_of_dispatch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(LATENT, seed)
    x, t, conditioning = random_pass(model, 1, 2, seed)
    asked: list[tuple[int, int]] = []

    def chosen(m: int, k: int, *rest: object, **more: object) -> str:
        asked.append((m, k))
        return "reference"

    with torch.no_grad():
        truth = use(model, "reference")(x, t, conditioning)
        use(model, "auto")
        assert error(model(x, t, conditioning), truth) < 2e-6
        monkeypatch.setattr(attention_module, "choose", chosen)
        assert torch.equal(model(x, t, conditioning), truth)
    assert asked == [(12, 12)] * 2


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("sink", "history", "chunk"), [(1, 2, 2), (0, 3, 2), (2, 0, 1), (1, 1, 3), (0, 0, 2), (3, 4, 1)]
)
def test_rollout_is_one_masked_pass(
    kind: str, sink: int, history: int, chunk: int, seed: int
) -> None:
    window, frames = WindowConfig(sink, history, chunk), 6 * chunk
    model = make(BOTH[kind], seed, torch.float64)
    x, t, conditioning = random_pass(model, 2, frames, seed)

    def masked(mode: Positions, frames: int = frames) -> torch.Tensor:
        rule = chunk_causal(frames, chunk, window, mode)
        return model(x[:, :, :frames], t[:, :frames], conditioning, rule)

    with torch.no_grad():
        absolute = rolled(model, x, t, conditioning, window, "absolute", "fp64")
        relative = rolled(model, x, t, conditioning, window, "relative", "fp64")
        late = rolled(model, x, t, conditioning, window, "relative", "fp64", first=10**6)
        assert error(absolute, masked("absolute")) < 1e-12
        # the sink's keys rotated anew for each chunk
        assert error(relative, masked("relative")) < 1e-12
        # only the window counts, wherever the rollout is (a first chunk at 10^6 has no sink yet)
        if sink == 0:
            assert error(late, relative) < 1e-12
        before_eviction = chunk * ((sink + history) // chunk + 1)
        early = slice(0, min(before_eviction, frames))
        # one rotation a key suffices while the window is contiguous
        assert error(relative[:, :, early], masked("absolute", early.stop)) < 1e-12
        same = error(relative, masked("absolute")) < 1e-12
        assert same == (sink == 0 or frames <= before_eviction)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_windowed_teacher_forcing_is_what_rollout_sees(
    kind: str, positions: Positions, seed: int
) -> None:
    """Noisy outputs of the training pass == noisy calls of a rollout with clean passes between."""
    window, frames = WindowConfig(1, 2, 2), 10
    model = make(BOTH[kind], seed, torch.float64)
    clean, t, conditioning = random_pass(model, 1, frames, seed)
    noisy = torch.randn_like(clean)
    rule = teacher_forcing(frames, 2, window, positions)
    with torch.no_grad():
        both, times = torch.cat([clean, noisy], 2), torch.cat([torch.zeros_like(t), t], 1)
        trained = model(both, times, conditioning, rule)[:, :, frames:]
        cache = RollingCache(model.config, window, 1, 6, "fp64")
        outs: list[torch.Tensor] = []
        for start in range(0, frames, 2):
            inside = slice(start, start + 2)
            held = cache.begin(range(start, start + 2))
            pieces = model.step_pieces(range(start, start + 2), held, positions, 2, 3, CPU)
            memory = cache.layers()
            for source, when in ((noisy, t), (clean, torch.zeros_like(t))):
                out = model(
                    source[:, :, inside], when[:, inside], conditioning, pieces=pieces,
                    memory=memory,
                )  # fmt: skip
                outs.append(out)
        assert error(torch.cat(outs[::2], 2), trained) < 1e-12


def test_a_segment_is_attention_under_its_mask(seed: int) -> None:
    """Segments against plain softmax with the dense token mask."""
    model = make(BOTH["dense"], seed, torch.float64)
    attention = cast(Block, model.blocks[0]).self_attn
    rule = chunk_causal(6, 2, WindowConfig(1, 2, 2))
    x = torch.randn(2, 36, 36, dtype=torch.float64)
    with torch.no_grad():
        mine = attention(x, model.pieces(rule, 2, 3, CPU))
        (q,), (k, v) = attention.query(x), attention.entry(x)
        table = model.rope.table(range(6), 2, 3, torch.float64)
        score = torch.einsum("bqhd,bkhd->bhqk", table.apply(q), table.apply(k)) / 18**0.5
        mask = torch.from_numpy(rule.tokens(6))
        weights = score.masked_fill(~mask, -torch.inf).softmax(-1)
        truth = attention.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
    assert error(mine, truth) < 1e-13


def test_the_norm_runs_over_all_heads(seed: int) -> None:
    torch.manual_seed(seed)
    norm = RMSNorm(12, 1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12))
    x = torch.randn(3, 12, dtype=torch.float64)
    truth = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert error(norm(x), truth) < 1e-15
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and error(half, truth) < 1e-2


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("kind", BOTH)
def test_half_precision(kind: str, dtype: torch.dtype, most: float, seed: int) -> None:
    model = make(BOTH[kind], seed)
    x, t, _ = random_pass(model, 1, 4, seed)
    text = torch.randn(1, 3, 7)
    rule = bidirectional(4)
    with torch.no_grad():
        truth = model(x, t, model.condition(text), rule)
        model.to(dtype)
        out = model(x, t, model.condition(text), rule)
    assert out.dtype == dtype and error(out, truth) < most


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_without_rotary_or_without_content_channels(seed: int) -> None:
    for split in (LatentConfig(5, 6, 18, 0, (0, 0, 0)), LatentConfig(5, 6, 0, 18, (3, 3, 3))):
        model = make(replace(LATENT, latent=split), seed)
        x, t, conditioning = random_pass(model, 1, 4, seed)
        window = WindowConfig(1, 1, 2)
        with torch.no_grad():
            want = model(x, t, conditioning, chunk_causal(4, 2, window))
            for storage in ("fp32", "int8-token", "int8-channel"):
                got = rolled(model, x, t, conditioning, window, storage=storage)
                assert error(got, want) < (1e-5 if storage == "fp32" else 5e-2)
