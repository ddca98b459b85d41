"""``mla-study world`` and ``mla-study score`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mla_study.cli import main
from mla_study.study.runs import read_result
from mla_study.world.check import CheckConfig, check_rows, row_text, write_check

CAPTION = "fast red square moving right middle center on stripes"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Exit 2 and one sentence on stderr; gives the sentence."""
    assert main(list(map(str, arguments))) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("mla-study: ") and told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize("name", ["a.mp4", "b.webp", "c.gif", "folder", "d.png"])
def test_what_is_rendered_scores_perfectly(
    name: str, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / name
    assert main(["world", "render", CAPTION, "--out", str(place), "--seed", str(seed)]) == 0
    assert "12 frames of 24 x 24, each pixel 8 x 8" in capsys.readouterr().out
    assert main(["score", str(place), "--caption", CAPTION, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["all_correct"] and made["frames"] == 12 and made["iou"] > 0.85
    assert made["velocity"] == pytest.approx([0, 2], abs=0.1)


def test_a_wrong_caption_is_named_in_its_slot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "a.mp4"
    made = [CAPTION, "--out", str(place), "--size", "32", "--frames", "5", "--scale", "3"]
    assert main(["world", "render", *made]) == 0
    capsys.readouterr()
    wrong = CAPTION.replace("square", "disc")
    assert main(["score", str(place), "--caption", wrong, "--size", "32"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"5 frames of 32 x 32 pixels show: {CAPTION}"
    assert [line.split() for line in told if "WRONG" in line] == [
        ["shape", "disc", "square", "WRONG"]
    ]
    assert told[-1].startswith("6 of 7 correct; IoU ")


def test_a_long_video_is_scored_by_windows_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, (frames, seed) in enumerate(((12, 1), (15, 1))):
        made = [CAPTION, "--frames", str(frames), "--seed", str(seed), "--scale", "1"]
        assert main(["world", "render", *made, "--out", str(tmp_path / str(part))]) == 0
    # the second part begins again where the first began; turned by 8 pixels, it is off its path
    files = [sorted((tmp_path / str(part)).glob("*.png")) for part in (0, 1)]
    (tmp_path / "long").mkdir()
    for number, file in enumerate([*files[0], *files[1]]):
        pixels = np.asarray(Image.open(file).convert("RGB"))
        moved = pixels if number < 12 else np.roll(pixels, 8, axis=1)
        Image.fromarray(moved).save(tmp_path / "long" / f"{number:03}.png")
    command = ["score", str(tmp_path / "long"), "--caption", CAPTION]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    windows = told["windows"]
    # the last 3 of 27 frames make no window; 12 frames of 2 pixels are a turn of the torus
    assert (told["frames"], windows["frames"], windows["count"]) == (27, 12, 2)
    assert windows["phase_error_last"] == pytest.approx(8, abs=0.2)
    assert windows["iou"] > 0.85 > 0.6 > told["iou"] and windows["all_correct"] == 1
    assert main(command) == 0
    *_, first, last = capsys.readouterr().out.splitlines()
    assert f"IoU {told['iou']:.3f} along the path from the first frame" in first
    assert last.startswith("in 2 windows of 12 frames") and f"IoU {windows['iou']:.3f}" in last
    assert main(["score", str(tmp_path / "1"), "--caption", CAPTION]) == 0
    assert "windows" not in capsys.readouterr().out


def test_without_a_caption_it_says_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        Image.fromarray(np.full((48, 48, 3), 255, np.uint8)).save(tmp_path / f"{index}.png")
    assert main(["score", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        "3 frames of 24 x 24 pixels show no sprite on no known background\n"
    )
    assert main(["score", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shown"]["colour"] is None


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "a.png"
    assert main(["world", "render", CAPTION, "--out", str(place), "--frames", "2"]) == 0
    capsys.readouterr()
    assert "nearest caption is" in refused(capsys, "score", place, "--caption", "a red square")
    assert "nearest caption is" in refused(capsys, "world", "render", "a red square")
    assert "no video" in refused(capsys, "score", tmp_path / "none.mp4")
    assert "36 times a whole number" in refused(capsys, "score", place, "--size", 36)
    assert "too small" in refused(capsys, "score", place, "--size", 3)
    (tmp_path / "empty").mkdir()
    assert "holds no PNG file" in refused(capsys, "score", tmp_path / "empty")
    for name in ("junk.mp4", "junk.gif", "junk.png"):
        (tmp_path / name).write_bytes(b"junk")
        assert "cannot be read" in refused(capsys, "score", tmp_path / name)
    render = ("world", "render", CAPTION, "--out")
    assert ".mp4" in refused(capsys, *render, tmp_path / "a.txt")
    assert "latents" in refused(capsys, *render, tmp_path / "a.safetensors")
    assert "--scale 0" in refused(capsys, *render, place, "--scale", 0)
    assert "seed of -1" in refused(capsys, *render, place, "--seed", -1)
    assert "0 frames" in refused(capsys, *render, place, "--frames", 0)
    assert "--clips is 0" in refused(capsys, "world", "check", "--clips", 0, "--no-write")


def test_the_check_prints_a_row_a_condition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["world", "check", "--sizes", "24", "--clips", "4", "--no-write"]) == 0
    told = capsys.readouterr().out
    assert told.count("all correct") == 7 and told.count("no sprite") == 4
    assert "rendering 16 clips" in told


def test_the_table_is_written_with_its_class(tmp_path: Path) -> None:
    config = CheckConfig((24,), 2, 3)
    rows = list(check_rows(config))
    write_check(rows, config, 1.0, tmp_path / "world_parser")
    held = read_result(tmp_path / "world_parser")
    assert held.provenance == "measured" and len(held.table) == len(rows) == 11
    assert set(held.table["clips"]) == {2} and held.table["se"].notna().all()
    assert all(row["condition"] in row_text(row) for row in rows)
