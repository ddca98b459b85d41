"""Clips of a bidirectional model, and the codec as a decoder of a stream."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mla_study.config import mini
from mla_study.errors import UserError
from mla_study.rollout.stream import random_model
from mla_study.world.codec import fit_codec
from mla_study.world.scenes import World
from mla_study.world.serving import WorldDecoder, codec_for, sample_clips, visible_scale
from mla_study.world.shipped import world_codec
from mla_study.world.text import CaptionEncoder

CAPTION = "slow blue disc moving left top center on night"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_clip_is_a_guided_euler_walk_from_the_noise(seed: int) -> None:
    config = replace(mini(), layers=2)
    model = random_model(config, seed % 1000).double()
    context = CaptionEncoder.of(config)([CAPTION])
    noise = normal(seed, 2, 16, 5, 6, 6).double()
    made = sample_clips(model, context, noise, steps=3, guidance=1.7)

    x, batch = noise.clone(), context.double().expand(2, -1, -1)
    told, untold = model.condition(batch), model.condition(0 * batch)
    levels = [3.0 * u / (1 + 2 * u) for u in (1, 2 / 3, 1 / 3, 0)]  # shift 3
    with torch.no_grad():
        for high, low in itertools.pairwise(levels):
            t = torch.full((2,), 1000 * high, dtype=torch.float64)
            one, none = model(x, t, told), model(x, t, untold)
            x = x + (low - high) * (none + 1.7 * (one - none))
    torch.testing.assert_close(made, x, atol=1e-4, rtol=1e-4)
    assert made.dtype == torch.float64 and not torch.allclose(made[0], made[1])


def test_prompts_fit_the_batch() -> None:
    config = replace(mini(), layers=1)
    context = CaptionEncoder.of(config)([CAPTION, CAPTION])
    with pytest.raises(UserError, match="2 prompts do not fit a batch of 3"):
        sample_clips(random_model(config), context, torch.zeros(3, 16, 2, 6, 6), 1)


def test_pixels_become_squares_chunk_by_chunk(seed: int) -> None:
    codec = fit_codec(World(), clips=8)
    latents = normal(seed, 2, 16, 5, 3, 7)
    decoder = WorldDecoder(codec, 3)
    whole = decoder.decode(latents)
    parts = [decoder.decode(latents[:, :, i : i + 2]) for i in (0, 2, 4)]
    assert whole.shape == (2, 5, 36, 84, 3) and whole.dtype == np.uint8
    assert np.array_equal(np.concatenate(parts, 1), whole)
    small = WorldDecoder(codec, 1).decode(latents)
    assert all(np.array_equal(whole[:, :, i::3, j::3], small) for i in range(3) for j in range(3))
    meant = (codec.decode(latents).clamp(-1, 1) + 1) * 127.5
    assert np.abs(small - meant.permute(0, 2, 3, 4, 1).numpy()).max() <= 0.5 + 1e-3


def test_frames_are_large_enough_to_see() -> None:
    for size, scale in (((6, 6), 10), ((16, 16), 4), ((7, 30), 9), ((60, 104), 1), ((100, 61), 1)):
        assert visible_scale(size) == scale
        assert 4 * min(size) * scale >= 240 > 4 * min(size) * (scale - 1)


def test_a_codec_beside_the_weights_wins(tmp_path: Path) -> None:
    config, mine = mini(), fit_codec(World(), clips=4, seed=9)
    shipped = world_codec(6)
    for checkpoint in (None, str(tmp_path), "hf://someone/model"):
        assert torch.equal(codec_for(config, checkpoint).basis, shipped.basis)
    mine.save(tmp_path / "codec.safetensors")
    for checkpoint in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.equal(codec_for(config, str(checkpoint)).basis, mine.basis)
    fit_codec(World(), clips=4, channels=7).save(tmp_path / "codec.safetensors")
    with pytest.raises(UserError, match=r"codec\.safetensors gives 7 channels .* has 16"):
        codec_for(config, str(tmp_path))
