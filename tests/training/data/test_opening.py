import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.clips import write_video

from mla_study.config import mini, preset
from mla_study.errors import UserError
from mla_study.rollout.prompts import WordHash
from mla_study.training.batch import Data
from mla_study.training.data.opening import Prompts, open_data
from mla_study.training.data.order import place
from mla_study.world.grammar import sample_captions
from mla_study.world.text import CaptionEncoder


@pytest.fixture
def captions() -> list[str]:
    return [str(caption) for caption in sample_captions(5, 2)]


@pytest.fixture
def folder(tmp_path: Path, captions: list[str]) -> Path:
    for number, caption in enumerate(captions):
        write_video(tmp_path / f"{number}.mp4", size=(30, 36), offset=7 * number)
        (tmp_path / f"{number}.txt").write_text(caption)
    return tmp_path


def assert_same_for_any_split(data: Data, seed: int) -> None:
    count = 23
    whole = data.batch(range(count))
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    for start in range(0, count, 7):
        part = data.batch(numbers[start : start + 7])
        picked = numbers[start : start + 7]
        assert part.captions == tuple(whole.captions[n] for n in picked)
        assert torch.equal(part.context, whole.context[picked])
        assert (part.latents is None) == (whole.latents is None)
        if part.latents is not None and whole.latents is not None:
            torch.testing.assert_close(part.latents, whole.latents[picked], atol=1e-5, rtol=0)
    assert data.null.shape == (1, *whole.context.shape[1:])
    assert whole.context.dtype == data.null.dtype == torch.float32


def test_an_epoch_holds_each_item_once(seed: int) -> None:
    count = 13
    epochs = [[place(n + e * count, count, seed) for n in range(count)] for e in range(6)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[0] != [place(n, count, seed + 1) for n in range(count)]


def test_samples_follow_from_their_number(folder: Path, captions: list[str], seed: int) -> None:
    config = mini()
    data = open_data(str(folder), config, seed, frames=6)
    again = open_data(str(folder), config, seed, frames=6)
    assert_same_for_any_split(data, seed)
    assert data.facts() == again.facts()
    assert data.facts() != open_data(str(folder), config, seed, frames=5).facts()
    batch = data.batch(range(5))
    assert batch.latents is not None and batch.latents.shape == (5, 16, 6, 6, 6)
    assert sorted(batch.captions) == sorted(captions)
    assert torch.equal(batch.context, CaptionEncoder.of(config)(batch.captions))
    path = folder / "prompts.list"
    path.write_text("\n".join(captions))
    prompts = open_data(str(path), config, seed, frames=6)
    assert_same_for_any_split(prompts, seed)
    # a model of the world reads prompts by the world's own encoder
    told = prompts.batch(range(5))
    assert torch.equal(told.context, CaptionEncoder.of(config)(told.captions))
    assert_same_for_any_split(open_data("world", config, seed, frames=7), seed)


def test_the_world_gives_as_many_frames_as_are_asked_for(seed: int) -> None:
    long, short = (open_data("world", mini(), seed, frames=n).batch([3, 1]) for n in (12, 5))
    assert long.latents is not None and short.latents is not None
    assert long.captions == short.captions and short.latents.shape[2] == 5
    torch.testing.assert_close(long.latents[:, :, :5], short.latents, atol=1e-5, rtol=0)
    told = open_data("world", mini(), seed, frames=5, captions_only=True).batch([3, 1])
    assert told.latents is None and told.captions == long.captions
    assert torch.equal(told.context, long.context)


def test_prompts_tell_what_they_are() -> None:
    encode = WordHash(3, 2)
    made = {seed: Prompts(["a", "b", "c"], encode, seed) for seed in (1, 2)}
    other = Prompts(["a", "b", "d"], encode, 1)
    assert made[1].facts() != made[2].facts() and made[1].facts() != other.facts()


def test_names_that_are_no_data(folder: Path, tmp_path: Path) -> None:
    wan = preset("wan-1.3b")
    for name, config, sentence in (
        ("wolrd", mini(), "wolrd is not there: give world, a folder"),
        ("world", wan, "give --data a folder of videos"),
        (str(folder), wan, "Wan's text encoder: give --wan"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_data(name, config, 0, frames=3)
    with pytest.raises(UserError, match="Wan's VAE: give --wan"):
        open_data(str(folder), wan, 0, frames=3, encode=WordHash(4, 3))
    (folder / "3.txt").write_text("a cat on a sofa")
    with pytest.raises(UserError, match=r"3\.txt: 'a cat on a sofa' is no caption of the world"):
        open_data(str(folder), mini(), 0, frames=3)


def test_a_model_of_other_captions_reads_a_stand_in(folder: Path) -> None:
    said: list[str] = []
    (folder / "3.txt").write_text("a cat on a sofa")
    config = replace(mini(), text_len=5)
    data = open_data(str(folder), config, 0, frames=3, say=said.append)
    assert "a cat on a sofa" in data.batch(range(5)).captions
    assert any("no text encoder is at hand" in sentence for sentence in said)
