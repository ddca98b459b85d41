"""``mla-study report`` of this checkout in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_page(out: Path, *options: str) -> str:
    """Make the page; gives what the command said."""
    command = [sys.executable, "-m", "mla_study", "report", "--jobs", "1", "--out", str(out)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr
