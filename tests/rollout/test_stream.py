"""The stream against recorded rollouts, itself in other cuts, and inputs that do not fit."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mla_study.config import FlowConfig, LatentConfig, ModelConfig, WindowConfig, mini
from mla_study.errors import UserError
from mla_study.kernels.masks import chunk_causal
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.prompts import digest, embed, stand_in
from mla_study.rollout.stream import (
    Rollout,
    RolloutConfig,
    SeededNoise,
    random_model,
    stream,
    whole_chunks,
)

TINY = replace(
    mini(), layers=2, width=32, heads=2, ffn_width=48, text_dim=10, latent_size=(4, 6),
    window=WindowConfig(1, 3, 2),
)  # fmt: skip
LATENT = replace(TINY, latent=LatentConfig(6, 8, 10, 6, (1, 1, 1)))


def model_of(config: ModelConfig, seed: int = 0) -> WanTransformer:
    return random_model(config, seed).double()


def run(model: WanTransformer, prompts: object = "a red disc", **options: object) -> list[Tensor]:
    options.setdefault("frames", 14)
    return [chunk.latents for chunk in stream(model, prompts, **options)]  # type: ignore[arg-type]


def same(left: list[Tensor], right: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]


RECORDED = ["sf_rollout_full", "sf_rollout_evict_l7_s1_b3", "longlive_relative_rope_l7_s1_b3"]


@pytest.mark.parametrize("name", RECORDED)
def test_replays_a_recorded_rollout(fixtures: Path, name: str) -> None:
    if not (fixtures / f"{name}.json").exists():
        pytest.skip(f"{name} is not among the fixtures")
    told = json.loads((fixtures / f"{name}.json").read_text())
    held = load_file(fixtures / f"{name}.safetensors")
    c, r = told["config"], told["rollout"]
    chunk, local = r["num_frame_per_block"], r["local_attn_size"]
    if local == -1:
        window = WindowConfig(0, r["frames"], chunk)
    else:
        window = WindowConfig.from_local_attn_size(local, r["sink_size"], chunk)
    config = ModelConfig(
        name, c["num_layers"], c["dim"], c["num_heads"], c["ffn_dim"], c["freq_dim"], c["text_dim"],
        window=window, flow=FlowConfig(5.0),
    )  # fmt: skip
    model = WanTransformer(config)
    model.load_state_dict(load_file(fixtures / told["weights"]))
    noise, fresh = held["noise"].transpose(1, 2), held["renoise_eps"]

    def recorded(index: int, draw: int) -> Tensor:
        if draw:
            return fresh[index, draw - 1].transpose(1, 2)
        return noise[:, :, index * chunk : (index + 1) * chunk]

    made = stream(
        model, held["context"], frames=r["frames"], noise=recorded,
        size=(noise.shape[3], noise.shape[4]),
        positions="relative" if name.startswith("longlive") else "absolute",
    )  # fmt: skip
    latents = torch.cat([one.latents for one in made], dim=2).transpose(1, 2)
    worst = (latents - held["latents"]).abs()
    assert worst.max() < 1e-4 and worst.mean() < 1e-5


@pytest.mark.parametrize("config", [TINY, LATENT], ids=["dense", "latent"])
def test_chunk_by_chunk_is_one_masked_pass(config: ModelConfig) -> None:
    """The clean pass over all frames at once, with absolute positions, across evictions."""
    model = model_of(config)
    rollout = Rollout(model, "a red disc", RolloutConfig(positions="absolute"))
    latents = torch.cat([rollout.advance().latents for _ in range(5)], dim=2)
    rule = chunk_causal(10, 2, config.window, "absolute")
    flows: list[Tensor] = []
    hook = model.register_forward_hook(lambda m, i, out: flows.append(out))
    model(latents, torch.zeros(1), rollout.conditioning, rule)
    whole = flows.pop()
    rollout = Rollout(model, "a red disc", RolloutConfig(positions="absolute"))
    for _ in range(5):
        rollout.advance()
    hook.remove()
    clean = torch.cat(flows[4::5], dim=2)
    assert (whole - clean).abs().max() < 1e-10


@pytest.mark.parametrize("config", [TINY, LATENT], ids=["dense", "latent"])
def test_a_switch_changes_later_chunks_only(config: ModelConfig) -> None:
    model = model_of(config)
    plain = run(model)
    switched = run(model, prompt_at={3: "a blue cross"})
    again = run(model, prompt_at={3: "a blue cross"}, recache=True)
    assert same(plain, switched) == same(plain, again) == [True] * 3 + [False] * 4
    assert same(switched, again) == [True] * 3 + [False] * 4
    assert all(same(plain, run(model, prompt_at={3: "a red disc"})))
    assert all(same(plain, run(model, recache=True)))


def test_a_recache_under_the_same_prompt_restores_the_entries() -> None:
    """Before anything was evicted, what is recomputed is what was there."""
    model = model_of(LATENT)
    rollout = Rollout(model, "a", RolloutConfig(recache=True), prompt_at={2: "a"})
    for _ in range(2):
        rollout.advance()
    before = {f: x.clone() for f, x in zip(rollout.cache.frames, *entries(rollout), strict=True)}
    rollout._recache(4)
    after = dict(zip(rollout.cache.frames, *entries(rollout), strict=True))
    assert sorted(before) == sorted(after) == [0, 1, 2, 3]
    assert all(torch.allclose(before[f], after[f], atol=1e-12) for f in before)


def entries(rollout: Rollout) -> list[list[Tensor]]:
    return [list(rollout.cache.read(1, torch.float64)[0].unbind(1))]


def test_each_chunk_has_noise_of_its_own_and_alone() -> None:
    shape = (2, 3, 2, 4, 4)
    noise = SeededNoise(7, shape)
    drawn = [noise(c, d) for c, d in itertools.product((0, 5), (0, 1))]
    assert all(x.shape == shape for x in drawn)
    flat = [sample for x in drawn for sample in x] + list(SeededNoise(8, shape)(0, 0))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(flat, 2))
    assert torch.equal(SeededNoise(7, (1, *shape[1:]))(5, 1), drawn[3][:1])
    assert abs(float(torch.cat(flat).std()) - 1) < 0.1


def test_a_batch_is_its_samples() -> None:
    model = model_of(LATENT)
    pair = run(model, ["a red disc", "a blue cross"], frames=8)
    single = run(model, "a red disc", frames=8)
    assert all(torch.allclose(p[:1], s, atol=1e-10) for p, s in zip(pair, single, strict=True))
    wide = run(model, "a red disc", frames=8, batch=3)
    assert wide[0].shape == (3, 16, 2, 4, 6)
    assert torch.allclose(wide[3][:1], single[3], atol=1e-10)
    assert not torch.allclose(wide[0][0], wide[0][1])


@pytest.mark.parametrize("config", [TINY, LATENT], ids=["dense", "latent"])
def test_the_clean_pass_and_storage_are_studied(config: ModelConfig) -> None:
    model = random_model(config)
    plain = run(model)
    assert same(plain, run(model, clean_pass=False)) == [True] + [False] * 6
    for storage in ("bf16", "int8-token", "int8-channel"):
        coarse = run(model, storage=storage)
        assert not torch.equal(coarse[-1], plain[-1])
        assert (coarse[1] - plain[1]).abs().mean() < 0.1


def test_relative_positions_do_not_know_how_long_it_has_run() -> None:
    """The steady state with positions in the window: shifted frames, the same latents."""
    config = replace(LATENT, window=WindowConfig(0, 2, 2), learned_positions=False)
    model = model_of(config)
    shape = (1, 16, 2, 4, 6)

    def periodic(chunk: int, draw: int) -> Tensor:
        return SeededNoise(3, shape)(chunk % 2, draw)

    made = run(model, frames=60, noise=periodic)
    assert torch.allclose(made[-1], made[-3], atol=1e-6)


def test_frames_are_rounded_up_and_can_go_on_for_ever() -> None:
    model = random_model(TINY)
    assert [c.frames for c in stream(model, "a", frames=3)] == [(0, 1), (2, 3)]
    endless = stream(model, "a")
    assert [c.index for c in itertools.islice(endless, 9)] == list(range(9))
    assert whole_chunks(7, 3) == 3
    with pytest.raises(UserError, match="at least 1"):
        whole_chunks(0, 3)


def test_memory_and_tables_stay_constant() -> None:
    rollout = Rollout(random_model(LATENT), "a", RolloutConfig(recache=True))
    for _ in range(8):
        rollout.advance()
    size = rollout.cache.nbytes
    for _ in range(8):
        rollout.advance()
    assert rollout.cache.nbytes == size
    assert sorted(rollout.recent) == [0, 29, 30, 31]


@pytest.mark.parametrize("where", ["weight", "overflow"])
def test_infinities_are_traced_to_chunk_step_and_layer(where: str) -> None:
    model = random_model(TINY)
    made = stream(model, "a")
    next(made)
    with torch.no_grad():
        if where == "weight":
            model.blocks[1].ffn[0].weight[3, 4] = float("nan")
        else:
            model.blocks[1].ffn[0].weight *= 1e30
            model.blocks[1].ffn[2].weight *= 1e30
    with pytest.raises(UserError) as told:
        next(made)
    assert "chunk 1, step 1" in str(told.value) and "layer 1" in str(told.value)
    assert ("ffn.0.weight" in str(told.value)) == (where == "weight")


def test_infinite_prompts_are_refused_at_once() -> None:
    model = random_model(TINY)
    with pytest.raises(UserError, match="layer 0"):
        stream(model, torch.full((1, 4, 10), float("nan")))


def test_inputs_that_do_not_fit() -> None:
    model = random_model(TINY)
    bad: list[tuple[object, dict[str, object], str]] = [
        ([], {}, "no prompt"),
        (torch.zeros(1, 4, 11), {}, "10"),
        (["a", "b"], {"batch": 3}, "batch of 3"),
        ("a", {"batch": 0}, "at least 1"),
        ("a", {"size": (5, 6)}, "patches"),
        ("a", {"prompt_at": {0: "b"}}, "chunk 0"),
        ("a", {"steps": (1200,)}, "0 to 1000"),
        ("a", {"frames": 0}, "at least 1"),
    ]
    for prompts, options, words in bad:
        with pytest.raises(UserError, match=words):
            stream(model, prompts, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="text-to-video"):
        stream(random_model(replace(TINY, model_type="i2v", in_channels=36)), "a")
    with pytest.raises(UserError, match="UMT5"):
        embed("a", ModelConfig(), None)


def test_stand_in_embeddings_depend_on_words_alone() -> None:
    encode = stand_in(TINY)
    first, second = encode(["a red disc", "A disc"])
    assert torch.equal(first[2], second[1]) and not first[3:].any()
    assert encode(["w " * 40]).shape == (1, 8, 10)
    told = {0: encode(["a"]), 4: encode(["b"])}
    assert digest(told) == digest(dict(reversed(told.items()))) != digest({0: told[0], 5: told[4]})
