"""The wheel in an empty environment, far from the checkout: only the light dependencies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLA_STUDY"))}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )


@pytest.mark.slow
def test_rank_probe_runs_from_a_wheel_without_torch(tmp_path: Path) -> None:
    built = call(
        sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert call(sys.executable, "-m", "venv", "empty", cwd=tmp_path).returncode == 0
    python = tmp_path / "empty" / "bin" / "python"
    pins = ROOT / "constraints.txt"
    done = call(
        python, "-m", "pip", "install", "-q", "--prefer-binary", "-c", pins, wheel, cwd=tmp_path
    )
    if "No matching distribution" in done.stderr or "Connection" in done.stderr:
        pytest.skip(f"the package index is out of reach: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    listed = json.loads(call(python, "-m", "pip", "list", "--format", "json", cwd=tmp_path).stdout)
    assert not {"torch", "safetensors", "transformers"} & {p["name"] for p in listed}
    rng = np.random.default_rng(0)
    names = [f"blocks.{i}.self_attn.{x}.weight" for i in range(2) for x in "qkvo"]
    header, data = dict[str, object](), b""
    for name in names:
        raw = rng.normal(size=(48, 48)).astype(np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": [48, 48],
                        "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    told = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(told).to_bytes(8, "little") + told + data)
    probed = call(
        tmp_path / "empty" / "bin" / "rank-probe", "w.safetensors", "--json", cwd=tmp_path
    )
    assert probed.returncode == 0, probed.stderr
    assert json.loads(probed.stdout)
    helped = call(tmp_path / "empty" / "bin" / "mla-study", "--help", cwd=tmp_path)
    assert helped.returncode == 0 and "rank-probe" in helped.stdout
