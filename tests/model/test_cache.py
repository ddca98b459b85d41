"""The ring: what it keeps and forgets, storage, state, memory, and gradients through it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model.tiny import BOTH, CPU, DENSE, LATENT, error, make, rolled, step

from mla_study.config import ModelConfig, WindowConfig, wan_1_3b
from mla_study.errors import UserError
from mla_study.kernels.masks import chunk_causal, teacher_forcing, window_frames
from mla_study.model.cache import CacheLayout, RollingCache, layout_of
from mla_study.model.quantize import dequantize, quantize
from mla_study.model.storage import DTYPES, SCHEMES, Storage

STORAGES: list[Storage] = ["bf16", "fp16", "fp32", "fp64", "int8-channel", "int8-token"]
ONE = replace(LATENT, layers=1)


def entries(cache: RollingCache, frames: list[int], batch: int = 1) -> tuple[torch.Tensor, ...]:
    """Entries that say which frame, sample and token they belong to."""
    layout = layout_of(cache.config)
    shape = (batch, len(frames), cache.tokens)
    base = torch.tensor(frames, dtype=torch.float32)[None, :, None]
    base = base + 1000 * torch.arange(batch)[:, None, None] + 0.01 * torch.arange(cache.tokens)
    assert base.shape == shape
    return tuple(
        base.reshape(*shape, *(1 for _ in tail)).expand(*shape, *tail).flatten(1, 2)
        for tail in (layout.first, layout.second)
    )


def put(cache: RollingCache, frames: list[int]) -> list[int]:
    """Begin and write a chunk; check that every slot holds the frame that it should."""
    held = cache.begin(frames)
    with torch.no_grad():
        for view in cache.layers():
            first, second = entries(cache, frames, cache.batch)
            got = view.step().extend((first, second))
            for mine, theirs in zip(got, entries(cache, held, cache.batch), strict=True):
                assert torch.equal(mine, theirs)
    return held


@given(
    sink=st.integers(0, 3),
    history=st.integers(0, 5),
    chunk=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9),
    passes=st.integers(1, 3),
    batch=st.integers(1, 2),
)
def test_it_holds_what_the_mask_says(
    sink: int, history: int, chunk: int, sizes: list[int], passes: int, batch: int
) -> None:
    """Chunks of any length up to the window's, several passes each."""
    window = WindowConfig(sink, history, chunk)
    cache = RollingCache(ONE, window, batch, 2)
    start = 0
    for size in (min(s, chunk) for s in sizes):
        new = list(range(start, start + size))
        for _ in range(passes):
            held = put(cache, new)
            assert sorted(held) == [*window_frames(start, sink, history), *new]
            assert len(held) <= window.key_frames
        start += size


def test_reading_is_a_view() -> None:
    cache = RollingCache(ONE, WindowConfig(1, 2, 2), 2, 3)
    place = cache.state()["0.first"]
    for start in range(0, 12, 2):
        cache.begin([start, start + 1])
        with torch.no_grad():
            first, _ = cache.layers()[0].step().extend(entries(cache, [start, start + 1], 2))
        assert first.untyped_storage().data_ptr() == place.untyped_storage().data_ptr()
        assert cache.state()["0.first"].data_ptr() == place.data_ptr()


def test_refusals() -> None:
    window = WindowConfig(1, 2, 2)
    for bad in ((0, 1), (1, 0)):
        with pytest.raises(UserError):
            RollingCache(ONE, window, *bad)
    with pytest.raises(UserError, match="int4"):
        RollingCache.__init__.__wrapped__(  # past the type check of the tests
            RollingCache.__new__(RollingCache), ONE, window, 1, 1, "int4"
        )
    cache = RollingCache(ONE, window, 1, 3)
    put(cache, [0, 1])
    for frames in ([2, 3, 4], [3, 4], [0], [], [3, 2], [2, 4], [1, 2]):
        before = list(cache.frames)
        with pytest.raises(UserError):
            cache.begin(frames)
        assert cache.frames == before
    put(cache, [2, 3])
    with pytest.raises(UserError):
        cache.begin([0, 1])  # an older chunk would see frames that come after it
    first, second = entries(cache, [2, 3])
    with torch.no_grad(), pytest.raises(UserError, match="2 frames of 3 tokens"):
        cache.layers()[0].step().extend((first[:, :-1], second[:, :-1]))


