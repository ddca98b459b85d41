"""VBench's own Python environment: where it is, whether its versions are right, how to use it.

VBench 0.1.5 needs torch 2.5 and numpy 1, which the rest of this package does not run on; its
workers are processes of another interpreter, which ``make setup-vbench`` installs. Nothing of it is
imported here: versions are read off its folders.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mla_study.errors import UserError

VARIABLE = "MLA_STUDY_VBENCH_ENV"
WORKER = Path(__file__).resolve().parents[1] / "worker"
"""The folder of the worker's code, which VBench's interpreter runs."""
SET_UP = "`make setup-vbench` installs it"

PINS = {
    "vbench": "0.1.5",
    "torch": "2.5.1",
    "torchvision": "0.20.1",
    "numpy": "1.26.4",
    "transformers": "4.33.2",
    "setuptools": "69.5.1",
    "pyiqa": "0.1.10",
    "timm": "1.0.12",
}
"""Versions that every worker is checked against."""
PINS_LONG = {
    "moviepy": "1.0.3",
    "av": "12.3.0",
    "scenedetect": "0.6.7.1",
    "dreamsim": "0.2.1",
    "peft": "0.6.2",
    "accelerate": "0.24.1",
}
"""Further ones of the long mode."""
PINS_DETECTRON2 = {
    "iopath": "0.1.9",
    "omegaconf": "2.3.0",
    "hydra-core": "1.3.2",
    "black": "24.10.0",
}
"""What detectron2 imports."""

_ASK_DEVICES = """
import json, torch
found = []
if torch.cuda.is_available():
    for place in range(torch.cuda.device_count()):
        which = torch.cuda.get_device_properties(place)
        found.append({"name": which.name, "gib": round(which.total_memory / 2**30, 1)})
print("devices " + json.dumps(found))
"""


@dataclass(frozen=True)
class Environment:
    """An environment that is there; ``versions`` are those of all its packages."""

    root: Path
    python: Path
    versions: Mapping[str, str] = field(repr=False)
    site: Path = Path()

    @property
    def package(self) -> Path:
        """The folder of VBench's own package."""
        return self.site / "vbench"

    def differences(self, pins: Mapping[str, str] = PINS) -> dict[str, str | None]:
        """Packages whose version is not the pinned one -> the version here, None if absent."""
        here = {name: self.versions.get(name) for name in pins}
        return {
            name: version
            for name, version in here.items()
            if version is None or version.split("+")[0] != pins[name]
        }


def place(given: Path | None = None) -> Path:
    """Where the environment is looked for: the argument, MLA_STUDY_VBENCH_ENV, the project's."""
    if given is not None:
        return given.expanduser().absolute()
    told = os.environ.get(VARIABLE)
    if told:
        return Path(told).expanduser().absolute()
    return _project() / ".venv-vbench"


def find_environment(given: Path | None = None) -> Environment:
    """VBench's environment, by :func:`place`.

    Raises:
        UserError: it is absent, no environment, or one without VBench; says how to make it.
    """
    root = place(given)
    python = root / "bin" / "python"
    if not python.exists():
        raise UserError(f"there is no environment for VBench at {root}: {SET_UP}")
    libraries = sorted((root / "lib").glob("python3.*/site-packages"))
    if not libraries:
        raise UserError(f"{root} has no lib/python3.*/site-packages: {SET_UP} anew")
    found = Environment(root, python, _versions(libraries[-1]), libraries[-1])
    if "vbench" not in found.versions:
        raise UserError(f"the environment {root} has no VBench: {SET_UP}")
    return found


def require_versions(environment: Environment, long: bool = False) -> None:
    """Refuse an environment whose versions are not the pinned ones.

    Raises:
        UserError: says which differ.
    """
    pins = {**PINS, **(PINS_LONG if long else {})}
    wrong = environment.differences(pins)
    if wrong:
        raise UserError(
            f"the environment {environment.root} has {told_differences(wrong, pins)}: "
            "`make setup-vbench` puts that right"
        )


def told_differences(wrong: Mapping[str, str | None], pins: Mapping[str, str]) -> str:
    """``numpy 2.1.0 (wants 1.26.4), no peft (wants 0.6.2)``."""
    return ", ".join(
        f"{name} {here} (wants {pins[name]})" if here else f"no {name} (wants {pins[name]})"
        for name, here in wrong.items()
    )


def variables(weights: Path, detectron2: Path | None = None) -> dict[str, str]:
    """What to start a worker with, on top of the variables that are set.

    VBench's caches are the weights folder and nothing is fetched. The worker's current folder must
    be :func:`working_folder`: transformers takes ``bert-base-uncased`` from there.

    Args:
        detectron2: folder of a checkout, put on the path; None where it is installed or not needed.
    """
    root = weights.expanduser().absolute()
    return {
        "VBENCH_CACHE_DIR": str(root),
        "TORCH_HOME": str(root / "torch"),
        "HF_HOME": str(root / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "PYTHONNOUSERSITE": "1",
        # empty, it keeps this process's own path away from the other interpreter
        "PYTHONPATH": "" if detectron2 is None else str(detectron2.expanduser().absolute()),
    }


def working_folder(weights: Path) -> Path:
    """The folder that a worker must be started in."""
    return weights.expanduser().absolute()


@dataclass(frozen=True)
class Devices:
    """What the environment's torch said of GPUs; ``problem`` where it said nothing."""

    gpus: tuple[str, ...] = ()
    problem: str = ""

    def text(self) -> str:
        """One line."""
        if self.problem:
            return f"not known ({self.problem})"
        return "GPU: " + ", ".join(self.gpus) if self.gpus else "CPU (torch sees no GPU)"


def ask_devices(environment: Environment, timeout_s: float = 120.0) -> Devices:
    """Ask the environment's torch, in a process of its own."""
    clean = {**os.environ, "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    try:
        done = subprocess.run(
            [str(environment.python), "-c", _ASK_DEVICES],
            capture_output=True, text=True, timeout=timeout_s, env=clean, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Devices(problem=f"its torch did not answer within {timeout_s:g} s")
    except OSError as error:
        return Devices(problem=f"its interpreter does not start: {error.strerror or error}")
    for line in done.stdout.splitlines():
        if line.startswith("devices "):
            found = json.loads(line.removeprefix("devices "))
            return Devices(tuple(f"{gpu['name']}, {gpu['gib']:g} GiB" for gpu in found))
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return Devices(problem=f"its torch cannot be imported: {last[:200]}")


@functools.cache
def _gpus(python: Path) -> int:
    return len(ask_devices(Environment(python.parents[1], python, {})).gpus)


def gpus(environment: Environment) -> int:
    """How many GPUs the environment's torch sees; asked once a process, 0 where it cannot say."""
    return _gpus(environment.python)


def _project() -> Path:
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "mla_study").is_dir():
            return folder
    return Path(__file__).resolve().parents[4]


def _versions(site: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions(path=[str(site)]):
        name = package.metadata["Name"]
        if name and package.version:
            found[name.lower().replace("_", "-").replace(".", "-")] = package.version
    return found
