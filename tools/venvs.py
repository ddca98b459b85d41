"""Virtual environments that are either complete or built anew; standard library only.

A stamp holds the hash of what an environment was made from, so a second call is instant. It is
taken away before anything is installed: an environment without one is an interrupted set-up.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ".setup.lock"
"""Held during a set-up; ``.lock`` is uv's own, for which it would wait five minutes."""


@dataclass(frozen=True)
class Venv:
    """One environment, and the make target that builds it."""

    folder: Path
    target: str

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.folder / ".stamp"

    def foreign(self) -> bool:
        """Whether the folder holds things, and none that a set-up leaves."""
        ours = any((self.folder / name).exists() for name in (LOCK, ".stamp"))
        return self.folder.is_dir() and any(self.folder.iterdir()) and not ours

    def version(self) -> str:
        """'3.11' of the Python in it, or '' where there is none that starts."""
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run(
                [self.python, "-c", code], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    def create(self) -> None:
        """Make the empty environment where there is no Python in it yet."""
        if self.python.exists():
            return
        # Inside an activated environment, sys.executable may be the one that was just removed.
        base = getattr(sys, "_base_executable", sys.executable)
        made = subprocess.run([base, "-m", "venv", str(self.folder)], capture_output=True)
        if made.returncode:
            shutil.rmtree(self.folder, ignore_errors=True)
            sys.exit(
                f"{sys.executable} cannot make a virtual environment: install its venv module "
                f"(Debian: python3-venv), or give another Python by "
                f"`make {self.target} PYTHON=...`."
            )

    def attempt(
        self, step: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> bool:
        """One command: a sentence for the reader, its output into the log. Whether it succeeded."""
        print(f"  {step}", file=sys.stderr, flush=True)
        with (self.folder / "setup.log").open("ab") as out:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return done.returncode == 0

    def run(self, step: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """As :meth:`attempt`, but a failure quotes the log and ends the set-up."""
        if self.attempt(step, command, env):
            return
        log = self.folder / "setup.log"
        print(*log.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
        sys.exit(
            f"Set-up stopped at: {step} The whole log is {log}; `make {self.target}` begins again."
        )

    def pip(self, step: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """One ``pip install`` of the environment's own pip."""
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install"]
        self.run(step, [*pip, *arguments], env)

    def ensure(self, wanted: str, build: Callable[[], None], least_gib: float = 0) -> None:
        """Build the environment unless it stands as ``wanted`` says; one process at a time.

        :param wanted: hash of everything that it is made from.
        :param least_gib: free disk space without which the build is not begun.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            version = self.version()
            # A Python named on the command line wins over the one that built the environment.
            chosen = "{}.{}".format(*sys.version_info[:2]) if "--exact" in sys.argv else version
            stamped = self.stamp.read_text() if self.stamp.exists() else ""
            if stamped == wanted and version and version == chosen:
                return
            if not stamped or version != chosen:
                self._empty()
            free = shutil.disk_usage(self.folder).free / 2**30
            if free < least_gib:
                sys.exit(
                    f"{self.folder} needs {least_gib:g} GiB of disk space, but {free:.1f} GiB are "
                    f"free: make room, then call `make {self.target}` again."
                )
            self.stamp.unlink(missing_ok=True)
            print(f"Setting up {self.folder} with {sys.executable}", file=sys.stderr, flush=True)
            build()
            temporary = self.stamp.with_suffix(".tmp")
            temporary.write_text(wanted)
            temporary.replace(self.stamp)
            print("Set-up done.", file=sys.stderr, flush=True)

    def _empty(self) -> None:
        for item in self.folder.iterdir():
            if item.name == LOCK:
                continue
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()


def main_of(venv: Venv, main: Callable[[], None]) -> None:
    """Call ``main``; Ctrl-C ends it with one sentence."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"Set-up interrupted; `make {venv.target}` begins again.")
