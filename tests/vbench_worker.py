"""What tests of VBench's worker share: its interpreter, a worker to talk to, small videos."""

from __future__ import annotations

import json
import os
import subprocess
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "mla_study" / "evaluation" / "vbench" / "worker"
VARIABLE = "MLA_STUDY_VBENCH_ENV"


def interpreter() -> Path:
    """VBench's; the test is skipped where there is none."""
    python = Path(os.environ.get(VARIABLE) or ROOT / ".venv-vbench") / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no {python}: `make setup-vbench` builds it, or {VARIABLE} names it")
    return python


def surroundings(weights: Path, **more: str) -> dict[str, str]:
    """Environment variables of a worker: everything from the weights folder, nothing fetched."""
    return {
        **os.environ,
        "VBENCH_CACHE_DIR": str(weights),
        "TORCH_HOME": str(weights / "torch"),
        "HF_HOME": str(weights / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONPATH": "",
        **more,
    }


class Worker:
    """A worker process, which loads while others are started."""

    def __init__(self, python: Path, weights: Path, scorer: str, log: Path, **request: Any) -> None:
        weights.mkdir(parents=True, exist_ok=True)
        asked = {
            "schema": 1,
            "scorer": scorer,
            "device": "cpu",
            "threads": 1,
            "weights": str(weights),
            "versions": {"vbench": "0.1.5", "torch": "2.5.1"},
            "options": {},
            "detectron2": None,
            **request,
        }
        file = log.with_suffix(".json")
        file.write_text(json.dumps(asked))
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(python), str(WORKER), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=weights,
                env=surroundings(weights),
            )

    @cached_property
    def said(self) -> dict[str, Any]:
        """Its first event: ready or error."""
        return self._hear()

    def ask(self, path: Path, **line: Any) -> dict[str, Any]:
        """Its answer about one video."""
        assert self.process.stdin is not None and self.said["event"] == "ready", self.said
        told = {"id": path.name, "path": str(path), "name": path.name, **line}
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return self._hear()

    def end(self) -> int:
        """Exit code after the end of its input; it must say nothing more."""
        assert self.said
        rest, _ = self.process.communicate()
        assert rest == ""
        return self.process.returncode

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, self.log.read_text()[-3000:]
        return json.loads(text)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Grey noise with large and small features, periodic, (height, width, 3) uint8."""
    noise = np.random.default_rng(seed).standard_normal((height, width))
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    smooth = np.fft.ifft2(np.fft.fft2(noise) * np.exp(-400 * (rows**2 + columns**2))).real
    grey = 127 + 50 * (smooth - smooth.mean()) / smooth.std()
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def shifted(
    path: Path, frames: int, step: tuple[int, int], size: tuple[int, int] = (128, 160), fps: int = 8
) -> Path:
    """A video of one texture that moves by ``step`` pixels (down, right) a frame."""
    av = pytest.importorskip("av")
    first = texture(*size)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "8"}
        for place in range(frames):
            picture = np.roll(first, (place * step[0], place * step[1]), axis=(0, 1))
            picture = np.ascontiguousarray(picture)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def direct(python: Path, weights: Path, code: str, *arguments: str) -> Any:
    """Value of the last line that ``code`` prints as JSON, run in VBench's environment."""
    done = subprocess.run(
        [str(python), "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=weights,
        env=surroundings(weights),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


__all__ = ["Worker", "direct", "interpreter", "shifted", "surroundings", "texture"]
