"""FLOPs of the whole model against torch's own count of the running model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model.tiny import BOTH, DENSE, LATENT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mla_study.config import ModelConfig, WindowConfig, wan_1_3b
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.model_cost import (
    WINDOWS,
    chunk_cost,
    fps_bound,
    frame_tokens,
    passes_of,
    prompt_cost,
    variant_of,
)
from mla_study.kernels.latent_attention.cost import Calibration, Rates
from mla_study.model.cache import RollingCache
from mla_study.model.transformer import WanTransformer

TEN = "1 + 6 + chunk"


def counted(
    config: ModelConfig,
    window: WindowConfig,
    size: tuple[int, int],
    batch: int,
    form: str,
    device: str = "cpu",
) -> tuple[int, int]:
    """FLOPs that torch counts of the conditioning, and of one pass over a full cache."""
    with torch.device(device):
        model = WanTransformer(config).eval()
        x = torch.zeros(batch, config.in_channels, window.chunk, *size)
        text = torch.zeros(batch, config.text_len, config.text_dim)
        t = torch.zeros(batch)
    for block in model.blocks:
        if config.latent is not None:
            block.self_attn.form = form
    place = torch.device(device)
    cache = RollingCache(config, window, batch, frame_tokens(config, size), "fp32", place)
    chunks = -(-window.key_frames // window.chunk) + 1
    for index in range(chunks):
        ids = range(index * window.chunk, (index + 1) * window.chunk)
        held = cache.begin(ids)
    assert len(held) == window.key_frames
    grid = (size[0] // config.patch[1], size[1] // config.patch[2])
    pieces = model.step_pieces(ids, held, "relative", *grid, place)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as prompt:
            told = model.condition(text)
        with FlopCounterMode(display=False) as step:
            model(x, t, told, pieces=pieces, memory=cache.layers())
    return prompt.get_total_flops(), step.get_total_flops()


def augmented(config: ModelConfig, keys: int, batch: int) -> int:
    """What the one GEMM of [c | k_rope] W_aug does beside the up projections proper."""
    latent = config.latent
    assert latent is not None
    whole = (latent.d_c + latent.d_rope) * config.heads * 2 * config.head_dim
    proper = latent.d_c * config.heads * (latent.d_nope + config.head_dim)
    return 2 * batch * keys * (whole - proper) * config.layers


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window", [WindowConfig(1, 2, 2), WindowConfig(0, 3, 1)])
@pytest.mark.parametrize("form", ["dense", "reconstruct", "absorbed"])
def test_tiny_models_to_the_flop(form: str, window: WindowConfig, batch: int) -> None:
    config = DENSE if form == "dense" else LATENT
    size = (6, 10)
    prompt, step = counted(config, window, size, batch, form)
    told = chunk_cost(
        config, window, form, batch=batch, size=size, passes=1, value_is_key=True, dtype="fp32"
    )
    assert step == told.flops
    assert prompt == prompt_cost(config, batch).flops


@pytest.mark.parametrize("form", ["dense", "reconstruct", "absorbed"])
def test_a_real_block_to_the_flop(form: str) -> None:
    config = replace(wan_1_3b(form != "dense"), layers=1)
    window = WINDOWS[TEN]
    _, step = counted(config, window, config.latent_size, 1, form, "meta")
    told = chunk_cost(config, window, form, passes=1, value_is_key=True)
    extra = augmented(config, window.key_frames * 1560, 1) if form == "reconstruct" else 0
    assert step == told.flops + extra
    assert extra < 0.01 * step


@pytest.mark.parametrize(
    ("window", "form", "tflop", "fps"),
    [
        ("21 frames", "dense", 202.0, 47),
        (TEN, "dense", 128.0, 75),
        (TEN, "reconstruct", 124.3, 77),
        (TEN, "absorbed", 164.7, 58),
    ],
)
def test_a_chunk_of_wan(window: str, form: str, tflop: float, fps: int) -> None:
    config = wan_1_3b(form != "dense")
    cost = chunk_cost(config, WINDOWS[window], form)
    assert cost.flops / 1e12 == pytest.approx(tflop, abs=0.05)
    # an H100's matrix products, measured: 798 TF/s
    assert round(fps_bound(config, WINDOWS[window], cost, 798e12)) == fps


def test_window_and_layout_of_the_speed_up() -> None:
    def flops(window: str, form: str) -> float:
        return chunk_cost(wan_1_3b(form != "dense"), WINDOWS[window], form).flops

    assert flops("21 frames", "dense") / flops(TEN, "dense") == pytest.approx(1.578, abs=1e-3)
    assert flops(TEN, "dense") / flops(TEN, "reconstruct") == pytest.approx(1.030, abs=1e-3)
    assert flops(TEN, "absorbed") / flops(TEN, "reconstruct") == pytest.approx(1.32, abs=5e-3)


def test_parts_add_up_and_batch_shares_weights() -> None:
    config = wan_1_3b(True)
    cost = chunk_cost(config)
    assert cost.passes == passes_of(config) == 5
    assert sum(cost.parts.values()) == cost.flops
    twice = chunk_cost(config, batch=2)
    assert twice.flops == 2 * cost.flops
    assert cost.bytes < twice.bytes < 2 * cost.bytes
    assert chunk_cost(config, dtype="fp32").bytes == 2 * cost.bytes


def test_seconds_are_a_roofline() -> None:
    rate, config = 798e12, wan_1_3b(True)
    infinite = Calibration("x", "bf16", 0, rate, float("inf"), Rates(rate), Rates(rate))
    cost = chunk_cost(config)
    assert cost.seconds(infinite, "reconstruct") == pytest.approx(cost.flops / rate)
    slow = replace(infinite, bandwidth=1e9, gemm=1e30, reconstruct=Rates(1e30))
    assert cost.seconds(slow, "reconstruct") == pytest.approx(cost.bytes / 1e9)
    called = replace(infinite, reconstruct=Rates(rate, overhead=1.0))
    assert cost.seconds(called, "reconstruct") == pytest.approx(5 * 31, rel=1e-2)


@pytest.mark.parametrize("name", BOTH)
def test_what_does_not_fit_is_refused(name: str) -> None:
    config = BOTH[name]
    wrong = "absorbed" if name == "dense" else "dense"
    for form in (wrong, "flash"):
        with pytest.raises(UserError):
            variant_of(config, form)
    with pytest.raises(UserError, match="dtype"):
        chunk_cost(config, dtype="int3")
    with pytest.raises(UserError, match="batch"):
        chunk_cost(config, batch=0)
