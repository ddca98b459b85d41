"""Build .venv-vbench, where VBench runs with the library versions it needs; `make setup-vbench`.

What is installed is requirements/requirements-vbench.lock and nothing else. uv does it in a quarter
of pip's time, so it is fetched for the while; where it cannot be had, or fails, pip does the work.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from venvs import ROOT, Venv, main_of

LOCK = ROOT / "requirements" / "requirements-vbench.lock"
BUILD = ROOT / "requirements" / "build-constraints.txt"
UV = "uv==0.13.9"
LEAST_GIB = 8
CHECK = "import vbench"
SHOW = "from importlib.metadata import version; print(version('vbench'))"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the environment that VBench runs in.")
    parser.add_argument("--into", type=Path, default=ROOT / ".venv-vbench", metavar="FOLDER")
    parser.add_argument("--exact", action="store_true", help="with this very Python")
    return parser.parse_args()


def recipe_hash(folder: Path) -> str:
    digest = hashlib.sha256(str(folder).encode())
    for file in (LOCK, BUILD, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def build(venv: Venv) -> None:
    """Lay the locked packages into an empty or earlier environment."""
    venv.create()
    if not _by_uv(venv):
        _by_pip(venv)
    venv.run("[3/3] check that VBench can be imported", [str(venv.python), "-c", CHECK])


def _by_uv(venv: Venv) -> bool:
    scratch = venv.folder / "uv"
    pip = [str(venv.python), "-m", "pip", "--disable-pip-version-check", "install"]
    try:
        return venv.attempt(
            "[1/3] uv, which installs faster than pip",
            [*pip, "--no-deps", "--target", str(scratch), UV],
        ) and venv.attempt(
            "[2/3] VBench and its libraries (6 GB; about a minute on a fast line)",
            [
                *(str(scratch / "bin" / "uv"), "pip", "install", "--python", str(venv.python)),
                *("--no-config", "--build-constraint", str(BUILD), "--requirement", str(LOCK)),
            ],
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _by_pip(venv: Venv) -> None:
    help_text = subprocess.run(
        [str(venv.python), "-m", "pip", "install", "--help"], capture_output=True, text=True
    ).stdout
    # Older pips hand PIP_CONSTRAINT on to the environments that they build packages in.
    build = ["--build-constraint", str(BUILD)] if "--build-constraint" in help_text else []
    env = {**os.environ, **({} if build else {"PIP_CONSTRAINT": str(BUILD)})}
    step = "[2/3] VBench and its libraries, by pip (6 GB; about four minutes)"
    venv.pip(step, *build, "--requirement", str(LOCK), env=env)


def main() -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 11):
        sys.exit(
            f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, but VBench's "
            "libraries need 3.10 or 3.11: `make setup-vbench PYTHON=/path/to/python3.11`."
        )
    folder = arguments().into.absolute()
    venv = Venv(folder, "setup-vbench")
    if venv.foreign():
        sys.exit(f"{folder} holds something else than a set-up of ours: name an empty folder.")
    venv.ensure(recipe_hash(folder), lambda: build(venv), LEAST_GIB)
    done = subprocess.run([str(venv.python), "-c", SHOW], capture_output=True, text=True)
    print(f"vbench {done.stdout.strip() or '?'} in {folder}", file=sys.stderr)


if __name__ == "__main__":
    main_of(Venv(ROOT / ".venv-vbench", "setup-vbench"), main)
