"""The transformer against diffusers' with the same weights, and the traps of Wan's block."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model.tiny import BOTH, CPU, DENSE, LATENT, error, make, step

from mla_study.config import ModelConfig, WindowConfig, mini, wan_14b
from mla_study.errors import UserError
from mla_study.kernels.masks import chunk_causal, teacher_forcing
from mla_study.model.cache import RollingCache
from mla_study.model.layers import timestep_embedding
from mla_study.model.transformer import WanTransformer, meta_model

IMAGE_NAMES = {
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}
I2V = replace(DENSE, model_type="i2v", in_channels=8, text_len=512)


def in_diffusers(config: ModelConfig, model: WanTransformer, fixtures: Path) -> torch.nn.Module:
    """diffusers' transformer holding our weights."""
    diffusers = pytest.importorskip("diffusers")
    table = json.loads((fixtures / "formats/key_map_wan_to_diffusers.json").read_text())
    image = config.model_type == "i2v"
    theirs = diffusers.WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_width,
        num_layers=config.layers,
        image_dim=1280 if image else None,
        added_kv_proj_dim=config.width if image else None,
    ).eval()

    def renamed(key: str) -> str:
        for ours, other in IMAGE_NAMES.items():
            if ours in key:
                return key.replace(ours, other)
        first = re.sub(r"^blocks\.\d+\.", "blocks.0.", key)
        number = re.match(r"blocks\.(\d+)\.", key)
        name = table[first]
        return name.replace("blocks.0.", f"blocks.{number[1]}.") if number else name

    theirs.load_state_dict({renamed(key): value for key, value in model.state_dict().items()})
    return theirs


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (replace(DENSE, text_len=512), (3, 5, 6, 10)),
        (replace(DENSE, text_len=512, patch=(1, 2, 1), layers=3), (1, 1, 2, 3)),
        (replace(DENSE, text_len=512, width=96, heads=3, out_channels=5), (2, 4, 4, 14)),
        (replace(DENSE, text_len=512, width=384, heads=3, layers=1), (1, 3, 6, 6)),
        (I2V, (3, 3, 6, 10)),
    ],
    ids=["odd", "uneven patch", "channels", "heads of 128", "i2v"],
)
def test_against_diffusers(
    config: ModelConfig, size: tuple[int, ...], fixtures: Path, seed: int
) -> None:
    batch, frames, height, width = size
    model = make(config, seed)
    theirs = in_diffusers(config, model, fixtures)
    x = torch.randn(batch, config.in_channels, frames, height, width)
    t = torch.randint(0, 1000, (batch,)).float()
    text = torch.randn(batch, 512, config.text_dim)
    image = torch.randn(batch, 257, 1280) if config.model_type == "i2v" else None
    with torch.no_grad():
        mine = model(x, t, model.condition(text, image))
        other = theirs(x, t, text, image, return_dict=False)[0]
    assert mine.shape == other.shape == (batch, config.out_channels, frames, height, width)
    assert (mine - other).abs().max() < 1e-5 * max(1.0, other.abs().max().item())


def test_image_branch_matters_and_is_optional(seed: int) -> None:
    model = make(I2V, seed)
    x, t = torch.randn(1, 8, 2, 4, 4), torch.tensor([300.0])
    text, image = torch.randn(1, 3, 7), torch.randn(1, 257, 1280)
    with torch.no_grad():
        plain = model(x, t, model.condition(text))
        seen = model(x, t, model.condition(text, image))
    assert error(seen, plain) > 1e-3
    assert {"img_emb.proj.4.weight", "blocks.1.cross_attn.norm_k_img.weight"} <= set(
        model.state_dict()
    )
    with pytest.raises(UserError, match="text only"):
        make(DENSE, 0).condition(text, image)


