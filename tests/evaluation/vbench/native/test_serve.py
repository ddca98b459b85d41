"""The worker process and its protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_study.errors import UserError
from mla_study.evaluation.vbench.native.hpsv3 import preflight
from mla_study.evaluation.vbench.native.scoring import Job
from mla_study.evaluation.vbench.native.serve import main
from mla_study.rollout.sinks import Mp4Sink

HPSV3 = """
import torch
print("a library that prints")
class HPSv3RewardInferencer:
    def __init__(self, config_path, checkpoint_path, device):
        self.base = open(config_path).read().split('"')[3]
        assert checkpoint_path.endswith("HPSv3.safetensors") and device == "cpu"
    def reward(self, image_paths, prompts):
        assert self.base.endswith("hpsv3/Qwen2-VL-7B-Instruct") and prompts == ["a red disc"]
        width, height = image_paths[0].size
        return torch.tensor([[width / height, 9.0]])
"""


def request(folder: Path, scorer: str, **more: object) -> Path:
    path = folder / "REQUEST.json"
    told = {
        "schema": 1, "scorer": scorer, "device": "cpu", "threads": 1, "weights": str(folder / "w"),
        "versions": {}, "options": {}, "detectron2": None,
    }  # fmt: skip
    path.write_text(json.dumps({**told, **more}))
    return path


def clip(path: Path, size: tuple[int, int], frames: int = 4) -> Path:
    rng = np.random.default_rng(0)
    sink = Mp4Sink(path, Fraction(8))
    sink.write(rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8))
    sink.close(True)
    return path


def work(
    request: Path, lines: list[dict[str, object]], **environment: str
) -> tuple[int, list[dict[str, Any]]]:
    told = {k: v for k, v in os.environ.items() if k != "MLA_STUDY_HPSV3_PYTHON"} | environment
    done = subprocess.run(
        [sys.executable, "-m", "mla_study.evaluation.vbench.native", str(request)],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True, text=True, timeout=200, env=told,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_scores_failures_and_the_end(assets: Path, tmp_path: Path) -> None:
    good, small = clip(tmp_path / "a-0.mp4", (200, 200)), clip(tmp_path / "b-0.mp4", (64, 64))
    (tmp_path / "c-0.mp4").write_bytes(b"none")
    asked = [("0", small), ("1", tmp_path / "c-0.mp4"), ("2", tmp_path / "d.mp4"), ("3", good)]
    lines: list[dict[str, object]] = [
        {"id": name, "path": str(path), "name": path.name, "prompt": "", "auxiliary": None}
        for name, path in asked
    ]
    options = {"frames": 3}
    code, told = work(request(tmp_path, "imaging_quality[niqe]", options=options), lines)
    assert code == 0
    assert [event["event"] for event in told] == ["ready", "failed", "failed", "failed", "score"]
    ready, score = told[0], told[-1]
    assert ready["patches"] == [] and ready["load_s"] > 0 and "scipy" in ready["versions"]
    assert [event["id"] for event in told[1:]] == ["0", "1", "2", "3"]
    assert "too small for NIQE" in told[1]["reason"] and "c-0.mp4" in told[2]["reason"]
    assert score["frames"] == 3 and score["terms"] == 1 and score["counted"] is True
    assert score["more"]["direction"] == "lower is better" and score["value"] > 10
    assert score["seconds"] > 0 and score["rss_mib"] > 10


def error_of(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    out, held = os.dup(1), os.environ.copy()
    try:
        assert main(argv) == 2
    finally:
        os.dup2(out, 1)
        os.close(out)
    assert os.environ == held
    (event,) = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert event["event"] == "error"
    return event["reason"]


def test_what_cannot_be_served_is_one_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLA_STUDY_ASSETS", raising=False)
    monkeypatch.delenv("MLA_STUDY_HPSV3_PYTHON", raising=False)
    for scorer, told in (
        ("imaging_quality[niqe]", "niqe_image_params.mat (10,912 bytes) is missing"),
        ("motion_smoothness[rife]", "rife_v3.8_flownet.pth (12,186,817 bytes) is missing"),
        ("clip_t", "CLIP ViT-B/32 is missing"),
        ("hpsv3", "HPSv3.safetensors (about 17 GB, MizzenAI/HPSv3 of the Hugging Face hub) at "),
        ("scene", "'scene' does not run in this environment"),
    ):
        assert told in error_of([str(request(tmp_path, scorer))], capfd)
    assert "there is no device 'tpu9'" in error_of(
        [str(request(tmp_path, "clip_f", device="tpu9"))], capfd
    )
    assert "is of schema 2" in error_of([str(request(tmp_path, "clip_f", schema=2))], capfd)
    assert "is no request" in error_of([str(tmp_path / "none.json")], capfd)
    monkeypatch.setenv("MLA_STUDY_HPSV3_PYTHON", str(tmp_path / "python"))
    assert "which is no file" in error_of([str(request(tmp_path, "hpsv3"))], capfd)


def test_hpsv3_goes_on_in_the_interpreter_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "hpsv3/config").mkdir(parents=True)
    (site / "hpsv3/__init__.py").write_text(HPSV3)
    (site / "hpsv3/config/HPSv3_7B.yaml").write_text(
        'rm_head_type: "ranknet"\nmodel_name_or_path: "Qwen/Qwen2-VL-7B-Instruct"\n'
    )
    (site / "hpsv3-1.0.0.dist-info").mkdir()
    (site / "hpsv3-1.0.0.dist-info/METADATA").write_text("Name: hpsv3\nVersion: 1.0.0\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    base = tmp_path / "w/hpsv3/Qwen2-VL-7B-Instruct"
    base.mkdir(parents=True)
    path = clip(tmp_path / "a red disc-0.mp4", (64, 96))
    line: dict[str, object] = {"id": "x", "path": str(path), "name": path.name}
    asked = [{**line, "prompt": "a red disc"}, {**line, "prompt": ""}]
    monkeypatch.syspath_prepend(site)
    with pytest.raises(UserError, match=r"HPSv3\.safetensors \(about 17 GB\) is missing"):
        preflight(Job(tmp_path / "w"))
    (tmp_path / "w/hpsv3/HPSv3.safetensors").touch()
    with pytest.raises(UserError, match=r"Qwen2-VL-7B-Instruct \(about 17 GB\)"):
        preflight(Job(tmp_path / "w"))
    (base / "config.json").touch()
    at = request(tmp_path, "hpsv3")
    code, told = work(at, asked, MLA_STUDY_HPSV3_PYTHON=str(python))
    assert code == 0 and [event["event"] for event in told] == ["ready", "score", "failed"], told
    assert told[0]["versions"]["hpsv3"] == "1.0.0"
    assert told[1]["value"] == pytest.approx(1.5) and told[1]["frames"] == 4
    assert "the video has none" in told[2]["reason"]
