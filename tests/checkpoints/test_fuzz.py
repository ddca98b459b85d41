from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("fuzzing.py")
SEED = os.environ.get("MLA_STUDY_FUZZ_SEED") or str(int.from_bytes(os.urandom(4), "little"))
# Mutants of each format; the sum is over 2,000. MLA_STUDY_FUZZ_FACTOR multiplies them.
COUNTS = {"safetensors": 600, "torch": 400, "legacy": 300, "gguf": 600, "onnx": 600}
NEEDS = {"torch": "torch", "legacy": "torch", "gguf": "gguf", "onnx": "onnx"}


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_are_read_or_refused(kind, tmp_path, capsys):
    """Each mutant opens and reads, or raises UserError; in another process, so that a crash of a
    parser is seen as one."""
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    count = int(COUNTS[kind] * float(os.environ.get("MLA_STUDY_FUZZ_FACTOR", "1")))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(count), SEED, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
        timeout=280,
    )
    said = f"MLA_STUDY_FUZZ_SEED={SEED}\n{done.stdout}{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.get("read", 0) + outcomes.get("refused", 0) == count, said
    # Neither all noise nor all harmless: the mutants reach past the first check.
    assert outcomes["refused"] > count // 10, said
    with capsys.disabled():
        print(f"\n{kind}: {outcomes}, MLA_STUDY_FUZZ_SEED={SEED}")
