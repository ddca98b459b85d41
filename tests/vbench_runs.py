"""Folders of small videos, and runs of them by the fake worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from mla_study.evaluation.vbench.runs import run as running
from mla_study.evaluation.vbench.runs import scoring
from mla_study.evaluation.vbench.runs.drive import Launch
from mla_study.evaluation.vbench.runs.plan import Place
from mla_study.evaluation.vbench.runs.scoring import Finished, Request

FAKE = Path(__file__).with_name("vbench_fake_worker.py")


def write_clip(
    path: Path, frames: int = 6, size: tuple[int, int] = (32, 48), fps: int = 8, seed: int = 0
) -> Path:
    """A video of noise that depends on the seed."""
    av = pytest.importorskip("av")
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p"
        for _ in range(frames):
            picture = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_clips(folder: Path, prompts: Mapping[str, int], seed: int = 0) -> Path:
    """``{prompt}-{index}.mp4`` for each prompt and number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (prompt, count) in enumerate(prompts.items()):
        for index in range(count):
            write_clip(folder / f"{prompt}-{index}.mp4", seed=seed + 100 * number + index)
    return folder


def launch_fake(place: Place, threads: int) -> Callable[[str, str], Launch]:
    """What stands in for :func:`plan.launcher`."""
    del place, threads

    def launch(scorer: str, device: str) -> Launch:
        request = {"scorer": scorer, "device": device}
        return Launch([sys.executable, str(FAKE)], dict(os.environ), Path.cwd(), request)

    return launch


def run_fake(
    monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path,
    scorers: tuple[str, ...] = ("temporal_flickering",), **more: object,
) -> tuple[Finished, list[str]]:  # fmt: skip
    """A run by the fake worker, and what it said."""
    monkeypatch.setattr(scoring, "launcher", launch_fake)
    said: list[str] = []
    place = Place(out.parent / "weights", None, trust=True)
    request = Request(folder, out, scorers, place, **{"mode": "custom", "model": "m", **more})  # type: ignore[arg-type]
    return running.run(request, said.append, progress=False), said
