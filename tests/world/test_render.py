"""Scenes and their pixels: against a renderer of another kind, on the torus, and in time."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from mla_study.errors import UserError
from mla_study.world.grammar import BACKGROUNDS, COLOURS, SHAPES, sample_captions
from mla_study.world.render import background, coverage, masks, palette, render
from mla_study.world.scenes import JITTER, World, centres, sample_scenes, velocities

EXAMPLE = "fast red square moving right middle center on stripes"


def inside(shape: str, r: float, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape about 0; y grows downwards."""
    if shape == "disc":
        return y**2 + x**2 < r**2
    if shape == "square":
        return np.maximum(abs(y), abs(x)) < 0.9 * r
    if shape == "cross":
        long, wide = 1.1 * r, 0.38 * r
        return (abs(y) < long) & (abs(x) < wide) | (abs(x) < long) & (abs(y) < wide)
    height = (y + 1.15 * r) / (2 * r)
    return (y < 0.85 * r) & (abs(x) < 1.15 * r * height)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [24, 32, 64])
def test_coverage_is_the_area_of_the_shape_in_each_pixel(shape: str, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    world, fine = World(size), 16
    centre = rng.uniform(0, size, 2)
    line = (np.arange(size * fine) + 0.5) / fine
    y, x = ((line - c + size / 2) % size - size / 2 for c in centre)
    hits = inside(shape, world.radius, y[:, None], x[None, :])
    area = hits.reshape(size, fine, size, fine).mean((1, 3))
    drawn = coverage(shape, world, torch.tensor(centre, dtype=torch.float32)).numpy()
    assert abs(drawn - area).max() < 0.35  # at corners, which the distance rounds
    assert drawn.sum() == pytest.approx(area.sum(), rel=0.05)


def test_sprites_start_in_their_cells_and_move_as_told(seed: int) -> None:
    world = World(24, 12)
    scenes = sample_scenes(world, 200, seed)
    off = scenes.start - centres(world, scenes.captions)
    assert off.abs().max() <= JITTER * world.cell and off.abs().max() > 0.8 * JITTER * world.cell
    steps = scenes.positions().diff(dim=1)
    steps = (steps + 12).remainder(24) - 12
    torch.testing.assert_close(
        steps, velocities(world, scenes.captions)[:, None].expand_as(steps), atol=1e-4, rtol=0
    )
    assert set(velocities(world, scenes.captions).norm(dim=1).tolist()) == {1.0, 2.0}


def test_example_moves_two_pixels_to_the_right() -> None:
    scenes = sample_scenes(World(), 1, 0, captions=[EXAMPLE])
    assert velocities(scenes.world, scenes.captions).tolist() == [[0.0, 2.0]]
    clip = (render(scenes)[0] + 1) / 2
    red = (clip - palette()[COLOURS.index("red")][:, None, None, None]).abs().amax(0) < 0.02
    shown = [frame.nonzero().float().mean(0) for frame in red]
    assert abs(float(shown[1][1] - shown[0][1]) - 2) < 0.2
    assert abs(float(shown[1][0] - shown[0][0])) < 0.2
    assert red[0].sum() > 25


def test_a_pixel_is_background_or_sprite_or_between(seed: int) -> None:
    world = World(32, 5)
    scenes = sample_scenes(world, 12, seed)
    video = (render(scenes) + 1) / 2
    alpha = masks(scenes, scenes.positions())[:, None]
    colour = palette()[scenes.indices("colour")][:, :, None, None, None]
    for clip, caption in enumerate(scenes.captions):
        phase = torch.arange(5.0) if caption.background == "pan" else torch.zeros(5)
        behind = background(caption.background, world, phase).transpose(0, 1)
        mixed = behind + alpha[clip] * (colour[clip] - behind)
        torch.testing.assert_close(video[clip], mixed, atol=1e-5, rtol=0)
    assert video.min() >= 0 and video.max() <= 1


def test_only_pan_moves(seed: int) -> None:
    world = World(24, 3)
    for name in BACKGROUNDS:
        told = [replace(c, background=name) for c in sample_captions(4, seed)]
        scenes = sample_scenes(world, 4, seed, captions=told)
        clear = (masks(scenes, scenes.positions()) == 0).all(1)[:, None].expand(-1, 3, -1, -1)
        video = render(scenes)
        still = torch.equal(video[:, :, 0][clear], video[:, :, 1][clear])
        assert still == (name != "pan")


def test_pan_is_a_roll_to_the_left() -> None:
    world = World(24)
    moved = background("pan", world, torch.tensor([0.0, 1.0, 12.0]))
    torch.testing.assert_close(moved[1], moved[0].roll(-1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[2], moved[0], atol=1e-5, rtol=0)


def test_a_clip_goes_on_where_it_ended_and_comes_back_on_the_torus(seed: int) -> None:
    scenes = sample_scenes(World(), 6, seed)
    whole = render(scenes, 48)
    torch.testing.assert_close(whole[:, :, 20:30], render(scenes, 10, 20), atol=2e-5, rtol=0)
    torch.testing.assert_close(whole[:, :, 24:], whole[:, :, :24], atol=1e-4, rtol=0)


def test_a_seed_gives_the_same_clips_and_another_step_others(seed: int) -> None:
    one, two = (render(sample_scenes(World(), 4, seed, 3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, render(sample_scenes(World(), 4, seed, 4)))


@pytest.mark.parametrize("size", [16, 25, 64])
@pytest.mark.parametrize("frames", [1, 7])
def test_sizes_and_lengths_are_free(size: int, frames: int, seed: int) -> None:
    clip = render(sample_scenes(World(size, frames), 2, seed))
    assert clip.shape == (2, 3, frames, size, size) and clip.dtype == torch.float32


def test_worlds_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="too small"):
        World(8)
    with pytest.raises(UserError, match="0 frames"):
        World(24, 0)
    with pytest.raises(UserError, match="step of 9"):
        World(24, step=9)
    with pytest.raises(UserError, match="1 captions do not fit 2"):
        sample_scenes(World(), 2, captions=[EXAMPLE])


def test_rendering_is_a_small_part_of_a_training_step(seed: int) -> None:
    spent = []
    for step in range(9):
        before = time.process_time()
        render(sample_scenes(World(), 16, seed, step))
        spent.append(time.process_time() - before)
    # 1.5 ms of one thread, where a step takes 170; the shape checks of the tests are in it
    assert statistics.median(spent) < 0.02
