"""The parser: right at the study's size on fresh seeds, on damaged clips too; never a guess."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mla_study.errors import UserError
from mla_study.world.backdrop import find_backdrops
from mla_study.world.check import CONDITIONS, EMPTY, blurred, check_condition, damage, wilson
from mla_study.world.codec import fit_codec
from mla_study.world.fitting import apart
from mla_study.world.grammar import BACKGROUNDS
from mla_study.world.parser import as_pixels, longest_gap, parse
from mla_study.world.render import background, masks, palette, render
from mla_study.world.scenes import Scenes, World, sample_scenes, velocities

WORLD = World()


def right(video: Tensor, scenes: Scenes) -> float:
    facts = parse(video, scenes.world, signed=True).facts
    return sum(f.caption == c for f, c in zip(facts, scenes.captions, strict=True)) / len(scenes)


def test_clean_clips_are_read_right_at_the_size_of_the_study(seed: int) -> None:
    scenes = sample_scenes(WORLD, 192, seed)
    video = render(scenes)
    assert right(video, scenes) >= 0.98
    read = parse(video)
    assert bool(read.seen.all())
    off = apart(read.where - scenes.positions(), 24).norm(dim=-1)
    assert off.mean() < 0.05 and off.max() < 0.3


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("noise_0.05", 0.98),
        ("noise_0.1", 0.95),
        ("codec", 0.98),
        ("blur_0.7", 0.98),
        ("blur_1", 0.9),
    ],
)
def test_damaged_clips_are_read_right(name: str, least: float, seed: int) -> None:
    scenes = sample_scenes(WORLD, 64, seed)
    act = damage(name, fit_codec(WORLD, clips=64, seed=seed))
    assert right(act(render(scenes), torch.Generator().manual_seed(seed)), scenes) >= least


def test_some_frames_are_read_by_their_numbers(seed: int) -> None:
    scenes = sample_scenes(WORLD, 96, seed)
    numbers = [0, 2, 4, 7, 9, 11]
    some = render(scenes)[:, :, numbers]
    read = parse(some, numbers=numbers)
    assert [fact.caption for fact in read.facts] == list(scenes.captions)
    velocity = torch.tensor([fact.velocity for fact in read.facts])
    assert (velocity - velocities(WORLD, scenes.captions)).abs().max() < 0.1
    # taken for neighbours, the same frames show another speed
    assert right(some, scenes) == 0
    # all frames, numbered, are the clip
    assert parse(render(scenes), numbers=range(12)).facts == parse(render(scenes)).facts


@pytest.mark.parametrize(
    "numbers", [[0, 2], [1, 2, 3], [0, 2, 2], [0, 4, 2], [0, 1, 2 + longest_gap(WORLD)]]
)
def test_numbers_that_are_none_are_told(numbers: list[int]) -> None:
    with pytest.raises(UserError, match="do not number 3 frames"):
        parse(torch.zeros(1, 3, 3, 24, 24), numbers=numbers)


def test_over_the_longest_gap_any_pace_of_the_world_is_told() -> None:
    last = longest_gap(WORLD)
    scenes = sample_scenes(WORLD, 32, 1)
    numbers = [0, last, 2 * last, 3 * last]
    read = parse(render(scenes, 3 * last + 1)[:, :, numbers], numbers=numbers)
    assert [fact.caption for fact in read.facts] == list(scenes.captions)


@pytest.mark.parametrize("size", [32, 64])
def test_larger_worlds_are_read_right(size: int, seed: int) -> None:
    scenes = sample_scenes(World(size, 6), 24, seed)
    noisy = render(scenes)
    noisy = noisy + 0.1 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed))
    assert right(noisy, scenes) >= 0.95


@pytest.mark.parametrize("name", EMPTY)
def test_no_sprite_is_found_where_there_is_none(name: str, seed: int) -> None:
    made = check_condition(WORLD, fit_codec(WORLD, clips=8), name, 24, seed)
    assert made["sprite_found"] == 0 and made["accuracy"] == 1
    assert math.isnan(made["colour"])


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_flat_video_shows_nothing(level: float) -> None:
    facts = parse(torch.full((1, 3, 6, 24, 24), level), signed=True).facts[0]
    assert not facts.has_sprite and facts.background is None and facts.caption is None


def test_smooth_noise_shows_no_sprite(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn((24, 3, 12, 6, 6), generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=(12, 24, 24), mode="trilinear")
    found = [fact.has_sprite for fact in parse(smooth, signed=True).facts]
    assert sum(found) <= 1


def test_backgrounds_are_told_without_a_sprite() -> None:
    phase = torch.arange(12.0)
    shown = [background(b, WORLD, phase if b == "pan" else 0 * phase) for b in BACKGROUNDS]
    read = parse(torch.stack(shown).permute(0, 1, 3, 4, 2), WORLD)
    assert [fact.background for fact in read.facts] == list(BACKGROUNDS)
    assert not any(fact.has_sprite for fact in read.facts)


def test_a_background_must_move_as_its_name_says() -> None:
    phase = torch.arange(12.0)
    wrong = [background(b, WORLD, 0 * phase if b == "pan" else phase) for b in ("pan", "stripes")]
    read = parse(torch.stack(wrong).permute(0, 1, 3, 4, 2), WORLD)
    assert [fact.background for fact in read.facts] == [None, None]
    assert read.facts[1].background_speed == pytest.approx(1.0, abs=0.05)


def test_a_sprite_that_stands_still_has_no_speed_and_no_direction(seed: int) -> None:
    scenes = sample_scenes(WORLD, 16, seed)
    still = render(scenes)[:, :, :1].expand(-1, -1, 12, -1, -1)
    for fact, caption in zip(parse(still).facts, scenes.captions, strict=True):
        assert (fact.speed, fact.direction) == (None, None)
        assert (fact.colour, fact.shape) == (caption.colour, caption.shape)


def test_a_trembling_faded_sprite_is_read_right(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(WORLD, 48, seed)
    where = scenes.positions() + 0.4 * torch.randn((48, 12, 2), generator=rng)
    hues = palette()[scenes.indices("colour")][:, :, None, None, None]
    bare = find_backdrops(WORLD, as_pixels(render(scenes))).pixels.transpose(1, 2)
    video = bare + 0.85 * masks(scenes, where)[:, None] * (hues - bare)
    video = video + 0.05 * torch.randn(video.shape, generator=rng)
    assert right(2 * video - 1, scenes) >= 0.9


def test_frames_in_disorder_have_no_velocity(seed: int) -> None:
    scenes = sample_scenes(WORLD, 16, seed)
    order = [0, 7, 2, 11, 4, 9, 1, 6, 10, 3, 8, 5]
    for fact in parse(render(scenes)[:, :, order]).facts:
        assert fact.velocity is None or fact.caption is None


def test_a_sprite_that_fades_away_is_gone(seed: int) -> None:
    scenes = sample_scenes(WORLD, 8, seed)
    video = render(scenes)
    bare = parse(video).mask[:, None]
    video[:, :, 5:] = torch.where(bare, video.new_tensor(-0.5), video)[:, :, 5:]
    read = parse(video)
    assert bool(read.seen[:, :5].all())
    told = [fact.background != "night" for fact in read.facts]
    assert not read.seen[torch.tensor(told)][:, 5:].any()


def test_a_ghost_does_not_take_the_sprite_over(seed: int) -> None:
    scenes = sample_scenes(WORLD, 12, seed)
    video = render(scenes)
    behind = parse(video)
    ghost = video.roll((12, 12), (3, 4))
    mask = behind.mask.roll((12, 12), (2, 3))[:, None]
    mixed = torch.where(mask, 0.15 * video + 0.85 * ghost, video)
    mixed[:, :, :2] = video[:, :, :2]
    off = apart(parse(mixed).where - scenes.positions(), 24).norm(dim=-1)
    assert off.max() < 3


def test_every_layout_and_range_is_the_same_video(seed: int) -> None:
    scenes = sample_scenes(WORLD, 3, seed)
    signed = render(scenes)
    last = signed.permute(0, 2, 3, 4, 1)
    levels = ((last + 1) * 127.5).round().to(torch.uint8)
    for video in (signed, last, (signed + 1) / 2, ((last + 1) / 2).numpy(), levels, levels.numpy()):
        read = parse(video)
        assert [fact.caption for fact in read.facts] == list(scenes.captions)
    torch.testing.assert_close(as_pixels(signed[0]), as_pixels(signed[:1]))
    assert parse(levels[0]).facts[0].caption == scenes.captions[0]


def test_what_is_no_video_is_refused() -> None:
    with pytest.raises(UserError, match=r"shape \[4, 4\]"):
        parse(torch.zeros(4, 4))
    with pytest.raises(UserError, match="cannot be read"):
        parse(np.zeros((0, 2, 24, 24, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="24 x 32 pixels do not fit"):
        parse(np.zeros((1, 2, 24, 32, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="a world that is 32 x 32"):
        parse(np.zeros((1, 2, 24, 24, 3), dtype=np.uint8), World(32))
    with pytest.raises(UserError, match="NaN"):
        parse(torch.full((1, 3, 2, 24, 24), math.nan))


def test_one_frame_says_where_but_not_how_fast(seed: int) -> None:
    scenes = sample_scenes(WORLD, 8, seed)
    for fact, caption in zip(parse(render(scenes, 1)).facts, scenes.captions, strict=True):
        told = caption.colour, caption.shape, caption.row, caption.column
        assert (fact.colour, fact.shape, fact.row, fact.column) == told
        assert fact.velocity is None and fact.speed is None


def test_a_long_rollout_is_read_to_its_end(seed: int) -> None:
    scenes = sample_scenes(WORLD, 2, seed)
    read = parse(render(scenes, 240))
    off = apart(read.where - scenes.positions(240), 24).norm(dim=-1)
    assert off.max() < 0.3 and [f.caption for f in read.facts] == list(scenes.captions)


def test_parsing_alone_or_in_a_batch_is_the_same(seed: int) -> None:
    video = render(sample_scenes(WORLD, 5, seed))
    whole, alone = parse(video), parse(video[3:4])
    assert whole.facts[3].caption == alone.facts[0].caption
    torch.testing.assert_close(whole.where[3:4], alone.where)


def test_blur_keeps_the_mean_and_a_constant(seed: int) -> None:
    video = render(sample_scenes(WORLD, 1, seed))
    torch.testing.assert_close(blurred(video, 1.0).mean(), video.mean())
    torch.testing.assert_close(blurred(video, 0.01), video, atol=1e-2, rtol=0)


def test_conditions_are_known_and_the_bound_is_wilsons() -> None:
    codec = fit_codec(WORLD, clips=4)
    assert all(callable(damage(name, codec)) for name in (*CONDITIONS, *EMPTY))
    with pytest.raises(UserError, match="no condition 'fog'"):
        damage("fog", codec)
    assert wilson(1.0, 512) == pytest.approx(0.99255, abs=1e-5)
    assert wilson(0.5, 100) == pytest.approx(0.40383, abs=1e-5)