def test_modulation_is_per_frame(seed: int) -> None:
    """With frames on their own, each is what a one-frame video at its timestep would be."""
    model = make(DENSE, seed, torch.float64)
    x, t = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64), torch.rand(2, 3) * 999
    rule = chunk_causal(3, 1, WindowConfig(0, 0, 1), "relative")
    with torch.no_grad():
        text = model.condition(torch.randn(2, 3, 7, dtype=torch.float64))
        whole = model(x, t, text, rule)
        for f in range(3):
            one = model(x[:, :, f : f + 1], t[:, f], text)
            assert error(whole[:, :, f : f + 1], one) < 1e-13
        assert torch.equal(model(x, t[:, :1], text), model(x, t[:, 0], text))


def test_the_head_takes_the_unprojected_embedding(seed: int) -> None:
    model = make(DENSE, seed)
    x, t = torch.randn(1, 3, 1, 4, 4), torch.tensor([321.0])
    with torch.no_grad():
        text = model.condition(torch.randn(1, 3, 7))
        for block in model.blocks:  # blocks that ignore time leave the head's modulation alone
            block.modulation.zero_()
        model.time_projection[1].weight.zero_()
        early, late = model(x, t, text), model(x, t + 600, text)
    assert error(late, early) > 1e-3


def test_text_padding_is_attended(seed: int) -> None:
    model = make(DENSE, seed)
    text = torch.randn(1, 3, 7)
    padded = torch.cat([text, torch.zeros(1, 2, 7)], dim=1)
    longer = make(replace(DENSE, text_len=9), seed)
    longer.load_state_dict(model.state_dict())
    x, t = torch.randn(1, 3, 2, 4, 4), torch.tensor([500.0])
    with torch.no_grad():
        short = model(x, t, model.condition(text))
        assert torch.equal(short, model(x, t, model.condition(padded)))
        assert error(longer(x, t, longer.condition(text)), short) > 1e-4
    with pytest.raises(UserError, match="6 tokens"):
        model.condition(torch.randn(1, 6, 7))


def test_timesteps_stay_out_of_bfloat16(seed: int) -> None:
    exact = timestep_embedding(torch.tensor([937.5]), 64)
    assert exact.dtype == torch.float64
    assert (timestep_embedding(torch.tensor([936.0]), 64) - exact).abs().max() > 0.5
    model = make(DENSE, seed).bfloat16()
    text = model.condition(torch.randn(1, 3, 7))
    x = torch.randn(1, 3, 1, 4, 4)
    with pytest.raises(UserError, match="bfloat16"):
        model(x, torch.tensor([937.5], dtype=torch.bfloat16), text)
    near = model(x, torch.tensor([937.5]), text), model(x, torch.tensor([936.0]), text)
    assert not torch.equal(*near)


@pytest.mark.parametrize(
    ("x", "t", "says"),
    [
        ((1, 4, 2, 4, 4), (1,), "3, frames"),
        ((1, 3, 2, 4, 5), (1,), "patches"),
        ((3, 2, 4, 4), (1,), "fit"),
        ((2, 3, 2, 4, 4), (3,), "timesteps"),
        ((1, 3, 2, 4, 4), (1, 3), "timesteps"),
    ],
)
def test_sizes_that_do_not_fit(x: tuple[int, ...], t: tuple[int, ...], says: str) -> None:
    model = make(DENSE, 0)
    text = model.condition(torch.zeros(1, 1, 7))
    call = WanTransformer.forward.__wrapped__  # past the shape check of the tests
    with pytest.raises(UserError, match=says):
        call(model, torch.zeros(x), torch.zeros(t), text)


def test_rule_and_cache_must_fit(seed: int) -> None:
    model = make(DENSE, seed)
    x, t, text = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1), model.condition(torch.zeros(1, 1, 7))
    with pytest.raises(ValueError, match="rule"):
        model(x, t, text, chunk_causal(3, 1))
    cache = RollingCache(DENSE, WindowConfig(0, 1, 2), 1, 4)
    cache.begin([0, 1])
    with pytest.raises(ValueError, match="pieces"):
        model(x, t, text, memory=cache.layers())


