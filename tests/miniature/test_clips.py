"""Frames of a study as rows and back, and videos of known content read into the same rows."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mla_study.errors import UserError
from mla_study.miniature import clips, sheets
from mla_study.miniature.plan import Plan, full_study, mini_study, teacher_node
from mla_study.miniature.store import Store
from mla_study.rollout.clips import read_clip
from mla_study.rollout.sinks import Mp4Sink
from mla_study.study.runs import parquet_bytes, read_result, write_result
from mla_study.world.render import render
from mla_study.world.scenes import World, sample_scenes


def truth(seed: int, count: int, frames: int) -> np.ndarray:
    """Clips of the renderer, uint8 [count, frames, 24, 24, 3]."""
    video = render(sample_scenes(World(), count, seed), frames)
    pixels = video.add(1).mul(127.5).round().byte()
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 4, 1).numpy())


@pytest.fixture
def study(tmp_path: Path, seed: int) -> tuple[Plan, Store, dict[str, np.ndarray]]:
    """A short plan whose judgements hold renders."""
    plan = mini_study(teacher_node(None, "0" * 64))
    store = Store(tmp_path / "store", tmp_path / "codec")
    held: dict[str, np.ndarray] = {}
    for number, node in enumerate(n for n in plan if n.kind == "judge"):
        frames = truth((seed + number) % 2**31, 6, 12 * node.about["clips"])
        folder = store.place(plan, node.name)
        folder.mkdir(parents=True)
        save_file({"frames": frames}, folder / clips.FRAMES)
        held[node.name] = frames
    return plan, store, held


def test_rows_hold_the_pixels_of_even_times(
    study: tuple[Plan, Store, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    plan, store, held = study
    table = clips.clips_table(plan, store)
    assert set(table["clips"]) == {1, 10}
    assert set(table["run"]) == {
        "teacher", "dense-s0", "activation-12-s0", "spectral-12-s0", "random-12-s0"
    }  # fmt: skip
    write_result(
        tmp_path / "out", {"table": table}, config={}, inputs={}, seed=None, modules=(),
        provenance="measured", validity="full",
    )  # fmt: skip
    back = read_result(tmp_path / "out").table
    for node in clips.shown_nodes(plan):
        about, video = node.about, held[node.name]
        mine = back[(back["run"] == about["run"]) & (back["stage"] == about["stage"])]
        mine = mine[mine["clips"] == about["clips"]].to_dict("records")
        told = clips.Trial(seed=0).captions
        assert [row["prompt"] for row in mine] == [str(c) for c in told[: clips.PROMPTS]]
        for place, row in enumerate(mine):
            numbers = list(row["frames"])
            assert len(numbers) == clips.KEPT[about["clips"]]
            assert (numbers[0], numbers[-1]) == (0, len(video[place]) - 1)
            assert max(np.diff(numbers)) - min(np.diff(numbers)) <= 1
            np.testing.assert_array_equal(clips.frames_of(row), video[place][numbers])
    assert parquet_bytes(table) == parquet_bytes(clips.clips_table(plan, store))


def test_the_full_study_shows_its_main_students_once() -> None:
    shown = [(n.about["run"], n.about["stage"], n.about["clips"]) for n in
             clips.shown_nodes(full_study(teacher_node(None, "0" * 64)))]  # fmt: skip
    assert len(shown) == len(set(shown)) == 1 + 5 * 3 + 2
    assert {run for run, _, times in shown if times == 100} == {"dense-s0", "activation-12-s0"}


def test_missing_frames_and_damaged_rows_are_told(
    study: tuple[Plan, Store, dict[str, np.ndarray]],
) -> None:
    plan, store, _ = study
    row = clips.clips_table(plan, store).iloc[0].to_dict()
    with pytest.raises(UserError, match="make study-full"):
        clips.frames_of({**row, "png": row["png"][:40]})
    with pytest.raises(UserError, match="make study-full"):
        clips.frames_of({**row, "frames": list(range(7))})
    node = clips.shown_nodes(plan)[0]
    (store.place(plan, node.name) / clips.FRAMES).unlink()
    with pytest.raises(UserError, match="is missing"):
        clips.clips_table(plan, store)


def write(path: Path, frames: np.ndarray, fps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = Mp4Sink(path, Fraction(fps))
    sink.write(frames)
    sink.close(True)


def test_folders_of_videos_are_read_into_rows(tmp_path: Path, seed: int) -> None:
    video = truth(seed % 2**31, 1, 37)[0].repeat(4, 1).repeat(4, 2)
    write(tmp_path / "ours" / "a_red_kite.mp4", video, 5)
    write(tmp_path / "theirs" / "a_red_kite.mp4", video[:3], 5)
    table, unread = clips.read_folder(tmp_path, 4)
    assert unread == {}
    assert table["run"].tolist() == ["ours", "theirs"]
    assert set(table["prompt"]) == {"a red kite"}
    assert table["fps"].tolist() == [5.0, 5.0]
    assert [list(numbers) for numbers in table["frames"]] == [[0, 12, 24, 36], [0, 1, 2]]
    found = clips.frames_of(table.iloc[0].to_dict())
    # H.264 loses a little, but another frame would be far off
    wrong = np.abs(found.astype(int) - video[[0, 12, 24, 36]]).mean()
    assert wrong < 8
    assert np.abs(found.astype(int) - video[[1, 13, 25, 35]]).mean() > wrong
    flat, _ = clips.read_folder(tmp_path / "ours", 2)
    assert flat["run"].tolist() == ["ours"]


def test_large_frames_are_reduced(tmp_path: Path) -> None:
    write(tmp_path / "x.mp4", np.full((3, 270, 480, 3), 200, np.uint8), 8)
    found = clips.frames_of(clips.read_folder(tmp_path, 2)[0].iloc[0].to_dict())
    assert found.shape == (2, 144, 256, 3)
    assert np.abs(found.astype(int) - 200).max() < 6


def test_bad_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        clips.read_folder(tmp_path / "none", 3)
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(UserError, match="holds no video"):
        clips.read_folder(tmp_path, 3)
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"of 1 videos .* none can be decoded: .*cut\.mp4"):
        clips.read_folder(tmp_path, 3)


def test_what_cannot_be_decoded_is_left_out_and_named(tmp_path: Path, seed: int) -> None:
    write(tmp_path / "ours" / "a.mp4", truth(seed % 2**31, 1, 5)[0], 8)
    whole = (tmp_path / "ours" / "a.mp4").read_bytes()
    (tmp_path / "ours" / "b.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.mp4").write_bytes(b"no video")
    table, unread = clips.read_folder(tmp_path, 3)
    assert table[["run", "prompt"]].to_numpy().tolist() == [["ours", "a"]]
    assert list(unread) == ["ours/b.mp4", "theirs/a.mp4"]
    assert "cannot be read as a video" in unread["theirs/a.mp4"]


def test_sheets_show_every_variant_and_prompt(
    study: tuple[Plan, Store, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    plan, store, held = study
    written = sheets.write_videos(plan, store, tmp_path / "videos")
    assert {p.name for p in written} == {
        f"{stem}.{suffix}" for stem in ("cd-1x", "dmd-1x", "dmd-10x") for suffix in ("png", "mp4")
    }
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "videos" / "dmd-10x.png").read_bytes())))
    doubled = held["dense-s0/dmd/plain-10x"][0, 0].repeat(2, 0).repeat(2, 1)
    # dense is the first row, below the prompts and right of the names
    corner = sheet[sheets._ABOVE :, sheets._LEFT :][:48, :48]
    np.testing.assert_array_equal(corner, doubled)
    film = np.concatenate([p[0].numpy() for p in read_clip(tmp_path / "videos" / "cd-1x.mp4")])
    assert len(film) == 12
