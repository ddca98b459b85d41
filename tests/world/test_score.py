"""Scores: perfect for the caption's own clip, and what each kind of mistake costs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mla_study.errors import UserError
from mla_study.world.grammar import SLOTS
from mla_study.world.render import render
from mla_study.world.scenes import Scenes, World, sample_scenes
from mla_study.world.score import score

WORLD = World()


def test_a_clip_of_its_own_caption_is_perfect(seed: int) -> None:
    scenes = sample_scenes(WORLD, 24, seed)
    for truth in (None, scenes):
        made = score(render(scenes), scenes.captions, truth=truth)
        assert made.all_correct.all() and made.has_sprite.all()
        # an edge along the middle of pixels falls to either side, which costs a thin cross most
        assert made.iou.min() > 0.7 and made.iou.mean() > 0.95
        assert made.velocity_error.max() < 0.1
        assert made.phase_error.max() < 0.3 and made.colour_kept.min() == 1


@pytest.mark.parametrize("slot", list(SLOTS))
def test_a_caption_that_differs_in_one_word_is_wrong_there_alone(slot: str, seed: int) -> None:
    scenes = sample_scenes(WORLD, 4, seed)
    words = SLOTS[slot]
    others = [
        replace(c, **{slot: words[(words.index(getattr(c, slot)) + 1) % len(words)]})
        for c in scenes.captions
    ]
    made = score(render(scenes), others)
    for name, correct in made.correct.items():
        assert bool(correct.any()) == bool(correct.all()) == (name != slot)
    assert not made.all_correct.any()
    if slot in ("row", "column"):
        assert made.phase_error.min() > 4 and made.iou.max() < 0.4
    if slot == "speed":
        torch.testing.assert_close(made.velocity_error, torch.ones(4), atol=0.1, rtol=0)


def test_a_drift_shows_as_phase_error_that_grows(seed: int) -> None:
    slow = World(step=0.75)
    scenes = sample_scenes(
        slow, 4, seed, captions=["slow red disc moving up top center on night"] * 4
    )
    video = render(scenes, 12)
    made = score(video, scenes.captions, WORLD)
    assert made.correct["speed"].all()
    torch.testing.assert_close(made.velocity_error, torch.full((4,), 0.25), atol=0.05, rtol=0)
    torch.testing.assert_close(made.phase_error[:, -1], torch.full((4,), 2.75), atol=0.3, rtol=0)
    assert (made.phase_error.diff(dim=1) > 0).all()


def test_an_empty_clip_scores_nothing() -> None:
    made = score(torch.zeros(1, 3, 4, 24, 24), "slow red disc moving up top center on night")
    clip = made.clip(0)
    assert not clip["has_sprite"] and not clip["all_correct"] and clip["iou"] == 0
    assert clip["velocity_error"] is None and clip["phase_error_last"] is None
    assert clip["colour_kept"] == 0 and math.isnan(made.summary()["velocity_error"])


def test_the_start_within_the_cell_costs_nothing_and_beyond_it_does(seed: int) -> None:
    scenes = sample_scenes(WORLD, 8, seed)
    far = Scenes(WORLD, scenes.captions, scenes.start + 3.6)
    near, off = (score(render(s), scenes.captions).phase_error.mean(1) for s in (scenes, far))
    assert near.max() < 0.2 and off.min() > 1.5


def test_summary_is_the_mean_over_clips(seed: int) -> None:
    scenes = sample_scenes(WORLD, 4, seed)
    video = render(scenes)
    video[:2] = -1
    found = score(video, scenes.captions).summary()
    assert found["all_correct"] == 0.5 == found["has_sprite"] == found["colour_kept"]
    assert 0.45 < found["iou"] <= 0.5 and found["velocity_error"] < 0.1


def test_captions_must_fit_the_clips(seed: int) -> None:
    scenes = sample_scenes(WORLD, 3, seed)
    with pytest.raises(UserError, match="2 captions do not fit 3"):
        score(render(scenes), scenes.captions[:2])
    assert len(score(render(scenes), str(scenes.captions[0])).all_correct) == 3