@pytest.mark.parametrize("kind", BOTH)
def test_recomputation_gives_the_same_gradients(kind: str, seed: int) -> None:
    model = make(BOTH[kind], seed, torch.float64)
    x, t = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64), torch.rand(1, 4) * 999
    text, rule = torch.randn(1, 3, 7, dtype=torch.float64), teacher_forcing(2, 1)
    grads: list[list[torch.Tensor]] = []
    for again in (False, True):
        model.recompute = again
        out = model(x, t, model.condition(text), rule)
        grads.append(list(torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).norm() <= 1e-12 * theirs.norm()


def test_learned_positions(seed: int) -> None:
    """Space on any grid; the first frame of the video only, in copies and in rollouts alike."""
    config = replace(LATENT, learned_positions=True, latent_size=(4, 6))
    model = make(config, seed, torch.float64)
    assert model.position_embedding.space.shape == (1, 36, 2, 3)
    torch.nn.init.normal_(model.position_embedding.first)
    x, t = torch.randn(1, 3, 4, 4, 6, dtype=torch.float64), torch.rand(1, 4) * 999
    window = WindowConfig(1, 1, 1)
    with torch.no_grad():
        text = model.condition(torch.randn(1, 3, 7, dtype=torch.float64))
        whole = model(x, t, text, chunk_causal(4, 1, window, "relative"))
        cache = RollingCache(config, window, 1, 6, "fp64")
        for f in range(4):
            one = slice(f, f + 1)
            out = step(model, x[:, :, one], t[:, one], text, cache, [f], "relative")
            assert error(out, whole[:, :, one]) < 1e-12
        both = torch.cat([x, x], dim=2)
        twice = model(
            both, torch.cat([t, t], dim=1), text, teacher_forcing(4, 1, window, "relative")
        )
        assert error(twice[:, :, 4:], twice[:, :, :4]) < 1e-12
        model.position_embedding.first.zero_()
        assert error(model(x, t, text), whole) > 1e-3
        other = torch.randn(1, 3, 1, 8, 10, dtype=torch.float64)
        assert model(other, t[:, 0], text).shape == other.shape
    plain: dict[str, Any] = make(LATENT, seed).state_dict()
    extra = set(model.state_dict()) - set(plain)
    assert extra == {"position_embedding.space", "position_embedding.first"}
    assert (
        mini().learned_positions and WanTransformer(mini()).position_embedding.space.shape[2] == 3
    )


def test_pieces_are_kept_but_not_saved(seed: int) -> None:
    model = make(DENSE, seed)
    rule = chunk_causal(4, 2)
    with torch.inference_mode():
        first = model.pieces(rule, 2, 2, CPU)
    assert model.pieces(chunk_causal(4, 2), 2, 2, CPU) is first
    for frames in range(5, 9):
        model.pieces(chunk_causal(frames, 1), 2, 2, CPU)
    assert model.pieces(rule, 2, 2, CPU) is not first
    assert set(copy.deepcopy(model).state_dict()) == set(make(DENSE, seed).state_dict())
    x, text = torch.randn(1, 3, 4, 4, 4), model.condition(torch.zeros(1, 1, 7))
    with torch.inference_mode():
        model(x, torch.zeros(1), text, rule)
    model(x, torch.zeros(1), text, rule).sum().backward()


def test_shapes_without_memory() -> None:
    config = wan_14b(latent=True)
    model = meta_model(config)
    attention = {
        name.removeprefix("blocks.39.self_attn."): tuple(value.shape)
        for name, value in model.named_parameters()
        if name.startswith("blocks.39.self_attn.") and value.ndim == 2
    }
    assert attention == {
        "kv_down.weight": (192, 5120),
        "k_rope.weight": (32, 5120),
        "q_down.weight": (768, 5120),
        "q_up.weight": (40 * 96, 768),
        "q_rope.weight": (40 * 32, 768),
        "k_up.weight": (40 * 96, 192),
        "v_up.weight": (5120, 192),
        "o.weight": (5120, 5120),
    }
    assert all(value.is_meta for value in model.parameters())
    assert replace(config, latent=None) == wan_14b()


def test_shapes_come_without_the_compiler() -> None:
    """Importing it takes longer than all else that opening a small model does."""
    code = (
        "import sys; from mla_study.config import mini;"
        "from mla_study.model.transformer import meta_model;"
        "meta_model(mini(latent=True)); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