def test_it_begins_anywhere_and_jumps_when_told() -> None:
    cache = RollingCache(ONE, WindowConfig(1, 3, 2), 1, 2)
    assert put(cache, [40, 41]) == [40, 41]
    cache.reset()
    assert cache.frames == [] and cache.chunk == ()
    put(cache, [0])
    held = cache.begin([7, 8], gap=True)
    assert sorted(held) == [0, 7, 8] and put(cache, [7, 8]) == held
    assert sorted(put(cache, [9, 10])) == [0, 7, 8, 9, 10]
    assert sorted(put(cache, [11, 12])) == [0, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", BOTH)
def test_memory_is_what_tensors_take(kind: str, storage: Storage) -> None:
    cache = RollingCache(BOTH[kind], WindowConfig(1, 2, 3), 2, 7, storage)
    tensors = [value for name, value in cache.state().items() if name != "frames"]
    assert cache.nbytes == sum(t.nbytes for t in tensors)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert cache.nbytes == sum(kept.values())


def test_bytes_a_token_a_layer() -> None:
    def size(latent: bool, storage: Storage) -> float:
        config = replace(wan_1_3b(latent), layers=1)
        return RollingCache(config, WindowConfig(0, 0, 1), 1, 1560, storage).bytes_per_token_layer

    dense = size(False, "bf16")
    assert dense == 2 * 3072 and layout_of(wan_1_3b()).scalars == 3072
    assert size(True, "bf16") / dense == 224 / 3072
    for storage in SCHEMES:
        assert size(True, storage) / dense <= 0.04  # type: ignore[arg-type]
    assert layout_of(wan_1_3b(True)) == CacheLayout((192,), (32,))


@pytest.mark.parametrize("storage", STORAGES)
def test_state_comes_back(storage: Storage, seed: int) -> None:
    model, window = make(LATENT, seed), WindowConfig(1, 2, 2)
    x, t = torch.randn(2, 3, 10, 4, 6), torch.rand(2, 10) * 999
    with torch.no_grad():
        conditioning = model.condition(torch.randn(2, 3, 7))
        cache = RollingCache(LATENT, window, 2, 6, storage)
        rolled(model, x[:, :, :6], t, conditioning, window, cache=cache)
        saved = {name: value.clone() for name, value in cache.state().items()}
        ids = (6, 7)
        want = step(model, x[:, :, 6:8], t[:, 6:8], conditioning, cache, ids, "relative")
        other = RollingCache(LATENT, window, 2, 6, storage)
        rolled(model, x[:, :, 1:9], t, conditioning, window, cache=other)
        other.restore(saved)
        got = step(model, x[:, :, 6:8], t[:, 6:8], conditioning, other, ids, "relative")
    assert torch.equal(got, want)
    for name, value in cache.state().items():
        assert torch.equal(other.state()[name], value)


def test_foreign_state_is_refused() -> None:
    cache = RollingCache(ONE, WindowConfig(1, 2, 2), 1, 3)
    put(cache, [0, 1])
    good = {name: value.clone() for name, value in cache.state().items()}
    for change in (
        {"0.first": good["0.first"][:, :-1]},
        {"0.first": good["0.first"].double()},
        {"frames": torch.arange(6)},
        {"frames": torch.tensor([1, 1])},
        {"1.first": good["0.first"]},
    ):
        with pytest.raises(UserError):
            cache.restore({**good, **change})
    for name in good:
        with pytest.raises(UserError, match=name):
            cache.restore({k: v for k, v in good.items() if k != name})
    assert put(cache, [2, 3]) == [0, 1, 2, 3]


@pytest.mark.parametrize("storage", STORAGES)
def test_storage_error(storage: Storage, seed: int) -> None:
    """What is attended is what is stored; int8 costs under a per cent."""
    torch.manual_seed(seed)
    config = replace(ONE, latent=replace(LATENT.latent, d_c=24))  # type: ignore[type-var]
    cache = RollingCache(config, WindowConfig(0, 2, 2), 2, 30, storage)
    cache.begin([0, 1])
    given = torch.randn(2, 60, 24), torch.randn(2, 60, 10)
    with torch.no_grad():
        got = cache.layers()[0].step().extend(given)
    for mine, theirs in zip(got, given, strict=True):
        framed = theirs.unflatten(1, (2, 30))
        if storage in SCHEMES:
            want = dequantize(quantize(framed, SCHEMES[storage]), torch.float32)
        else:
            want = framed.to(DTYPES[storage]).float()
        assert torch.equal(mine, want.flatten(1, 2))
        assert error(mine, theirs) < (0.008 if storage in SCHEMES else 0.003)


def test_a_cache_born_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        cache = RollingCache(ONE, WindowConfig(0, 2, 1), 1, 2)
        put(cache, [0])
    put(cache, [1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", BOTH)
def test_gradients_through_a_rollout(kind: str, recompute: bool, seed: int) -> None:
    """One pass a chunk: the loss's gradient is that of the masked pass, evicted frames included."""
    model, window = make(BOTH[kind], seed, torch.float64), WindowConfig(1, 2, 2)
    model.recompute = recompute
    x = torch.randn(2, 3, 10, 4, 6, dtype=torch.float64, requires_grad=True)
    t, weights = torch.rand(2, 10) * 999, torch.randn(2, 3, 10, 4, 6, dtype=torch.float64)
    text = torch.randn(2, 3, 7, dtype=torch.float64)
    wanted = [x, *model.parameters()]

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        made = torch.autograd.grad((out * weights).sum(), wanted)
        return list(made)

    rule = chunk_causal(10, 2, window, "relative")
    whole = gradients(model(x, t, model.condition(text), rule))
    chunked = gradients(rolled(model, x, t, model.condition(text), window, "relative", "fp64"))
    for mine, theirs in zip(chunked, whole, strict=True):
        assert (mine - theirs).norm() <= 1e-9 * theirs.norm() + 1e-12


def test_gradients_through_noisy_and_clean_passes(seed: int) -> None:
    """A noisy pass, then a clean one that the next chunk sees: teacher forcing's gradient."""
    model, window = make(LATENT, seed, torch.float64), WindowConfig(1, 1, 1)
    clean = torch.randn(1, 3, 4, 2, 4, dtype=torch.float64, requires_grad=True)
    noisy = torch.randn(1, 3, 4, 2, 4, dtype=torch.float64, requires_grad=True)
    t, zero = torch.rand(1, 4) * 999, torch.zeros(1, 4)
    text = torch.randn(1, 3, 7, dtype=torch.float64)
    rule = teacher_forcing(4, 1, window)
    both = torch.cat([clean, noisy], dim=2)
    out = model(both, torch.cat([zero, t], dim=1), model.condition(text), rule)[:, :, 4:]
    whole = torch.autograd.grad(out.square().sum(), [clean, noisy, *model.parameters()])
    cache, conditioning = RollingCache(LATENT, window, 1, 2, "fp64"), model.condition(text)
    loss = torch.zeros((), dtype=torch.float64)
    for f in range(4):
        one = slice(f, f + 1)
        made = step(model, noisy[:, :, one], t[:, one], conditioning, cache, [f])
        loss = loss + made.square().sum()
        step(model, clean[:, :, one], zero[:, one], conditioning, cache, [f])
    mine = torch.autograd.grad(loss, [clean, noisy, *model.parameters()])
    for a, b in zip(mine, whole, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8-token"])
def test_gradients_stop_where_they_are_told(storage: Storage, seed: int) -> None:
    """Passes without gradients leave constants; both modes see the same numbers."""
    model, window = make(LATENT, seed), WindowConfig(1, 1, 1)
    x, t = torch.randn(1, 3, 4, 2, 4), torch.rand(1, 4) * 999
    conditioning = model.condition(torch.randn(1, 3, 7))
    quiet = RollingCache(LATENT, window, 1, 2, storage)
    loud = RollingCache(LATENT, window, 1, 2, storage)
    with torch.no_grad():
        want = rolled(model, x, t, conditioning, window, cache=quiet)
    got = rolled(model, x, t, conditioning, window, cache=loud)
    assert error(got, want) < 1e-6
    for name, value in quiet.state().items():
        assert error(loud.state()[name].float(), value.float()) < 1e-2
    loud.detach()
    leaf = torch.randn(1, 3, 1, 2, 4, requires_grad=True)
    with torch.no_grad():
        step(model, leaf, t[:, :1], conditioning, loud, [4])
    before = {name: value.clone() for name, value in loud.state().items()}
    out = step(model, leaf, t[:, :1], conditioning, loud, [5])
    (grad,) = torch.autograd.grad(out.square().sum(), [leaf])
    assert grad.isfinite().all() and grad.norm() > 0
    changed = [n for n in before if not torch.equal(before[n], loud.state()[n])]
    assert changed  # the ring received the values


def test_long_rollout_neither_grows_nor_slows() -> None:
    config = ModelConfig(
        name="mini", layers=2, width=24, heads=2, ffn_width=32, freq_dim=8, text_dim=4, text_len=4,
        latent=replace(LATENT.latent, d_nope=6, d_rope=6, rope_pairs=(1, 1, 1)),  # type: ignore[type-var]
    )  # fmt: skip
    model, window = make(config, 0), WindowConfig(1, 6, 3)
    with torch.no_grad():
        conditioning = model.condition(torch.randn(1, 4, 4))
        cache = RollingCache(config, window, 1, 4, "bf16")
        size = cache.nbytes
        x, t = torch.randn(1, 16, 3, 4, 4), torch.zeros(1, 3)
        for start in range(0, 300, 3):
            out = step(model, x, t, conditioning, cache, range(start, start + 3), "relative")
            assert out.isfinite().all()
    assert cache.nbytes == size and len(cache.frames) == 10
    assert all(not held for held in cache._graph)


def test_dense_layout() -> None:
    assert layout_of(DENSE) == CacheLayout((2, 18), (2, 18))
    cache = RollingCache(DENSE, WindowConfig(0, 1, 1), 1, 2, device=CPU)
    assert cache.read(0)[0].shape == (1, 0, 2, 2, 18)
