"""The miniature that the package carries, as a new user meets it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mla_study.cli import main
from mla_study.config import mini
from mla_study.rollout.stream import random_model
from mla_study.world import shipped
from mla_study.world.grammar import sample_captions
from mla_study.world.render import render
from mla_study.world.scenes import World, sample_scenes
from mla_study.world.serving import WorldDecoder, default_prompts
from mla_study.world.shipped import is_world, load_shipped, world_codec

CAPTION = "slow blue disc moving left top center on night"


def test_a_caption_becomes_a_video_that_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip.mp4"
    assert main(["generate", CAPTION, "--frames", "12", "--out", str(out)]) == 0
    assert "12 frames (1.5 s)" in capsys.readouterr().out
    assert main(["score", str(out), "--caption", CAPTION]) == 0
    assert "all correct" in capsys.readouterr().out


def test_an_upscaled_file_scores_as_its_frames(tmp_path: Path) -> None:
    from mla_study.rollout.sinks import Mp4Sink
    from mla_study.world.files import read_video
    from mla_study.world.score import score

    caption = str(sample_captions(1, 5)[0])
    codec = world_codec(6)
    latents = codec.encode(render(sample_scenes(World(), 1, 5, captions=[caption])))
    decoder = WorldDecoder(codec)
    sink = Mp4Sink(tmp_path / "a.mp4", Fraction(8))
    frames = decoder.decode(latents)
    assert frames.shape == (1, 12, 240, 240, 3)
    sink.write(frames[0])
    sink.close(True)
    held = score(read_video(tmp_path / "a.mp4", 24), caption)
    assert bool(held.all_correct.all()) and float(held.iou) > 0.85


@pytest.mark.parametrize("variant", ["dense", "latent"])
def test_both_students_are_carried(variant: str, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    argv = ["generate", CAPTION, "--variant", variant, "--frames", "6", "--out", str(out)]
    assert main(argv) == 0
    config = load_shipped(variant).config
    assert (config.latent is None) == (variant == "dense") and is_world(config)
    (latents,) = load_file(out).values()
    assert latents.shape[2] in (6, 16) and bool(torch.isfinite(latents).all())


def test_what_does_not_suit_the_miniature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, told in (
        (["a red square"], "the nearest caption is 'slow red square"),
        ([CAPTION, "--preset", "wan-1.3b"], "weights of wan-1.3b are needed"),
        ([CAPTION, "--upscale", "0"], "--upscale is 0"),
        ([CAPTION, "--lora", "x.safetensors"], "speak of a --checkpoint"),
    ):
        assert main(["generate", *argv, "--out", str(tmp_path / "a.mp4")]) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_prompt_the_seed_draws_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--seed", "4", "--frames", "3", "--out", str(tmp_path / "a.png")]
    assert main([*argv, "--upscale", "1"]) == 0
    assert f"this is '{default_prompts(4, ())[0]}'" in capsys.readouterr().err


def test_a_miniature_of_ones_own_is_told_in_the_worlds_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mla_study.checkpoints.wan.save import save_model

    path = tmp_path / "mine.safetensors"
    save_model(random_model(mini(latent=True)), path, "latent")
    argv = ["generate", "a red disc", "--checkpoint", str(path), "--out", str(tmp_path / "a.mp4")]
    assert main(argv) == 2
    assert "is no caption of the world" in capsys.readouterr().err
    argv[1] = CAPTION
    assert main([*argv, "--frames", "3"]) == 0


def test_a_package_without_its_weights_says_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    assert main(["generate", CAPTION, "--out", str(tmp_path / "a.mp4")]) == 2
    assert shipped.MAKE in capsys.readouterr().err


def test_every_shipped_model_is_small() -> None:
    for name in shipped.MODELS:
        assert shipped.shipped(name).stat().st_size <= 2 * 2**20
