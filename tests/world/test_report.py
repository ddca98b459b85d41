"""What was read, in words: the verdict names the wrong words and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_study.world.grammar import SLOTS
from mla_study.world.parser import parse
from mla_study.world.render import background, render
from mla_study.world.report import verdict_text
from mla_study.world.scenes import World, sample_scenes


def test_a_verdict_names_the_wrong_words_alone(seed: int) -> None:
    scenes = sample_scenes(World(), 1, seed)
    (facts,), (caption,) = parse(render(scenes)).facts, scenes.captions
    assert verdict_text(facts, caption) == "all correct"
    for slot, words in SLOTS.items():
        other = words[(words.index(getattr(caption, slot)) + 1) % len(words)]
        assert verdict_text(facts, replace(caption, **{slot: other})) == f"{slot} wrong"
    other = replace(caption, speed="slow" if caption.speed == "fast" else "fast",
                    shape="disc" if caption.shape == "cross" else "cross")  # fmt: skip
    assert verdict_text(facts, other) == "speed, shape wrong"


@pytest.mark.parametrize(("name", "told"), [("stripes", ""), ("night", ", background wrong")])
def test_where_there_is_no_sprite_it_is_said(name: str, told: str) -> None:
    caption = replace(sample_scenes(World(), 1, 1).captions[0], background="stripes")
    empty = background(name, World(), torch.zeros(6)).permute(1, 0, 2, 3)[None]
    assert verdict_text(parse(empty).facts[0], caption) == f"no sprite{told}"
