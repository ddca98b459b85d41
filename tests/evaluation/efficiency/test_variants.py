"""Variants as data, what they become, and that a wrong one is found out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rollout.tape import capture

from mla_study.config import WindowConfig
from mla_study.evaluation.efficiency import variants
from mla_study.evaluation.efficiency.model_cost import WINDOWS
from mla_study.evaluation.efficiency.variants import (
    NoisePool,
    Running,
    Scale,
    Variant,
    Weights,
    full,
    gap,
    places,
    quarter,
    refusal,
    small,
    tolerance,
)
from mla_study.model.attention import LatentSelfAttention
from mla_study.rollout.accelerate import Acceleration

WINDOW = WindowConfig(1, 3, 3)
DENSE, LATENT = Variant(WINDOW), Variant(WINDOW, latent=True, form="reconstruct")


@pytest.fixture(scope="module")
def scale() -> Scale:
    return small(quarter())


def test_windows_count_the_keys_of_the_study() -> None:
    tokens = [1560 * window.key_frames for window in WINDOWS.values()]
    assert tokens == [32760, 15600, 10920]


def test_a_quarter_keeps_the_shares_of_the_whole() -> None:
    there, here = full("cpu"), quarter()
    for window in WINDOWS.values():
        for latent in (False, True):
            variant = Variant(window, latent, "reconstruct")
            mine, theirs = (variant.cost(s) for s in (here, there))
            for part in ("projections", "self-attention", "cross-attention", "ffn"):
                share = mine.parts[part] / mine.flops
                assert share == pytest.approx(theirs.parts[part] / theirs.flops, abs=4e-3)


def test_flops_predict_the_factors_of_window_and_layout() -> None:
    there = full("cpu")
    everything, dense, latent = (
        Variant(WINDOWS["21 frames"]),
        Variant(WINDOWS["1 + 6 + chunk"]),
        Variant(WINDOWS["1 + 6 + chunk"], latent=True, form="reconstruct"),
    )
    costs = [v.cost(there).flops for v in (everything, dense, latent)]
    assert costs[0] / costs[1] == pytest.approx(1.578, abs=5e-4)
    assert costs[1] / costs[2] == pytest.approx(1.030, abs=5e-4)


def test_names_tell_variants_apart(scale: Scale) -> None:
    several = [
        DENSE, LATENT, replace(LATENT, form="absorbed"), replace(LATENT, d_c=8),
        replace(DENSE, storage="int8-token"), replace(DENSE, clean_pass=False),
        replace(LATENT, head_group=1), replace(DENSE, batch=2),
        replace(DENSE, how=Acceleration(graph=True)), replace(DENSE, window=WindowConfig(1, 6, 3)),
    ]  # fmt: skip
    assert len({v.name for v in several}) == len(several)
    assert DENSE.passes(scale) == 5 and replace(DENSE, clean_pass=False).passes(scale) == 4
    assert DENSE.frames(scale) == 12 and replace(DENSE, batch=2).frames(scale) == 24


def test_auto_asks_the_shapes() -> None:
    auto = replace(LATENT, form="auto", window=WINDOWS["1 + 6 + chunk"])
    assert auto.resolved(quarter()) == "absorbed"  # d_c 48 against heads of 128
    assert replace(auto, d_c=192).resolved(quarter()) == "reconstruct"
    assert DENSE.resolved(quarter()) == "dense"


@pytest.mark.parametrize(("window", "count"), [((1, 6, 3), 3), ((1, 3, 3), 2), ((0, 18, 3), 7)])
def test_places_repeat(scale: Scale, window: tuple[int, int, int], count: int) -> None:
    variant = Variant(WindowConfig(*window))
    assert places(variant.window) == count
    running = Running(variant, scale, Weights(scale))
    cache, seen = running.rollout.cache, list[object]()
    for chunk in range(running.rollout.next_chunk, running.rollout.next_chunk + 2 * count):
        running._begin(chunk)
        seen.append(str(cache._runs))
    assert len(set(seen)) == count and seen[:count] == seen[count:]


FORMS = [
    DENSE, LATENT, replace(LATENT, form="absorbed"), replace(LATENT, storage="int8-channel"),
    replace(DENSE, storage="int8-token"), replace(LATENT, head_group=2), replace(LATENT, batch=2),
    Variant(WindowConfig(0, 18, 3)),
]  # fmt: skip


@pytest.mark.parametrize("variant", FORMS, ids=[v.name for v in FORMS])
def test_right_variants_pass_their_check(variant: Variant, scale: Scale) -> None:
    assert gap(variant, scale) < tolerance(variant, scale)
    assert refusal(variant, scale) is None


def test_a_recorded_variant_passes(scale: Scale) -> None:
    variant = replace(LATENT, how=Acceleration(graph=True))
    assert gap(variant, scale, capture) < tolerance(variant, scale)


def _swap_heads(running: Running) -> None:
    for module in running.rollout.model.modules():
        if isinstance(module, LatentSelfAttention):
            module.k_up.weight = torch.nn.Parameter(module.k_up.weight.flip(0))


def _other_positions(running: Running) -> None:
    running.rollout.model.rope = replace(running.rollout.model.rope, base=5.0)


def _deaf_to_the_past(running: Running) -> None:
    for pair in running.rollout.cache._layers:
        for slots in pair:
            slots.write = lambda where, values: None  # type: ignore[method-assign]


@pytest.mark.parametrize("spoil", [_swap_heads, _other_positions, _deaf_to_the_past])
@pytest.mark.parametrize("storage", [None, "int8-channel"])
def test_wrong_variants_are_found_out(spoil: object, storage: str | None, scale: Scale) -> None:
    variant = replace(LATENT, storage=storage)
    assert gap(variant, scale, spoil=spoil) > tolerance(variant, scale)  # type: ignore[arg-type]


def test_a_refused_variant_says_why(scale: Scale) -> None:
    told = refusal(replace(DENSE, how=Acceleration(fp8=True)), scale)
    assert told is not None and told.startswith("refused: fp8 needs a GPU")
    told = refusal(replace(LATENT, form="absorbed_triton"), scale)
    assert told is not None and told.startswith("refused: form absorbed_triton cannot run here")


def test_a_wrong_variant_gets_no_number(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "gap", lambda *given: 0.5)
    assert refusal(DENSE, scale) == "wrong: error 0.5 exceeds 1e-05"


def test_twins_share_weights_and_nothing_else(scale: Scale) -> None:
    weights = Weights(scale)
    config = LATENT.config(scale)
    one, two = weights.twin(config), weights.twin(config)
    assert one.head.head.weight.data_ptr() == two.head.head.weight.data_ptr()
    one.blocks[0].self_attn.form = "absorbed"  # type: ignore[union-attr]
    assert two.blocks[0].self_attn.form == "auto"  # type: ignore[union-attr]


def test_a_running_variant_starts_with_a_full_window(scale: Scale) -> None:
    running = Running(LATENT, scale, Weights(scale))
    cache = running.rollout.cache
    assert len(cache.frames) == WINDOW.key_frames
    before = running.rollout.next_chunk
    running.chunk()
    assert running.rollout.next_chunk == before + 1
    assert torch.isfinite(running.step()).all()
    running.restart()
    assert cache.frames == [] and running.rollout.next_chunk == 0


def test_noise_takes_turns() -> None:
    pool = NoisePool.of((1, 2, 3, 4, 4), torch.device("cpu"), 3)
    drawn = [pool(0, draw) for draw in range(4)]
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[3])
