"""Runs of the long mode by the fake worker, which makes a clip a video."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from vbench_runs import run_fake, write_clip, write_clips

from mla_study.evaluation.vbench.long.averages import LongScores
from mla_study.evaluation.vbench.long.configs import load_configs
from mla_study.evaluation.vbench.prompts import Entry
from mla_study.evaluation.vbench.runs import plan
from mla_study.evaluation.vbench.runs import run as running
from mla_study.evaluation.vbench.runs.long_tables import video_rows
from mla_study.evaluation.vbench.runs.scoring import Finished, LongOptions
from mla_study.evaluation.vbench.runs.tables import score_table

SCORER = "aesthetic_quality"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.weights, "require", lambda *_, **__: None)


def long_clips(folder: Path, name: str, count: int, seed: int) -> Path:
    """Videos NAME-0.mp4, NAME-1.mp4, ... of 6 s."""
    folder.mkdir()
    for number in range(count):
        write_clip(folder / f"{name}-{number}.mp4", frames=6, fps=1, seed=seed + number)
    return folder


def run_long(
    monkeypatch: pytest.MonkeyPatch, clips: Path, out: Path, **more: object
) -> tuple[Finished, list[str]]:
    options = LongOptions(load_configs(None), dev=False)
    return run_fake(monkeypatch, clips, out, (SCORER,), mode="long", long=options, **more)


def test_videos_below_five_seconds_make_no_full_score(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    clips = write_clips(tmp_path / "clips", {"a": 2, "b_c": 2}, seed)
    done, said = run_long(monkeypatch, clips, tmp_path / "out")
    (row,) = done.table.to_dict("records")
    assert (row["videos"], row["wanted"], row["validity"]) == (4, 4, "partial")
    assert row["why"] == "4 of 4 videos last less than the 5 s of a long video"
    assert set(done.record["tables"]) >= {"table", "clips", "problems"}
    table = pd.read_csv(tmp_path / "out" / "problems.csv")
    mine = table[table["name"] == "b_c-0.mp4"]["what"]
    assert [what[:13] for what in mine] == [
        "lasts 0.75 s,", "makes a singl", "has a '_' in "
    ]  # fmt: skip
    assert any(sentence.startswith("2 more notes on videos stand in") for sentence in said)


def test_long_videos_are_full_unless_clips_fail_or_videos_are_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    folder = long_clips(tmp_path / "clips", "v", 3, seed)
    done, _ = run_long(monkeypatch, folder, tmp_path / "out")
    assert list(done.table["validity"]) == ["full"]
    (folder / "v-3.mp4").write_bytes(b"none")
    fewer, _ = run_long(monkeypatch, folder, tmp_path / "out", skip_bad=True)
    (row,) = fewer.table.to_dict("records")
    assert (row["videos"], row["wanted"], row["validity"]) == (3, 4, "partial")
    assert row["why"] == "1 bad video was skipped"


def test_videos_of_vbenchs_prompts_are_counted_prompt_by_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    folder = long_clips(tmp_path / "clips", "a cat", 5, seed)
    suite = {prompt: Entry(prompt, frozenset({SCORER})) for prompt in ("a cat", "rain")}
    monkeypatch.setattr(running, "suite_of", lambda _: (suite, "f" * 64))
    done, _ = run_long(monkeypatch, folder, tmp_path / "out")
    (row,) = done.table.to_dict("records")
    assert (row["videos"], row["wanted"], row["validity"]) == (5, 10, "partial")
    assert row["why"] == "1 of 2 prompts lack videos"
    table = pd.read_csv(tmp_path / "out" / "problems.csv").set_index("name")["what"]
    assert table["rain"] == "no video of this prompt (5 wanted)"


def test_where_the_average_leaves_no_video_there_is_no_score() -> None:
    names = ["dimension", "video", "clip", "in_clip", "clip_to_clip", "mapped", "value"]
    found = LongScores(pd.DataFrame(columns=names), pd.DataFrame(), ())
    clips = pd.DataFrame({"video": ["a.mp4"], "dimension": [SCORER], "frames": [4]})
    shown = video_rows(found, clips, ())
    assert shown.empty and {"video_s", "clip"} <= set(shown)
    table = score_table(shown, (SCORER,), {SCORER: 1}, model="m", mode="long")
    assert table.empty and {"scorer", "value"} <= set(table)
