"""Videos and prompts, good and bad."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from vbench_runs import write_clip, write_clips

from mla_study.errors import UserError
from mla_study.evaluation.vbench import prompts
from mla_study.evaluation.vbench.prompts import Told
from mla_study.evaluation.vbench.runs import videos


def sound(path: Path) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


def test_a_good_video_is_told_by_frames_rate_and_size(tmp_path: Path) -> None:
    write_clip(tmp_path / "a - b-3.mp4", frames=7, size=(34, 50), fps=25)
    (video,), problems = videos.examine(videos.find(tmp_path))
    assert (video.frames, video.fps, video.width, video.height) == (7, "25", 50, 34)
    assert (video.prompt, video.index) == ("a - b", 3)
    assert video.seconds == pytest.approx(0.28) and not problems


def test_what_cannot_be_scored_is_said(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "good-0.mp4", frames=40).read_bytes()
    (tmp_path / "broken-0.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text-0.mp4").write_text("no video")
    write_clip(tmp_path / "still-0.mp4", frames=1)
    sound(tmp_path / "sound-0.mp4")
    write_clip(tmp_path / "odd-0.mp4", size=(33, 47))
    seen, problems = videos.examine(videos.find(tmp_path))
    assert [video.name for video in seen] == ["good-0.mp4", "odd-0.mp4"]
    what = {problem.name: problem for problem in problems}
    assert "1 frame," in what["still-0.mp4"].what
    assert "only sound" in what["sound-0.mp4"].what
    assert "decode" in what["text-0.mp4"].what and what["broken-0.mp4"].fatal
    assert not what["odd-0.mp4"].fatal and "odd size 47 x 33" in what["odd-0.mp4"].what


def test_two_streams_are_noted(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "two-0.mp4"), "w") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for stream in streams:
            for level in (20, 90, 200):
                picture = np.full((32, 32, 3), level, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    (_,), (problem,) = videos.examine(videos.find(tmp_path))
    assert "2 video streams" in problem.what and not problem.fatal


def test_a_cut_file_whose_header_is_in_front_is_found_out(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "front-0.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(40):
            picture = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert "problem" in videos.look(path)
    path.write_bytes(whole)
    assert "problem" not in videos.look(path)


def overwritten(whole: bytes, at: int, count: int) -> bytes:
    """With ``count`` bytes set to nought from ``at`` on."""
    return whole[:at] + bytes(count) + whole[at + count :]


def test_a_video_that_is_damaged_in_the_middle_is_found_out(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = write_clip(tmp_path / "hurt-0.mp4", frames=60)
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        places = sorted(p.pos for p in container.demux(video=0) if p.pos is not None)
    path.write_bytes(overwritten(whole, places[25], 3000))
    assert len(path.read_bytes()) == len(whole)
    _, (problem,) = videos.examine(videos.find(tmp_path))
    assert problem.fatal
    matched = re.match(r"is damaged: (\d+) of 60 frames decode", problem.what)
    assert matched is not None and 20 < int(matched[1]) < 60
    # the head of a single picture, in whose place a reader shows the one before
    path.write_bytes(overwritten(whole, places[30], 12))
    _, (problem,) = videos.examine(videos.find(tmp_path))
    assert problem.fatal and problem.what.startswith("is damaged: 59 of 60 frames decode")


def test_frames_that_an_edit_list_hides_are_no_damage(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    whole = write_clip(tmp_path / "whole.mp4", frames=20)
    (tmp_path / "clips").mkdir()
    path = tmp_path / "clips" / "trimmed-0.mp4"
    with av.open(str(whole)) as read, av.open(str(path), "w") as container:
        stream = read.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for packet in read.demux(stream):
            if packet.dts is not None:
                early = int(5 / 8 / stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - early, packet.dts - early, copy
                container.mux(packet)
    (video,), (problem,) = videos.examine(videos.find(tmp_path / "clips"))
    assert video.frames == 15 and not problem.fatal
    assert "an edit list hides 5 frames" in problem.what


def test_places_without_videos_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        videos.find(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no \.mp4 video: VBench"):
        videos.find(tmp_path)
    (tmp_path / "a.webm").touch()
    with pytest.raises(UserError, match=r"a\.webm must be converted first"):
        videos.find(tmp_path)


def test_a_table_of_prompts_frees_names(tmp_path: Path) -> None:
    write_clips(tmp_path, {"x": 2})
    rows = [
        {"file": "x-0.mp4", "prompt": "a cat", "told": "a cat, long"},
        {"file": "x-1.mp4", "prompt": "b", "index": 4},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = videos.find(tmp_path)
    assert list(found.values()) == [Told("a cat", 0, "a cat, long"), Told("b", 4)]
    (tmp_path / "prompts.csv").write_text("file,prompt\nx-0.mp4,a\ny.mp4,b\n")
    with pytest.raises(UserError, match=r"names y\.mp4, which"):
        videos.find(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "file,text\nx,y\n", "row 1 lacks file or prompt"),
        (
            "b.csv",
            "file,prompt,index\nx,y,first\n",
            "row 1: index 'first' is no number from 0 (a prompt",
        ),
        ("c.csv", "file,prompt\nx,y\nx,z\n", "row 2 names x a second time"),
        ("d.jsonl", '{"file": "x", "prompt": "y"}\n{"file"\n', "line 2 is no JSON"),
        ("e.jsonl", "[1]\n", "line 1 is no object"),
        ("f.csv", "", "holds no row"),
        (
            "g.csv",
            "file,prompt\nx,y\nz,In a still frame, a stop sign\n",
            "row 2 (z) has more cells",
        ),
        ("h.csv", "file,prompt\nx,\n", "row 1 (x) has an empty prompt"),
        ("i.jsonl", '{"file": "x", "prompt": " "}\n', "row 1 (x) has an empty prompt"),
        (
            "j.csv",
            "file,prompt,index\nx,y,1\nz,y,1\n",
            "row 2: z is video 1 of its prompt, as x is",
        ),
        ("k.csv", "file,prompt\nx-0.mp4,y\nz.mp4,y\n", "z.mp4 is video 0 of its prompt, as x-0"),
        ("l.csv", "file,prompt,index\nx,y,²\n", "row 1: index '²' is no number"),
        ("m.csv", "file,prompt,index\nx,y,99999999999999999999\n", "is no number from 0"),
    ],
)
def test_bad_tables_are_refused_by_row(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(says)):
        prompts.read_table(tmp_path / name)


def test_prompts_that_are_listed_twice_are_joined(tmp_path: Path) -> None:
    rows = [
        {
            "prompt_en": "a",
            "dimension": ["scene"],
            "auxiliary_info": {"scene": {"scene": {"scene": "x"}}},
        },
        {"prompt_en": "a", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    ]
    (tmp_path / "info.json").write_text(json.dumps(rows))
    entry = prompts.read_suite(tmp_path / "info.json")["a"]
    assert entry.dimensions == {"scene", "color"} and set(entry.auxiliary) == {"scene", "color"}
    (tmp_path / "info.json").write_text("{}{")
    with pytest.raises(UserError, match="make setup-vbench"):
        prompts.read_suite(tmp_path / "info.json")


def test_names_end_in_a_number_or_are_prompts() -> None:
    assert prompts.split_name("a person is x-ing-12.mp4") == Told("a person is x-ing", 12)
    assert prompts.split_name("In a still frame, a stop sign.-0.mp4") == Told(
        "In a still frame, a stop sign.", 0
    )
    assert prompts.split_name("clip.mp4") == Told("clip")
    assert prompts.split_name("x-²-99999999999999999999.mp4").index is None


def test_a_prompt_in_quotation_marks_keeps_its_commas(tmp_path: Path) -> None:
    table = tmp_path / "prompts.csv"
    table.write_text('file,prompt\na.mp4,"In a still frame, a stop\u2028sign"\n')
    assert prompts.read_table(table)["a.mp4"].prompt == "In a still frame, a stop\u2028sign"
