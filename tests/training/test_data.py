"""Samples by number, from the world, folders of videos and prompts; and what is refused."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from mla_study.config import mini, small, wan_1_3b
from mla_study.errors import UserError
from mla_study.rollout.prompts import stand_in
from mla_study.rollout.sinks import Mp4Sink
from mla_study.training.captions import read_folder, read_prompts
from mla_study.training.data import CACHE, VideoFolder, open_data, place, world_data


def video(path: Path, seed: int, frames: int = 5, size: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = Mp4Sink(path, Fraction(8))
    draw = np.random.default_rng(seed)
    sink.write(draw.integers(0, 255, (frames, size, size, 3), dtype=np.uint8))
    sink.close(True)
    return path


def folder(path: Path, count: int = 4) -> Path:
    rows = [{"file": f"v{n}.mp4", "caption": f"video {n}"} for n in range(count)]
    for n, row in enumerate(rows):
        video(path / row["file"], n)
    pd.DataFrame(rows).to_csv(path / "captions.csv", index=False)
    return path


class Counting:
    """An encoder of clips that counts its calls, and may fail at one."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        return torch.nn.functional.avg_pool3d(pixels, (1, 8, 8))


def held(path: Path, encoder: Counting, **changes: float) -> VideoFolder:
    said: list[str] = []
    return VideoFolder(
        read_folder(path), path, stand_in(mini()), 5, (32, 32), lambda: encoder, {"codec": "pool"},
        say=said.append, **changes,  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_world_is_the_same_in_any_batch(seed: int) -> None:
    data = world_data(mini(), seed % 1000)
    whole, part = data.batch([5, 9, 2, 7]), data.batch([2])
    assert whole.latents is not None and part.latents is not None
    assert whole.latents.shape == (4, 16, 12, 6, 6) and whole.captions[2] == part.captions[0]
    torch.testing.assert_close(whole.latents[2:3], part.latents)
    assert torch.equal(whole.context[2:3], part.context)
    assert data.null.shape == (1, 8, 96) and not data.null.any()
    assert world_data(mini(), 1, captions_only=True).batch([3]).latents is None


def test_a_larger_world_for_a_larger_model() -> None:
    data = world_data(small(), 0)
    made = data.batch([0])
    assert data.world.size == 64 and made.latents is not None
    assert made.latents.shape[3:] == small().latent_size
    with pytest.raises(UserError, match=r"latents of 60 x 104 .* give --data a folder"):
        world_data(wan_1_3b(), 0)


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    epochs = [[place(n, 7, 3) for n in range(7 * e, 7 * e + 7)] for e in range(6)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 3
    assert [place(n, 7, 4) for n in range(7)] != epochs[0]


def test_latents_are_made_once_and_go_on(tmp_path: Path) -> None:
    path = folder(tmp_path / "clips")
    with pytest.raises(KeyboardInterrupt):
        held(path, Counting(fail_at=2)).prepare(progress=False)
    assert len(list((path / CACHE).rglob("*.safetensors"))) == 2
    encoder = Counting()
    data = held(path, encoder)
    data.prepare(progress=False)
    assert encoder.calls == 2
    again = held(path, never := Counting())
    again.prepare(progress=False)
    assert never.calls == 0
    one, other = data.batch([0, 1, 2, 3]), again.batch([3])
    assert one.latents is not None and other.latents is not None
    assert torch.equal(one.latents[3:], other.latents)
    assert sorted(one.captions) == [f"video {n}" for n in range(4)]
    assert data.facts() == again.facts()
    # a changed video is encoded again, the others are not
    video(path / "v0.mp4", 77)
    changed = held(path, few := Counting())
    changed.prepare(progress=False)
    assert few.calls == 1 and changed.facts() != data.facts()


def test_videos_that_do_not_decode_are_skipped_until_too_many(tmp_path: Path) -> None:
    path = folder(tmp_path / "clips", 5)
    (path / "v3.mp4").write_bytes(b"no video")
    data = held(path, Counting())
    data.prepare(progress=False)
    assert list(data.bad) == ["v3.mp4"] and data.facts()["clips"] == 4
    video(path / "v1.mp4", 1, frames=3)
    with pytest.raises(UserError, match=r"2 of 5 videos cannot be used.*(3 frames|v3)"):
        held(path, Counting()).prepare(progress=False)


def test_captions_of_every_kind(tmp_path: Path) -> None:
    rows = [{"path": "b.mp4", "prompt": "second"}, {"path": "a.mp4", "prompt": "first"}]
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    for suffix in (".csv", ".jsonl", ".parquet"):
        table = tmp_path / f"captions{suffix}"
        frame = pd.DataFrame(rows)
        if suffix == ".csv":
            frame.to_csv(table, index=False)
        elif suffix == ".jsonl":
            table.write_text("\n".join(map(json.dumps, rows)) + "\n")
        else:
            frame.to_parquet(table)
        assert [one.caption for one in read_folder(tmp_path)] == ["first", "second"]
        assert read_prompts(table) == ["second", "first"]
        table.unlink()
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f" {name} \n")
    assert [one.caption for one in read_folder(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"file": "a.mp4", "caption": "x"}\n{"file": "a.mp4"}', "row 2: there is no caption"),
        ('{"file": "a.mp4", "caption": "x"}\nnot json', "row 2 is no JSON"),
        ('{"file": "gone.mp4", "caption": "x"}', "row 1: gone.mp4 is not there"),
        ("[1]", "row 1 is no JSON object"),
        ("", "holds no video with a caption"),
    ],
)
def test_a_bad_row_is_named(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "captions.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        read_folder(tmp_path)


def test_data_by_name(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\nthree\n")
    data = open_data(str(prompts), mini(), 0, frames=12, say=lambda _: None)
    batch = data.batch(range(3))
    assert sorted(batch.captions) == ["one", "three", "two"] and batch.latents is None
    assert data.facts()["prompts"] == 3
    path = folder(tmp_path / "clips", 2)
    for n in range(2):
        video(path / f"v{n}.mp4", n, frames=12)
    clips = open_data(str(path), mini(), 0, frames=12, say=lambda _: None)
    latents = clips.batch([0]).latents
    assert latents is not None and latents.shape == (1, 16, 12, 6, 6)
    (tmp_path / "pairs.lmdb").mkdir()
    for name, told in (
        ("nowhere", "give world, a folder of videos, or a file of prompts"),
        (str(tmp_path / "pairs.lmdb"), "is an LMDB of ODE pairs"),
    ):
        with pytest.raises(UserError, match=told):
            open_data(name, mini(), 0, frames=12)
    with pytest.raises(UserError, match="give --wan"):
        open_data(str(path), wan_1_3b(), 0, frames=21, encode=stand_in(mini()))
