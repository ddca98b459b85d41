"""The miniature that the package carries, as a new user meets it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mla_study.cli import main
from mla_study.config import mini
from mla_study.rollout.sinks import Mp4Sink
from mla_study.rollout.stream import random_model
from mla_study.world import shipped
from mla_study.world.files import read_video
from mla_study.world.grammar import sample_captions
from mla_study.world.render import render
from mla_study.world.scenes import World, sample_scenes
from mla_study.world.score import score
from mla_study.world.serving import WorldDecoder, default_prompts, visible_scale
from mla_study.world.shipped import is_world, load_shipped, world_codec
from mla_study.world.text import CaptionEncoder

CAPTION = "slow blue disc moving left top center on night"


def test_a_caption_becomes_a_video_that_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip.mp4"
    assert main(["generate", CAPTION, "--frames", "12", "--out", str(out)]) == 0
    assert "4 chunks, 12 frames (1.5 s)" in capsys.readouterr().out
    assert main(["score", str(out), "--caption", CAPTION]) == 0
    assert "all correct" in capsys.readouterr().out


def test_one_chunk_in_a_new_folder_is_told_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "not" / "there" / "clip.safetensors"
    assert main(["generate", CAPTION, "--frames", "1", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}: 1 chunk, 3 frames (0.375 s)\n" and out.exists()
    assert "1 latent frame made into 3, 1 whole chunk of 3" in said.err


def test_upscaled_files_score_as_their_frames(tmp_path: Path) -> None:
    captions = sample_captions(6, 5)
    latents = world_codec(6).encode(render(sample_scenes(World(), 6, 5, captions=captions)))
    decoder = WorldDecoder(world_codec(6), visible_scale((6, 6)))
    frames = decoder.decode(latents)
    assert frames.shape == (6, 12, 240, 240, 3)
    raw = score(WorldDecoder(decoder.codec, 1).decode(latents), captions)
    assert bool(raw.all_correct.all())
    for index, caption in enumerate(captions):
        sink = Mp4Sink(tmp_path / "a.mp4", Fraction(8))
        sink.write(frames[index])
        sink.close(True)
        held = score(read_video(tmp_path / "a.mp4", 24), caption)
        assert bool(held.all_correct)
        assert abs(float(held.iou) - float(raw.iou[index])) < 0.06


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
        ([CAPTION, "--upscale", "2", "--random-weights"], "leave it out"),
        ([CAPTION, "--checkpoint", str(shipped.shipped("dense")), "--wan", "x"], "leave out --wan"),
        ([CAPTION, "--variant", "teacher", "--seconds", "30"], "which --seconds does not suit"),
        ([CAPTION, "--variant", "teacher", "--no-clean-pass"], "which --clean-pass does not suit"),
        ([CAPTION, "--variant", "teacher", "--random-weights"], "leave out --random-weights"),
        ([CAPTION, "--variant", "teacher", "--batch", "0"], "a batch of 0"),
        ([CAPTION, "--frames", "3", "--prompt-at", "1:a red disc"], "'a red disc' is no caption"),
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


def test_the_teacher_makes_a_clip_a_prompt(tmp_path: Path) -> None:
    told = [CAPTION, str(sample_captions(1, 3)[0])]
    out = tmp_path / "t.mp4"
    assert main(["generate", *told, "--variant", "teacher", "--seed", "1", "--out", str(out)]) == 0
    for index, caption in enumerate(told):
        held = score(read_video(tmp_path / f"t-{index}.mp4", 24), caption)
        assert held.parsed.where.shape[1] == 12 and bool(held.all_correct)


def latents_of(out: Path, *argv: object) -> Tensor:
    """What a rollout makes; all of one seed and one length."""
    assert main(["generate", *map(str, argv), "--frames", "6", "--out", str(out)]) == 0
    return load_file(out)["latents"]


def test_a_file_in_16_bits_is_computed_in_32(tmp_path: Path) -> None:
    path = shipped.shipped("latent")
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    given = latents_of(tmp_path / "a.safetensors", CAPTION, "--checkpoint", path)
    assert torch.equal(given, latents_of(tmp_path / "b.safetensors", CAPTION))
    half = latents_of(tmp_path / "c.safetensors", CAPTION, "--checkpoint", path, "--dtype", "fp16")
    assert not torch.equal(given, half)


def test_embeddings_may_take_the_place_of_the_words(tmp_path: Path) -> None:
    from mla_study.model.embeddings import save_embeddings

    rows = CaptionEncoder.of(mini())([CAPTION])
    save_embeddings(tmp_path / "e.safetensors", ["a disc"], list(rows), {"text_len": "8"})
    argv = ("a disc", "--embeddings", tmp_path / "e.safetensors")
    given = latents_of(tmp_path / "a.safetensors", *argv)
    assert torch.equal(given, latents_of(tmp_path / "b.safetensors", CAPTION))


def test_a_stopped_video_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = ["generate", CAPTION, "--prompt-at", f"2:{CAPTION.replace('blue', 'red')}", "--upscale"]
    assert main([*argv, "3", "--frames", "9", "--out", str(whole)]) == 0
    assert main([*argv, "3", "--frames", "3", "--out", str(cut)]) == 0
    assert main([*argv, "4", "--frames", "9", "--out", str(cut), "--resume"]) == 2
    assert "video.upscale was 3, is 4" in capsys.readouterr().err
    assert main([*argv, "3", "--frames", "9", "--out", str(cut), "--resume"]) == 0
    names = sorted(file.name for file in whole.iterdir())
    assert len(names) == 9
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in names)


def test_another_size_is_decoded_by_the_codec_of_training(tmp_path: Path) -> None:
    argv = ["generate", CAPTION, "--size", "8x10", "--frames", "3", "--out"]
    assert main([*argv, str(tmp_path / "a.png"), "--upscale", "1"]) == 0
    assert main([*argv, str(tmp_path / "a.safetensors")]) == 0
    meant = WorldDecoder(world_codec(6), 1).decode(load_file(tmp_path / "a.safetensors")["latents"])
    with Image.open(tmp_path / "a_000001.png") as image:
        assert np.array_equal(np.array(image), meant[0, 1])
