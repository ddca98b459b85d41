"""Parts of the worker that need neither VBench nor weights: answers, names, what a file lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_study.evaluation.vbench.worker import media, objects, patches, pictures, serve
from mla_study.evaluation.vbench.worker.content import action_in
from mla_study.evaluation.vbench.worker.scorers import PLACES, find


def raising(error: Exception) -> Any:
    def score(line: dict[str, Any]) -> dict[str, Any]:
        raise error

    return score


def test_a_score_is_told_with_time_memory_and_defaults() -> None:
    said = serve.answer(lambda _: {"value": True, "terms": 3, "frames": 4}, {"id": "a"})
    assert said.pop("seconds") >= 0 and said.pop("rss_mib") > 10
    assert said == {
        "event": "score", "id": "a", "value": 1.0, "terms": 3, "frames": 4, "counted": True,
        "more": {},
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_fails(value: float) -> None:
    said = serve.answer(lambda _: {"value": value, "terms": 1, "frames": 1}, {"id": "a"})
    assert said == {"event": "failed", "id": "a", "reason": f"VBench's score of it is {value}"}


def test_what_json_does_not_know_fails() -> None:
    found = {"value": 1.0, "terms": 1, "frames": 1, "more": {"x": float("nan")}}
    assert serve.answer(lambda _: found, {"id": "a"})["event"] == "failed"


def test_errors_become_one_line_and_a_lost_gpu_ends_the_worker() -> None:
    said = serve.answer(raising(RuntimeError("two\nlines")), {"id": "a"})
    assert said == {"event": "failed", "id": "a", "reason": "RuntimeError: two lines"}
    said = serve.answer(raising(ValueError("its own words")), {"id": "a"})
    assert said["reason"] == "its own words"
    with pytest.raises(serve.LostDeviceError, match="illegal memory access"):
        serve.answer(raising(RuntimeError("CUDA error: an illegal memory access")), {"id": "a"})


def test_every_scorer_has_a_loader() -> None:
    here = [name for name, place in PLACES.items() if not place.startswith("long")]
    assert len([name for name in here if "[" not in name]) == 17
    assert all(callable(find(name)) for name in here)
    with pytest.raises(ValueError, match="no scorer 'x'"):
        find("x")


def test_a_video_is_seen_under_its_name_and_nothing_is_left(tmp_path: Path) -> None:
    video = tmp_path / "4f2a.bin"
    video.write_bytes(b"frames")
    line = {"id": "a", "path": str(video), "name": "A person is riding a bike-0.mp4"}
    with media.under_its_name(line) as path:
        link = Path(path)
        assert link.name == line["name"] and link.read_bytes() == b"frames"
        assert action_in(path) == "riding a bike"
    assert not link.parent.exists() and video.exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    assert media.need(tmp_path, "there") == [str(tmp_path / "there")]
    with pytest.raises(ValueError, match=r"a/b\.pth, c is missing in the weights folder"):
        media.need(tmp_path, "a/b.pth", "there", "c")
    with pytest.raises(ValueError, match="no prompt"):
        pictures.told({"prompt": None, "auxiliary": {"color": "red"}}, "color")
    with pytest.raises(ValueError, match="nothing is told about its color"):
        pictures.told({"prompt": "a red car", "auxiliary": None}, "color")


def test_a_file_must_hold_every_parameter_in_its_shape() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, bias=False))
    state = dict(model.state_dict())
    patches.lacking(model, {**state, "more": torch.zeros(1)}, "f")
    patches.lacking(model, {"0.weight": state["0.weight"], "1.weight": state["1.weight"]}, "f",
                    computed=("0.bias",))  # fmt: skip
    with pytest.raises(ValueError, match=r"1 of 3 parameters .* the first 0\.bias"):
        patches.lacking(model, {**state, "0.bias": torch.zeros(4)}, "f")
    with pytest.raises(ValueError, match="3 of 3 parameters"):
        patches.lacking(model, {"module": state}, "f")
    with pytest.raises(ValueError, match="holds a list"):
        patches.lacking(model, [state], "f")
    model[1].weight = torch.nn.Parameter(torch.zeros(2, 3))
    tied = torch.nn.ModuleList([model[1], model[1]])
    patches.lacking(tied, {"1.weight": torch.zeros(2, 3)}, "f")


def test_a_detector_is_watched() -> None:
    class Broken:
        def run_caption_tensor(self, frame: Any) -> Any:
            raise ArithmeticError(f"frame {frame}")

    watched = objects.Watched(Broken())
    for frame in (1, 2):
        with pytest.raises(ArithmeticError):
            watched.run_caption_tensor(frame)
    assert str(watched.error) == "frame 1" and watched.frames == 2


def test_the_recorded_exchanges_are_lines_of_the_protocol(fixtures: Path) -> None:
    for exchange in json.loads((fixtures / "vbench" / "grit_without_detectron2.json").read_text()):
        assert exchange["response"]["event"] == "error"
        assert "detectron2" in exchange["response"]["reason"]
