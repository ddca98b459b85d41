from pathlib import Path

import pandas as pd
import pytest

from mla_study.errors import UserError
from mla_study.training.data.captions import read_folder, read_prompts
from mla_study.world.grammar import parse_caption

ROWS = [{"file": "b.mp4", "caption": "a cat, asleep"}, {"file": "a.mp4", "caption": "ein Hund ü"}]


def table(folder: Path, kind: str, rows: list[dict[str, object]]) -> Path:
    path = folder / f"captions.{kind}"
    frame = pd.DataFrame(rows)
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("names", [("file", "caption"), ("video", "prompt"), ("path", "text")])
def test_tables_of_every_kind_say_the_same(
    tmp_path: Path, kind: str, names: tuple[str, str]
) -> None:
    rows: list[dict[str, object]] = [
        {names[0]: row["file"], names[1]: row["caption"]} for row in ROWS
    ]
    for row in ROWS:
        (tmp_path / row["file"]).touch()
    path = table(tmp_path, kind, rows)
    found = [(one.video.name, one.caption) for one in read_folder(tmp_path)]
    assert found == [("a.mp4", "ein Hund ü"), ("b.mp4", "a cat, asleep")]
    assert read_prompts(path) == ["a cat, asleep", "ein Hund ü"]


def test_captions_beside_the_videos(tmp_path: Path) -> None:
    for name in ("z", "y"):
        (tmp_path / f"{name}.webm").touch()
        (tmp_path / f"{name}.txt").write_text(f" shows {name}\n")
    assert [one.caption for one in read_folder(tmp_path)] == ["shows y", "shows z"]
    (tmp_path / "z.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"z\.txt is empty"):
        read_folder(tmp_path)
    (tmp_path / "z.txt").unlink()
    with pytest.raises(UserError, match=r"z\.webm has no caption: add z\.txt"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("csv", "file,caption\na.mp4,x\na.mp4,\n", "row 2: there is no caption"),
        ("csv", "file,caption\n,x\n", "row 1: there is no file"),
        ("csv", "file,caption\na.mp4,x\nc.mp4,x\n", "row 2: c.mp4 is not there"),
        ("csv", "file,caption\na.mp4,x,y,z\na.mp4,x,y,z,w\n", "line 3"),
        ("csv", "", "cannot be read as a table"),
        ("jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file"\n', "row 2 is no JSON"),
        ("jsonl", '{"file": "a.mp4", "caption": 3}\n', "row 1: there is no caption"),
        ("jsonl", '["a.mp4"]\n', "row 1 is no JSON object"),
        ("parquet", "none", "cannot be read as a table"),
    ],
)
def test_a_row_that_does_not_parse_is_named(
    tmp_path: Path, kind: str, text: str, sentence: str
) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / f"t.{kind}").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_folder(tmp_path)


def test_prompts_of_a_list_are_checked_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    good = "slow red disc moving left top center on night"
    path.write_text(f"{good}\n\n  {good} \n")
    assert read_prompts(path, parse_caption) == [good, good]
    path.write_text(f"{good}\n\na cat\n")
    with pytest.raises(UserError, match=r"prompts\.txt, line 3: 'a cat' is no caption"):
        read_prompts(path, parse_caption)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(path)


def test_a_folder_without_videos_and_one_with_two_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no video with a caption"):
        read_folder(tmp_path)
    for kind in ("csv", "jsonl"):
        (tmp_path / f"t.{kind}").write_text("")
    with pytest.raises(UserError, match=r"several tables \(t\.csv, t\.jsonl\)"):
        read_folder(tmp_path)
