"""Sampling: what is interrupted goes on to the same videos, shares join, longer texts are told."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from mla_study.checkpoints.wan.save import save_model
from mla_study.commands.vbench_sample import Sample as Command
from mla_study.config import LatentConfig, WindowConfig, mini
from mla_study.errors import UserError
from mla_study.evaluation.vbench.sampling import sample as module
from mla_study.evaluation.vbench.sampling.plan import Sample, prompt_set, samples, seed_of
from mla_study.evaluation.vbench.sampling.sample import Sampled, records_of, sample
from mla_study.evaluation.vbench.sampling.sampler import Made, Recipe, Sampler, Say
from mla_study.rollout import setup
from mla_study.rollout.stream import random_model
from mla_study.rollout.video import VaeDecoder
from mla_study.world.grammar import sample_captions
from mla_study.world.shipped import shipped

BRIEF = Recipe(seconds=0.75)  # of 8 frames a second: two chunks


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def make(
    folder: Path,
    count: int = 2,
    each: int = 2,
    shard: tuple[int, int] = (0, 1),
    sampler: type[Sampler] = Sampler,
    recipe: Recipe = BRIEF,
    seed: int = 0,
) -> Sampled:
    prompts = prompt_set("mini", None, None, count, 0)
    wanted = samples(prompts, each=each, seed=seed)
    return sample(prompts, wanted, recipe, folder, base=seed, shard=shard, say=say, sampler=sampler)


def table(folder: Path) -> list[dict[str, str]]:
    with (records_of(folder) / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos, made undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "videos"
    done = make(folder)
    assert (done.there, done.made) == (4, 4)
    return folder


def test_videos_are_named_by_captions_and_told_of(whole: Path) -> None:
    captions = [line.prompt for line in prompt_set("mini", None, None, 2, 0).lines]
    rows = table(whole)
    expected = [f"{caption}-{index}.mp4" for caption in captions for index in range(2)]
    assert [row["file"] for row in rows] == expected
    assert sorted(file.name for file in whole.iterdir()) == sorted(expected)
    record = json.loads((records_of(whole) / "sampling.json").read_text())
    for row in rows:
        assert row["told"] == row["prompt"]
        assert int(row["seed"]) == seed_of(0, row["prompt"], int(row["index"]))
        assert row["checkpoint"] == record["identity"]["inputs"]["weights"]
        with av.open(str(whole / row["file"])) as container:
            stream = container.streams.video[0]
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.average_rate == 8
        assert len(shown) == int(row["frames"]) == 6 and shown[0].shape == (240, 240, 3)
        assert shown[0].std() > 5
    assert len({row["latents"] for row in rows}) == 4
    assert record["prompts"]["extended_by"] == "nobody: short prompts"


class Cut(Sampler):
    """Interrupted in the second video, whose file is begun."""

    def make(self, told: Tensor, seed: int, path: Path) -> Made:
        made = super().make(told, seed, path)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2:
            raise KeyboardInterrupt
        return made


def test_after_an_interruption_the_same_videos(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    with pytest.raises(KeyboardInterrupt):
        make(folder, sampler=Cut)
    assert len(bytes_of(folder)) == len(table(folder)) == 1
    records = records_of(folder)
    assert not list(records.glob(".*.mp4"))
    # what a kill leaves: a begun file, a cut-off row, and a row whose video has no name yet
    (records / ".0-of-1.mp4").write_bytes(b"begun")
    with (records / "rows-0-of-1.jsonl").open("a") as file:
        file.write('{"prompt": "fa')
    done = make(folder)
    assert (done.there, done.made) == (4, 3)
    assert bytes_of(folder) == bytes_of(whole) and table(folder) == table(whole)
    lost = table(folder)[2]["file"]
    (folder / lost).unlink()
    assert make(folder).made == 1
    assert bytes_of(folder) == bytes_of(whole) and table(folder) == table(whole)


class Never(Sampler):
    """Makes nothing."""

    def make(self, told: Tensor, seed: int, path: Path) -> Made:
        raise AssertionError("all was there")


def test_finished_videos_are_kept(whole: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    assert make(whole, sampler=Never).made == 0
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir()} == before


def test_shares_join_to_the_whole(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    first = make(folder, shard=(1, 2))
    assert first.there == 2 and len(table(folder)) == 2
    second = make(folder, shard=(0, 2))
    assert second.made == 2
    assert bytes_of(folder) == bytes_of(whole) and table(folder) == table(whole)
    # another number of shares finds what these made
    assert make(folder, shard=(0, 3), sampler=Never).made == 0


def test_one_process_a_share(tmp_path: Path) -> None:
    folder = tmp_path / "videos"

    class Second(Sampler):
        def __init__(self, recipe: Recipe, say: Say) -> None:
            make(folder)
            raise AssertionError("both went on")

    with pytest.raises(UserError, match="another process makes share 0/1"):
        make(folder, sampler=Second)


def test_other_videos_do_not_mix(whole: Path) -> None:
    for change, told in (
        ({"recipe": Recipe(seconds=2)}, r"seconds was 0\.75, is 2"),
        ({"recipe": Recipe(seconds=0.75, variant="dense")}, "weights was"),
        ({"seed": 1}, "seed was 0, is 1"),
    ):
        with pytest.raises(UserError, match=f"made otherwise.*{told}"):
            make(whole, **change)  # type: ignore[arg-type]
    assert make(whole, count=1, sampler=Never).made == 0


def test_the_longer_text_is_told_and_the_short_one_names(tmp_path: Path) -> None:
    captions = [str(caption) for caption in sample_captions(2, 9)]
    short, longer, plain = (tmp_path / name for name in ("short.txt", "longer.txt", "plain.txt"))
    short.write_text("one thing\nanother thing\n")
    longer.write_text("\n".join(captions))
    plain.write_text("\n".join(captions))
    heard: list[Sequence[str]] = []

    class Listening(Sampler):
        def __init__(self, recipe: Recipe, say: Say) -> None:
            super().__init__(recipe, say)
            inner = self.encode

            def encode(texts: Sequence[str]) -> Tensor:
                heard.append(texts)
                return inner(texts)

            self.encode = encode

    prompts = prompt_set(str(short), longer, None, None, 0)
    wanted = samples(prompts, each=1)
    sample(prompts, wanted, BRIEF, tmp_path / "a", say=say, sampler=Listening)
    assert heard == [captions]
    rows = table(tmp_path / "a")
    assert [row["file"] for row in rows] == ["one thing-0.mp4", "another thing-0.mp4"]
    assert [row["told"] for row in rows] == captions
    record = json.loads((records_of(tmp_path / "a") / "sampling.json").read_text())
    assert record["prompts"]["extended_by"] == "unknown"
    assert record["identity"]["inputs"]["extended"] == prompts.extended_sha256
    # the same as what the model makes of these captions with those seeds
    told = prompt_set(str(plain), None, None, None, 0)
    same = [Sample(c, c, 0, s.seed, f"{c}-0.mp4") for c, s in zip(captions, wanted, strict=True)]
    sample(told, same, BRIEF, tmp_path / "b", say=say)
    assert [r["latents"] for r in table(tmp_path / "b")] == [r["latents"] for r in rows]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clips"
    command = Command(
        out, count=1, samples=1, seconds=0.5, checkpoint=str(shipped("dense")), threads=1
    )
    assert command.run() == 0
    told = capsys.readouterr()
    assert "1 video, 1 of them new" in told.out and "samples.csv" in told.out
    assert "1 of 1 videos, finished" in told.err
    record = json.loads((tmp_path / "clips.sampling/sampling.json").read_text())
    assert len(record["observed"]["checkpoint_sha256"]) == 64
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog runs\n")
    with pytest.raises(UserError, match="'a dog runs' is none: give --checkpoint"):
        Command(tmp_path / "b", prompts=str(prompts)).run()
    for bad, sentence in (
        (Command(out, seconds=0), "--seconds is 0"),
        (Command(out, shard="2/2"), "--shard 2/2"),
        (Command(out, wan=tmp_path), "speak of a --checkpoint"),
        (Command(out, fps=0), "--fps is 0"),
        (Command(out, upscale=0), "--upscale is a number from 1"),
        (Command(out, prompts="vbench", environment=tmp_path), "make setup-vbench"),
    ):
        with pytest.raises(UserError, match=sentence):
            bad.run()


def test_interrupted_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> Sampled:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sample", stop)
    assert Command(tmp_path / "clips").run() == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_decoder_that_remembers_begins_each_video_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=3).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    monkeypatch.setattr(setup, "choose_decoder", lambda *_: (VaeDecoder(vae), Fraction(4)))
    config = replace(
        mini(), layers=1, width=32, heads=2, ffn_width=48, text_dim=10, latent_size=(4, 6),
        window=WindowConfig(1, 3, 2), latent=LatentConfig(6, 8, 10, 6, (1, 1, 1)),
    )  # fmt: skip
    place = save_model(random_model(config), tmp_path / "model", "latent")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    recipe = Recipe(checkpoint=str(place), seconds=0.4)
    many = prompt_set(str(prompts), None, None, None, 0)
    both, second = samples(many, each=1), samples(many, each=1)[1:]
    sample(many, both, recipe, tmp_path / "both", say=say)
    sample(many, second, recipe, tmp_path / "second", say=say)
    made = bytes_of(tmp_path / "both")
    assert set(made) == {"a dog-0.mp4", "a cat-0.mp4"} and len(set(made.values())) == 2
    assert bytes_of(tmp_path / "second") == {"a cat-0.mp4": made["a cat-0.mp4"]}
    assert table(tmp_path / "second")[0]["frames"] == "13"  # 1 + 4 for each further latent frame
