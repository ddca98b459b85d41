import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training.clips import levels, write_video

from mla_study.errors import UserError
from mla_study.rollout.prompts import WordHash
from mla_study.training.data.captions import read_folder
from mla_study.training.data.videos import ClipEncoder, Shot, VideoFolder


class Halving:
    """Latents are the mean over blocks of 2 x 2 pixels; it counts, and may stop."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls = 0
        self.stop = stop

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return torch.nn.functional.avg_pool3d(pixels, (1, 2, 2))

    def make(self) -> ClipEncoder:
        return self


def folder_of(folder: Path, encoder: Halving, said: list[str], **changes: Any) -> VideoFolder:
    settings: dict[str, Any] = {"shot": Shot(4, (8, 12)), "made_by": {"codec": "half"}, "seed": 3}
    return VideoFolder(
        read_folder(folder), folder, folder / "cache", WordHash(5, 3), make=encoder.make,
        say=said.append, **{**settings, **changes},
    )  # fmt: skip


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for number in range(5):
        write_video(tmp_path / f"v{number}.mp4", offset=3 * number)
        (tmp_path / f"v{number}.txt").write_text(f"grey {number}")
    return tmp_path


def test_latents_are_those_of_the_frames(videos: Path) -> None:
    said: list[str] = []
    data = folder_of(videos, Halving(), said)
    with pytest.raises(UserError, match="prepare them first"):
        data.batch([0])
    data.prepare(progress=False)
    batch = data.batch(range(5))
    assert not said and sorted(batch.captions) == [f"grey {n}" for n in range(5)]
    assert batch.latents is not None and batch.latents.shape == (5, 3, 4, 4, 6)
    assert torch.equal(batch.context, WordHash(5, 3)(batch.captions))
    for caption, latents in zip(batch.captions, batch.latents, strict=True):
        expected = (levels(4) + 3 * int(caption.split()[1])) / 127.5 - 1
        made = latents.double()
        assert (made - torch.tensor(expected)[None, :, None, None]).abs().max() < 1.5 / 127.5


def test_a_video_is_encoded_once_until_something_changes(videos: Path) -> None:
    def calls(**changes: Any) -> int:
        encoder = Halving()
        folder_of(videos, encoder, [], **changes).prepare(progress=False)
        return encoder.calls

    assert calls() == 5
    assert calls() == 0
    os.utime(videos / "v0.mp4")  # another time, the same content
    (videos / "v1.mp4").rename(videos / "w1.mp4")
    (videos / "v1.txt").rename(videos / "w1.txt")
    assert calls() == 0
    write_video(videos / "v2.mp4", offset=40)
    assert calls() == 1
    for changes in (
        {"shot": Shot(4, (8, 8))}, {"shot": Shot(3, (8, 12))}, {"shot": Shot(3, (8, 12), 4.0)},
        {"made_by": {"codec": "other"}},
    ):  # fmt: skip
        assert calls(**changes) == 5


def test_an_interruption_goes_on_to_the_same_data(videos: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        folder_of(videos, Halving(stop=2), []).prepare(progress=False)
    rest = Halving()
    resumed = folder_of(videos, rest, [])
    resumed.prepare(progress=False)
    assert rest.calls == 3
    for shard in (videos / "cache").rglob("shard-*"):
        shard.unlink()
    fresh = folder_of(videos, Halving(), [])
    fresh.prepare(progress=False)
    assert fresh.facts() == resumed.facts()
    one, other = fresh.batch(range(11)), resumed.batch(range(11))
    assert one.captions == other.captions
    assert one.latents is not None and other.latents is not None
    assert torch.equal(one.latents, other.latents)


def test_bad_videos_are_skipped_counted_and_listed(videos: Path) -> None:
    (videos / "v1.mp4").write_bytes(b"no video")
    said: list[str] = []
    data = folder_of(videos, Halving(), said)
    data.prepare(progress=False)
    assert list(data.bad) == ["v1.mp4"] and data.facts()["clips"] == 4
    assert len(said) == 1 and "1 of 5 videos were skipped" in said[0] and "v1.mp4" in said[0]
    write_video(videos / "v3.mp4", frames=2)
    with pytest.raises(UserError, match=r"2 of 5 .* 5%: v3\.mp4 is too short: it has 2 frames"):
        folder_of(videos, Halving(), said).prepare(progress=False)
    generous = folder_of(videos, Halving(), said, max_bad=0.4)
    generous.prepare(progress=False)
    assert set(generous.bad) == {"v1.mp4", "v3.mp4"}
    assert sorted(generous.batch(range(3)).captions) == ["grey 0", "grey 2", "grey 4"]


def test_no_video_of_use(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"no video could be used: .*a\.mp4"):
        folder_of(tmp_path, Halving(), []).prepare(progress=False)


def test_unequal_sizes_are_told(videos: Path) -> None:
    write_video(videos / "v4.mp4", size=(16, 32))
    said: list[str] = []
    folder_of(videos, Halving(), said).prepare(progress=False)
    assert len(said) == 1 and "1 of 5 videos are not of 24 x 24" in said[0]
    assert "v4.mp4 (16 x 32)" in said[0] and "cropped to 8 x 12" in said[0]


def test_latents_that_are_not_finite_count_as_bad(videos: Path) -> None:
    class Broken(Halving):
        def __call__(self, pixels: Tensor) -> Tensor:
            made = super().__call__(pixels)
            return made / 0 if self.calls == 2 else made

    said: list[str] = []
    data = folder_of(videos, Broken(), said)
    data.prepare(progress=False)
    assert list(data.bad) == ["v1.mp4"] and "not finite" in data.bad["v1.mp4"]


@pytest.mark.assets
def test_real_clips_are_read_at_any_size(assets: Path, tmp_path: Path) -> None:
    clips = sorted((assets / "clips").glob("*.mp4"))[:3]
    rows = "".join(f"{clip},{clip.stem}\n" for clip in clips)
    (tmp_path / "captions.csv").write_text(f"file,caption\n{rows}")
    data = folder_of(tmp_path, Halving(), [], shot=Shot(9, (48, 80), 16.0), max_bad=0.0)
    data.prepare(progress=False)
    latents = data.batch(range(len(clips))).latents
    assert latents is not None and latents.shape == (len(clips), 3, 9, 24, 40)
    assert latents.std(dim=(1, 2, 3, 4)).max() > 0.2 and latents.abs().max() <= 1
