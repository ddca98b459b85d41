"""A run is full only if every prompt of the protocol has its videos."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from vbench_runs import run_fake, write_clip, write_clips

from mla_study.errors import UserError
from mla_study.evaluation.vbench.prompts import Entry
from mla_study.evaluation.vbench.runs import plan, tables
from mla_study.evaluation.vbench.runs import run as running

FLICKER, SUBJECT = "temporal_flickering", "subject_consistency"
PROMPTS = ("a still pond", "a parked car", "a clock")


@pytest.fixture(autouse=True)
def suite(monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """Three prompts of temporal flickering and two of subject consistency, with no weights."""
    made = {prompt: Entry(prompt, frozenset({FLICKER})) for prompt in PROMPTS}
    made |= {prompt: Entry(prompt, frozenset({SUBJECT})) for prompt in ("a cat", "rain")}
    monkeypatch.setattr(running, "suite_of", lambda _: (made, "f" * 64))
    monkeypatch.setattr(plan.weights, "require", lambda *_, **__: None)
    return made


def problems(out: Path) -> dict[str, str]:
    table = pd.read_csv(out / "problems.csv")
    return dict(zip(table["name"], table["what"], strict=True))


def test_many_videos_of_one_prompt_do_not_stand_for_those_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    clips = write_clips(tmp_path / "clips", {PROMPTS[0]: 25}, seed)
    out = tmp_path / "out"
    done, _ = run_fake(monkeypatch, clips, out, (FLICKER,), mode="short")
    (row,) = done.table.to_dict("records")
    assert (row["videos"], row["wanted"], row["validity"]) == (5, 15, "partial")
    assert row["why"] == "2 of 3 prompts lack videos"
    assert problems(out)[PROMPTS[1]] == "no video of this prompt (25 wanted)"
    assert tables.text_table(done.table).startswith("short mode ")
    assert "5 of 15  partial" in tables.text_table(done.table)
    assert "(partial): 2 of 3 prompts lack videos" in tables.text_table(done.table)
    raw, _ = run_fake(
        monkeypatch, clips, tmp_path / "raw", (FLICKER,), mode="short", static_filter=False
    )
    (row,) = raw.table.to_dict("records")
    assert (row["videos"], row["wanted"], row["validity"]) == (25, 75, "partial")


def test_a_complete_set_is_full_though_the_static_filter_leaves_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    clips = write_clips(tmp_path / "clips", dict.fromkeys(PROMPTS, 25), seed)
    for index in range(23):
        (clips / f"a clock-{index}.moves").touch()
    done, said = run_fake(monkeypatch, clips, tmp_path / "out", (FLICKER,), mode="short")
    (row,) = done.table.to_dict("records")
    assert (row["videos"], row["wanted"], row["validity"], row["why"]) == (12, 12, "full", "")
    assert "12 of 75 videos are static enough" in said
    part, _ = run_fake(monkeypatch, clips, tmp_path / "out", (FLICKER,), mode="short", shard=(0, 2))
    assert set(part.table["validity"]) == {"partial"}
    (clips / "a clock-3.fail").touch()
    hurt, _ = run_fake(monkeypatch, clips, tmp_path / "hurt", (FLICKER,), mode="short")
    (row,) = hurt.table.to_dict("records")
    assert (row["wanted"], row["validity"]) == (15, "partial")
    assert row["why"] == "the static filter judged 74 of 75 videos"
    assert hurt.failures[0].name == "a clock-3.mp4"


def test_without_its_static_filter_temporal_flickering_is_never_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    clips = write_clips(tmp_path / "clips", dict.fromkeys(PROMPTS, 25), seed)
    forbidden, _ = run_fake(
        monkeypatch, clips, tmp_path / "out", (FLICKER,), mode="short", static_filter=False
    )

    def refuse(scorers: list[str], *_: object, **__: object) -> None:
        if "static_filter" in scorers:
            raise UserError("raft-things.pth is missing")

    monkeypatch.setattr(plan.weights, "require", refuse)
    absent, said = run_fake(monkeypatch, clips, tmp_path / "out", (FLICKER,), mode="short")
    for done in (forbidden, absent):
        (row,) = done.table.to_dict("records")
        assert (row["videos"], row["wanted"], row["validity"]) == (75, 75, "partial")
        assert row["why"] == "moving videos were not left out, as the protocol demands"
    assert "raft-things.pth is missing" in said[0]


def test_a_video_counts_once_and_only_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    clips = write_clips(tmp_path / "clips", {"a cat": 4, "rain": 5}, seed)
    for number, name in enumerate(("a cat", "a cat-00", "a cat-7")):
        write_clip(clips / f"{name}.mp4", seed=seed + 9000 + number)
    out = tmp_path / "out"
    done, _ = run_fake(monkeypatch, clips, out, (SUBJECT,), mode="short")
    (row,) = done.table.to_dict("records")
    assert (row["videos"], row["wanted"], row["validity"]) == (9, 10, "partial")
    told = problems(out)
    assert told["a cat"] == "4 of 5 videos of this prompt, without index 4"
    assert told["a cat.mp4"] == "is video 0 of its prompt, as a cat-0.mp4 is: left out"
    assert told["a cat-00.mp4"] == told["a cat.mp4"]
    assert told["a cat-7.mp4"].startswith("its index is beyond the 5 videos")
    assert set(done.videos["video"]) == {
        *(f"a cat-{i}.mp4" for i in range(4)), *(f"rain-{i}.mp4" for i in range(5))
    }  # fmt: skip
    write_clip(clips / "a cat-4.mp4", seed=seed + 9100)
    whole, _ = run_fake(monkeypatch, clips, out, (SUBJECT,), mode="short")
    assert list(whole.table["validity"]) == ["full"]


def test_a_video_that_fails_is_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    clips = write_clips(tmp_path / "clips", {"a cat": 5, "rain": 5}, seed)
    (clips / "rain-1.fail").touch()
    done, _ = run_fake(monkeypatch, clips, tmp_path / "out", (SUBJECT,), mode="short")
    (row,) = done.table.to_dict("records")
    assert (row["videos"], row["validity"], row["why"]) == (9, "partial", "1 video has no score")
