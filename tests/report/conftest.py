"""The page of this checkout, made once a test run, and what looks at it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tarfile
from collections.abc import Generator
from pathlib import Path

import pytest
from report_page import make_page

AXE = "4.14.1"


@contextlib.contextmanager
def _once(folder: Path, name: str) -> Generator[tuple[Path, bool]]:
    """A file that the first of several processes makes: its place, and whether it is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / name, (folder / name).exists()


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``index.html`` of the committed results."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with _once(shared / "report", "index.html") as (place, there):
        if not there:
            make_page(place)
        return place


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, from the package registry; without it the test is skipped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mla_study"
    with _once(cache, f"axe-core-{AXE}.min.js") as (place, there):
        if not there:
            npm = shutil.which("npm")
            if npm is None:
                pytest.skip("axe-core is fetched by npm, which is not installed")
            folder = tmp_path_factory.mktemp("axe")
            command = [npm, "pack", "--silent", f"axe-core@{AXE}"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
            packed = next(folder.glob("*.tgz"), None)
            if done.returncode or packed is None:
                pytest.skip(f"axe-core {AXE} could not be fetched: {done.stderr.strip()[-200:]}")
            with tarfile.open(packed) as archive:
                script = archive.extractfile("package/axe.min.js")
                assert script is not None
                unpacked = place.with_suffix(".tmp")
                unpacked.write_bytes(script.read())
                unpacked.replace(place)
        return place.read_text(encoding="utf-8")
