"""Recordings to replay, and a table of the largest difference of every tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from parity.making import CONFIG, Save, small_model
from parity.recording import Recording
from safetensors.torch import save_file
from torch import Tensor

from mla_study.model.transformer import WanTransformer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def _recordings(folder: Path) -> list[Path]:
    """JSON files that describe a tensor file beside them."""
    found: list[Path] = []
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict):
            file = facts.get("file", f"{path.stem}.safetensors")
            if (folder / file).is_file():
                found.append(path)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recording_path" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("recordings") or FIXTURES)
        paths = _recordings(folder)
        metafunc.parametrize("recording_path", paths, ids=[p.stem for p in paths])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines: list[str] = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for key, value in getattr(report, "user_properties", []):
                if key.startswith("parity "):
                    lines.append(f"{key.removeprefix('parity '):<60} {value}")
    if lines:
        terminalreporter.section("largest difference of every replayed tensor")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def model() -> WanTransformer:
    """A small dense model that recordings are made with."""
    return small_model()


@pytest.fixture
def save(tmp_path: Path, model: WanTransformer) -> Save:
    """Write tensors and facts as a recording."""

    def write(name: str, tensors: dict[str, Tensor], facts: dict[str, object]) -> Recording:
        folder = tmp_path / "weights"
        folder.mkdir()
        save_file(model.state_dict(), folder / "w.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
        text = json.dumps({"config": CONFIG, "weights": "weights/w.safetensors", **facts})
        (tmp_path / f"{name}.json").write_text(text)
        return Recording(tmp_path / f"{name}.json", tmp_path / "nowhere")

    return write
