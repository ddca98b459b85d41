"""A run, interrupted, sharded and repeated, by a worker that costs nothing."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from vbench_runs import run_fake, write_clip, write_clips

from mla_study.errors import UserError
from mla_study.evaluation.vbench.prompts import Entry
from mla_study.evaluation.vbench.runs import run as running
from mla_study.evaluation.vbench.runs import scoring, videos
from mla_study.evaluation.vbench.runs.drive import Job
from mla_study.evaluation.vbench.runs.store import FILE, locked
from mla_study.study.runs import read_result

PROMPTS = {"a cat": 3, "two dogs - running": 2, "rain": 2}
SCORERS = ("temporal_flickering", "motion_smoothness")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake worker reads none."""
    from mla_study.evaluation.vbench.runs import plan

    monkeypatch.setattr(plan.weights, "require", lambda *_, **__: None)


@pytest.fixture
def clips(tmp_path: Path, seed: int) -> Path:
    return write_clips(tmp_path / "clips", PROMPTS, seed)


def same(one: Path, two: Path) -> None:
    for name in ("table", "videos"):
        pd.testing.assert_frame_equal(read_result(one).tables[name], read_result(two).tables[name])


def test_scores_are_means_by_terms(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    done, said = run_fake(monkeypatch, clips, tmp_path / "out", SCORERS)
    rows = done.table.set_index("scorer")
    for scorer in SCORERS:
        mine = done.videos[done.videos["scorer"] == scorer]
        expected = (mine["value"] * mine["terms"]).sum() / mine["terms"].sum()
        assert rows.at[scorer, "value"] == pytest.approx(expected)
        assert rows.at[scorer, "videos"] == 7 and rows.at[scorer, "prompts"] == 3
    assert not done.failures and not said
    record = read_result(tmp_path / "out").run
    assert (record["provenance"], record["validity"]) == ("measured", "full")
    assert record["identity"]["config"]["protocol"]["patches"] == ["a patch"]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_tables(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path, workers: int
) -> None:
    run_fake(monkeypatch, clips, tmp_path / "one", SCORERS)
    run_fake(monkeypatch, clips, tmp_path / "more", SCORERS, devices=("cpu",) * workers)
    same(tmp_path / "one", tmp_path / "more")


def test_a_second_run_starts_no_worker_and_a_changed_video_is_scored_alone(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "out"
    first, _ = run_fake(monkeypatch, clips, out)
    asked: list[str] = []
    true = scoring.drive

    def watched(jobs: Mapping[str, Sequence[Job]], *rest: Any) -> dict[str, str]:
        asked.extend(job.name for mine in jobs.values() for job in mine)
        return true(jobs, *rest)

    monkeypatch.setattr(scoring, "drive", watched)
    again, _ = run_fake(monkeypatch, clips, out)
    assert not asked
    pd.testing.assert_frame_equal(first.table, again.table)
    write_clip(clips / "rain-1.mp4", seed=seed + 7777)
    changed, _ = run_fake(monkeypatch, clips, out)
    assert asked == ["rain-1.mp4"]
    differs = changed.videos["value"] != first.videos["value"]
    assert list(changed.videos["video"][differs]) == ["rain-1.mp4"]


def test_shards_join_to_the_single_run(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    run_fake(monkeypatch, clips, tmp_path / "one", SCORERS)
    for index in (0, 1):
        part, _ = run_fake(monkeypatch, clips, tmp_path / "two", SCORERS, shard=(index, 2))
        assert part.folder == tmp_path / "two" / f"shard-{index}-of-2"
    monkeypatch.setattr(scoring, "drive", None)
    joined, said = run_fake(monkeypatch, clips, tmp_path / "two", SCORERS)
    assert len(joined.videos) == 14 and len(said) == 2
    same(tmp_path / "one", tmp_path / "two")


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import pytest
from vbench_runs import run_fake
with pytest.MonkeyPatch.context() as patch:
    from mla_study.evaluation.vbench.runs import plan
    patch.setattr(plan.weights, "require", lambda *_, **__: None)
    run_fake(patch, Path({clips!r}), Path({out!r}), {scorers!r}, devices=("cpu", "cpu"))
"""


def test_killed_in_the_middle_it_goes_on_to_the_same_tables(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    out, here = tmp_path / "killed", Path(__file__).parent
    code = KILLED.format(
        tests=str(here.parents[2]), clips=str(clips), out=str(out), scorers=SCORERS
    )
    environment = {**os.environ, "FAKE_SLEEP": "0.15"}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while _count(out) < 4:
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    held = _count(out)
    assert 4 <= held < 14 and not (out / "run.json").exists()
    run_fake(monkeypatch, clips, out, SCORERS)
    run_fake(monkeypatch, clips, tmp_path / "calm", SCORERS)
    same(out, tmp_path / "calm")


def _count(out: Path) -> int:
    if not (out / FILE).exists():
        return 0
    try:
        with sqlite3.connect(out / FILE) as db:
            return int(db.execute("select count(*) from scores").fetchone()[0])
    except sqlite3.Error:
        return 0


def test_a_worker_killed_by_a_video_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    (clips / "a cat-1.kill").touch()
    (clips / "rain-0.fail").touch()
    done, said = run_fake(monkeypatch, clips, tmp_path / "out", SCORERS)
    assert len(done.videos) == 10
    reasons = {problem.name: problem.what for problem in done.failures}
    assert "want of memory" in reasons["a cat-1.mp4"]
    assert "NaN" in reasons["rain-0.mp4"]
    assert any("a cat-1.mp4" in sentence for sentence in said)
    assert set(done.table["validity"]) == {"partial"}
    table = pd.read_csv(tmp_path / "out" / "problems.csv")
    assert {"a cat-1.mp4", "rain-0.mp4"} <= set(table["name"])


def test_a_scorer_that_cannot_start_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_BROKEN", "motion_smoothness")
    done, _ = run_fake(monkeypatch, clips, tmp_path / "out", SCORERS)
    assert done.stopped == {"motion_smoothness": "its weights are not to its liking"}
    assert list(done.table["scorer"]) == ["temporal_flickering"]


def test_prompts_of_the_suite_choose_videos_and_a_lack_makes_scores_partial(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    suite = {
        "a cat": Entry(
            "a cat", frozenset({"scene", "subject_consistency"}), {"scene": {"scene": "x"}}
        ),
        "rain": Entry("rain", frozenset({"subject_consistency"})),
        "snow": Entry("snow", frozenset({"subject_consistency"})),
    }
    monkeypatch.setattr(running, "suite_of", lambda _: (suite, "f" * 64))
    scorers = ("scene", "subject_consistency")
    done, said = run_fake(monkeypatch, clips, tmp_path / "out", scorers, mode="short")
    rows = done.table.set_index("scorer")
    assert (rows.at["scene", "videos"], rows.at["scene", "wanted"]) == (3, 5)
    assert (rows.at["subject_consistency", "videos"], rows.at["subject_consistency", "wanted"]) == (
        5,
        15,
    )
    assert set(rows["validity"]) == {"partial"} and not said
    assert done.odd() == f"5 notes: {tmp_path / 'out' / 'problems.csv'}"
    table = pd.read_csv(tmp_path / "out" / "problems.csv").set_index("name")["what"]
    assert table["a cat"].startswith("3 of 5") and table["snow"].startswith("no video")
    assert "none of the suite" in table["two dogs - running-0.mp4"]
    with pytest.raises(UserError, match=r"no video in .* is of a prompt"):
        run_fake(monkeypatch, clips, tmp_path / "other", ("human_action",), mode="short")


def test_bad_videos_are_listed_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    (clips / "rain-0.mp4").write_bytes(b"no video")
    write_clip(clips / "rain-1.mp4", frames=1)
    whole = (clips / "a cat-0.mp4").read_bytes()
    with pytest.raises(UserError, match=r"rain-0.mp4 does not decode.*1 more.*--skip-bad"):
        run_fake(monkeypatch, clips, tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "problems.csv")
    assert list(table["name"]) == ["rain-0.mp4", "rain-1.mp4"] and table["fatal"].all()
    write_clip(clips / "rain-2.mp4", size=(33, 48), seed=5)
    done, said = run_fake(monkeypatch, clips, tmp_path / "out", skip_bad=True)
    assert len(done.videos) == 6
    (row,) = done.table.to_dict("records")
    assert (row["videos"], row["wanted"], row["validity"]) == (6, 8, "partial")
    assert row["why"] == "2 bad videos were skipped"
    assert said[0].startswith("2 of 8 videos are skipped")
    assert done.odd().startswith("2 failures and 1 note: ")
    table = pd.read_csv(tmp_path / "out" / "problems.csv")
    assert list(table["name"]) == ["rain-0.mp4", "rain-1.mp4", "rain-2.mp4"]
    assert list(table["fatal"]) == [True, True, False]
    kept = read_result(tmp_path / "out").tables["problems"]
    assert list(kept["what"]) == list(table["what"]) and "odd size" in kept["what"].iloc[2]
    assert (clips / "a cat-0.mp4").read_bytes() == whole


def test_videos_of_other_formats_are_said_to_be_left_out(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    (clips / "sun.webm").write_bytes(b"")
    done, said = run_fake(monkeypatch, clips, tmp_path / "out")
    assert len(done.videos) == 7
    assert "sun.webm is left out: only .mp4 is read, convert what should count" in said


def test_a_score_of_a_part_of_the_frames_is_none(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    (clips / "rain-0.short").touch()
    scorers = ("temporal_flickering", "dynamic_degree")
    done, _ = run_fake(monkeypatch, clips, tmp_path / "out", scorers)
    rows = done.table.set_index("scorer")
    # dynamic degree samples frames: that it looked at three is no fault
    assert rows["validity"].to_dict() == {scorers[0]: "partial", scorers[1]: "full"}
    assert rows.at[scorers[0], "why"] == "1 video has no score"
    (failure,) = done.failures
    assert failure.name == "rain-0.mp4" and "3 of 6 frames" in failure.what
    (clips / "rain-0.short").unlink()
    again, _ = run_fake(monkeypatch, clips, tmp_path / "out", scorers)
    assert set(again.table["validity"]) == {"full"} and not again.failures


def test_what_an_earlier_version_saw_of_a_file_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_fake(monkeypatch, clips, out)
    looked: list[str] = []
    true = videos.look

    def look(path: Path) -> dict[str, Any]:
        looked.append(path.name)
        return true(path)

    monkeypatch.setattr(videos, "look", look)
    run_fake(monkeypatch, clips, out)
    assert not looked
    with sqlite3.connect(out / FILE) as db:
        db.execute("update files set facts = json_remove(facts, '$.look') where path like '%rain%'")
    run_fake(monkeypatch, clips, out)
    assert sorted(looked) == ["rain-0.mp4", "rain-1.mp4"]


def test_a_table_of_prompts_that_leaves_videos_out_is_noted(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    (clips / "prompts.csv").write_text("file,prompt\nrain-0.mp4,rain\n")
    done, _ = run_fake(monkeypatch, clips, tmp_path / "out")
    (problem,) = done.problems
    assert problem.name == "prompts.csv" and not problem.fatal
    assert problem.what == "tells nothing of 6 of the 7 videos: they have no prompt"


def test_one_run_at_a_time_in_a_folder(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    with locked(tmp_path / "out"), pytest.raises(UserError, match=r"another run .* works in"):
        run_fake(monkeypatch, clips, tmp_path / "out")


def test_scores_by_random_weights_are_no_measurement(
    monkeypatch: pytest.MonkeyPatch, clips: Path, tmp_path: Path
) -> None:
    from mla_study.evaluation.vbench.runs import plan

    monkeypatch.setattr(plan.weights, "is_random", lambda *_: True)
    run_fake(monkeypatch, clips, tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert (result.provenance, result.validity) == ("null-model", "invalid")
    assert set(result.table["validity"]) == {"invalid"}
