"""The whole command on damaged files: a table or one sentence, never a traceback or a hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("command_fuzzing.py")
SEED = os.environ.get("MLA_STUDY_FUZZ_SEED") or str(int.from_bytes(os.urandom(4), "little"))
# Beside the thousands that tests/checkpoints/test_fuzz.py opens. MLA_STUDY_FUZZ_FACTOR multiplies.
COUNTS = {"safetensors": 220, "torch": 120, "legacy": 80, "gguf": 120, "onnx": 120}
COUNTS |= {"index": 80, "config": 120, "covariance": 80}
NEEDS = {"torch": "torch", "legacy": "torch", "gguf": "gguf", "onnx": "onnx"}


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_checkpoints_end_in_a_table_or_a_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process of its own, so that a crash or a wild allocation is seen as one."""
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    count = int(COUNTS[kind] * float(os.environ.get("MLA_STUDY_FUZZ_FACTOR", "1")))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(count), SEED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
        timeout=280,
    )
    said = f"MLA_STUDY_FUZZ_SEED={SEED}\n{done.stdout}{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes["table"] + outcomes["refused"] == count, said
    # Neither all noise nor all harmless.
    assert outcomes["refused"] > count // 20, said
    assert outcomes["table"] > 0 or kind == "covariance", said
    with capsys.disabled():
        print(f"\n{kind}: {outcomes}, MLA_STUDY_FUZZ_SEED={SEED}")
