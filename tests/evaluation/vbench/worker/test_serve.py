"""The worker's protocol, and the scorers whose weights are none or at hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vbench_worker import Worker, direct, interpreter, shifted

pytestmark = pytest.mark.slow
"""Importing torch and VBench takes a process ten seconds or more."""
FLICKER = "import json, sys; from vbench.temporal_flickering import cal_score\n"
FLICKER += "print(json.dumps([cal_score(path) for path in sys.argv[1:]]))"
START = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[START]:
    """Starts workers, and ends what the test leaves running."""
    python, begun = interpreter(), list[Worker]()

    def begin(scorer: str, weights: Path | None = None, **request: Any) -> Worker:
        log = tmp_path / f"worker{len(begun)}.log"
        begun.append(Worker(python, weights or tmp_path / "weights", scorer, log, **request))
        return begun[-1]

    yield begin
    for worker in begun:
        worker.process.kill()
        worker.process.communicate()


@pytest.fixture
def raft_small(assets: Path, tmp_path: Path) -> Path:
    """A weights folder with RAFT-small, real weights."""
    folder = tmp_path / "weights" / "substitutes"
    folder.mkdir(parents=True)
    shutil.copy(assets / "weights" / "raft-small.pth", folder)
    return folder.parent


@pytest.mark.assets
def test_flickering_of_real_clips_is_that_of_vbench_itself(
    start: START, assets: Path, tmp_path: Path
) -> None:
    clips = [assets / "clips" / f"{name}.mp4" for name in ("bbb_480p_5s", "nasa_13013")]
    worker = start("temporal_flickering")
    assert worker.said["event"] == "ready"
    assert worker.said["versions"]["vbench"] == "0.1.5" and worker.said["patches"] == []
    answers = [worker.ask(clip, id=f"clip {clip.stem}") for clip in clips]
    assert worker.end() == 0
    itself = direct(interpreter(), tmp_path, FLICKER, *map(str, clips))
    assert [answer["id"] for answer in answers] == [f"clip {clip.stem}" for clip in clips]
    assert [answer["value"] for answer in answers] == pytest.approx(itself, abs=1e-9)
    # measured once on these files
    assert answers[0]["value"] == pytest.approx(0.985218, abs=1e-5)
    assert [answer["terms"] for answer in answers] == [1, 1]
    assert answers[0]["frames"] == 120 and answers[1]["frames"] == 325
    assert all(answer["seconds"] > 0 and answer["rss_mib"] > 100 for answer in answers)


def test_videos_that_cannot_be_scored_fail_in_a_sentence_and_the_worker_goes_on(
    start: START, tmp_path: Path
) -> None:
    good = shifted(tmp_path / "good-0.mp4", 5, (1, 0))
    single = shifted(tmp_path / "single-0.mp4", 1, (0, 0))
    empty, junk = tmp_path / "empty-0.mp4", tmp_path / "junk-0.mp4"
    empty.touch()
    junk.write_bytes(b"no video" * 1000)
    cut = tmp_path / "cut-0.mp4"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with start("temporal_flickering") as worker:
        reasons = {
            path.stem: worker.ask(path)
            for path in (single, empty, junk, cut, tmp_path / "absent-0.mp4")
        }
        unnamed = worker.ask(good, name="good-0.webm")
        outside = worker.ask(good, name="../good-0.mp4")
        after = worker.ask(good)
        assert worker.end() == 0
    assert {answer["event"] for answer in reasons.values()} == {"failed"}
    told = {name: answer["reason"] for name, answer in reasons.items()}
    assert told["single-0"] == "single-0.mp4 has 1 frame, but 2 are needed"
    assert told["empty-0"] == "empty-0.mp4 is empty"
    assert told["junk-0"] == "junk-0.mp4 cannot be read as a video: it gives no frame"
    assert told["cut-0"] == "cut-0.mp4 cannot be read as a video: it gives no frame"
    assert told["absent-0"].endswith("absent-0.mp4 is no file")
    for answer in (unnamed, outside):
        assert "is no name of an .mp4 file" in answer["reason"]
    assert after["event"] == "score" and 0 < after["value"] < 1


@pytest.mark.assets
def test_raft_small_sees_a_shift_and_no_motion_in_a_frozen_video(
    start: START, raft_small: Path, tmp_path: Path
) -> None:
    moving = shifted(tmp_path / "moving-0.mp4", 6, (5, 3))
    frozen = shifted(tmp_path / "frozen-0.mp4", 6, (0, 0))
    short = shifted(tmp_path / "short-0.mp4", 2, (0, 0))
    # of the first there is no flow, of the second it is NaN, which would be no motion
    tiny = shifted(tmp_path / "tiny-0.mp4", 6, (5, 3), size=(16, 16))
    small = shifted(tmp_path / "small-0.mp4", 6, (5, 3), size=(120, 160))
    least = shifted(tmp_path / "least-0.mp4", 6, (5, 3), size=(122, 122))
    with start("dynamic_degree[raft-small]", raft_small) as worker:
        assert worker.said["event"] == "ready"
        answers = [worker.ask(path) for path in (moving, frozen)]
        refused = worker.ask(short)
        sizes = [worker.ask(path) for path in (tiny, small, least)]
        assert worker.end() == 0
    assert [answer["value"] for answer in answers] == [1.0, 0.0]
    assert [answer["frames"] for answer in answers] == [6, 6]
    # upstream's rule wants round(4 * 2 / 16) = 0 moves of it, and calls it moving
    assert refused["event"] == "failed" and "frames at 8 a second, but 3" in refused["reason"]
    flow = "are too small for optical flow: it needs 121 pixels a side"
    assert sizes[0]["reason"] == f"frames of 16 x 16 {flow}"
    assert sizes[1]["reason"] == f"frames of 160 x 120 {flow}"
    assert sizes[2]["value"] == 1.0


@pytest.mark.assets
def test_the_static_filter_keeps_a_frozen_video_and_drops_a_moving_one(
    start: START, raft_small: Path, tmp_path: Path
) -> None:
    frozen = shifted(tmp_path / "frozen-0.mp4", 6, (0, 0))
    moving = shifted(tmp_path / "moving-0.mp4", 6, (5, 3))
    short = shifted(tmp_path / "short-0.mp4", 4, (0, 0))
    with start("static_filter", raft_small, options={"small": True}) as worker:
        assert worker.said["patches"] == ["static_filter: device"]
        answers = [worker.ask(path) for path in (frozen, moving)]
        refused = worker.ask(short)
    assert [answer["value"] for answer in answers] == [1.0, 0.0]
    assert refused["reason"] == "short-0.mp4 has 4 frames, but 5 are needed"


def test_requests_that_cannot_be_served_end_in_one_error(start: START, tmp_path: Path) -> None:
    elsewhere = str(tmp_path)
    refusals = [
        start("nonsense"),
        start("temporal_flickering", versions={"vbench": "0.1.6", "no-such-package": "1"}),
        start("temporal_flickering", schema=2),
        start("object_class", detectron2=elsewhere),
        start("motion_smoothness"),
    ]
    assert {worker.said["event"] for worker in refusals} == {"error"}
    reasons = [worker.said["reason"] for worker in refusals]
    assert reasons[0] == "this worker has no scorer 'nonsense'"
    assert reasons[1].endswith("has no no-such-package, vbench 0.1.5 where 0.1.6 is expected")
    assert reasons[2] == "the request has schema 2, this worker 1"
    assert reasons[3] == f"{elsewhere} is no checkout of detectron2"
    assert reasons[4].startswith("amt_model/amt-s.pth is missing in the weights folder")
    assert [worker.end() for worker in refusals] == [2, 2, 2, 2, 2]


def test_grit_is_refused_as_recorded_where_detectron2_is_missing(
    start: START, fixtures: Path
) -> None:
    recorded = json.loads((fixtures / "vbench" / "grit_without_detectron2.json").read_text())
    code = "import importlib.util as u, json; print(json.dumps(u.find_spec('detectron2') is None))"
    if not direct(interpreter(), fixtures, code):
        pytest.skip("detectron2 is installed in VBench's environment")
    workers = {exchange["request"]["scorer"]: start(**exchange["request"]) for exchange in recorded}
    four = {"object_class", "multiple_objects", "color", "spatial_relationship"}
    assert set(workers) == four
    for exchange in recorded:
        worker = workers[exchange["request"]["scorer"]]
        assert worker.said == exchange["response"]
        assert worker.end() == 2
