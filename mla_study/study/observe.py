"""What a run saw of its machine: time, memory, versions, revision. It identifies no result."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

LIBRARIES = (
    "mla-study",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "torch",
    "gguf",
    "onnx",
)


class Stopwatch:
    """Wall and CPU time of a ``with`` block, children included, in seconds.

    Children count once they have been waited for: close a process pool inside the block.

    >>> with Stopwatch() as watch:
    ...     pass
    >>> sorted(watch.observed())
    ['cpu_s', 'peak_rss_mib', 'wall_s']
    """

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None
        self._stop: tuple[float, float] | None = None

    def __enter__(self) -> Stopwatch:
        self._start, self._stop = _clock(), None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop = _clock()

    def _spent(self, which: int) -> float:
        if self._start is None:
            raise RuntimeError("the stopwatch was never started")
        return (self._stop or _clock())[which] - self._start[which]

    @property
    def wall(self) -> float:
        return self._spent(0)

    @property
    def cpu(self) -> float:
        return self._spent(1)

    def observed(self) -> dict[str, Any]:
        """Ready for the ``observed`` part of a run record; memory is the process's peak so far."""
        return {
            "wall_s": round(self.wall, 3),
            "cpu_s": round(self.cpu, 3),
            "peak_rss_mib": peak_memory(),
        }


def peak_memory() -> dict[str, float]:
    """Highest resident memory so far, in MiB: of this process, and of its largest ended child."""
    return {
        "self": round(_own_peak_kib() / 1024, 1),
        "children": round(_rusage_kib(resource.RUSAGE_CHILDREN) / 1024, 1),
    }


def memory_gib() -> float | None:
    """Memory that processes may still take, GiB: the machine's, or its container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
        free = float(facts["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        return min(free, (float(limit) - float(used)) / 2**30)
    except (OSError, ValueError):
        return free


def observe() -> dict[str, Any]:
    """Date (UTC), revision, versions and machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": library_versions(),
        "device": device(),
    }


def git_state(root: Path | None = None) -> dict[str, Any] | None:
    """Revision and dirty flag of the checkout that the package lies in; ``None`` outside of one."""
    root = Path(__file__).resolve().parents[2] if root is None else root
    if not (root / ".git").exists():
        return None
    revision = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    if revision is None or status is None:
        return None
    return {"revision": revision, "dirty": bool(status)}


def library_versions() -> dict[str, str]:
    """Versions of Python, of this package and of what is installed of its libraries."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def device() -> dict[str, Any]:
    """System, processor, cores open to this process, and the GPU where torch already found one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def hardware_of(run: Mapping[str, Any]) -> str:
    """The machine that a run record names, as a reader wants it; empty where it names none."""
    observed = run.get("observed") or {}
    if observed.get("hardware"):
        return str(observed["hardware"])
    found = observed.get("device") or {}
    if "gpu" in found:
        return str(found["gpu"])
    return f"{found['cpu']}, {found.get('cores', '?')} cores" if "cpu" in found else ""


def _clock() -> tuple[float, float]:
    times = os.times()
    return time.perf_counter(), sum(times[:4])


def _own_peak_kib() -> int:
    # ru_maxrss outlives exec: a process started from a large one would inherit its peak.
    try:
        with Path("/proc/self/status").open() as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return _rusage_kib(resource.RUSAGE_SELF)


def _rusage_kib(who: int) -> int:
    peak = resource.getrusage(who).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open() as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
