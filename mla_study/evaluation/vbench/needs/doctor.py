"""What of VBench can run here: dimension by dimension, with every missing file told once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, NATIVE, SCORERS, is_free
from mla_study.evaluation.vbench.needs.costs import (
    Folder,
    cost_of,
    look_into,
)
from mla_study.evaluation.vbench.needs.environment import (
    PINS,
    PINS_DETECTRON2,
    PINS_LONG,
    Devices,
    Environment,
    ask_devices,
    find_environment,
    told_differences,
)
from mla_study.evaluation.vbench.needs.weights import (
    DETECTRON2,
    Mode,
    State,
    find_detectron2,
    keys_for,
    look,
    weights_folder,
)
from mla_study.evaluation.vbench.runs.plan import STATIC_FILTER, scorers_for
from mla_study.evaluation.vbench.runs.scoring import FLICKER
from mla_study.study.observe import memory_gib

ROWS = (
    *SCORERS,
    STATIC_FILTER,
    "long.clip2clip.subject_consistency",
    "long.clip2clip.background_consistency",
)
"""What a report has a row for: the 16 first."""


@dataclass(frozen=True)
class Row:
    """One scorer: ready, or the sentences that say why not."""

    name: str
    asked: bool
    lacks: tuple[str, ...]
    troubles: tuple[str, ...]
    gib: float | None
    seconds: float | None

    @property
    def ready(self) -> bool:
        """Whether it can run."""
        return not self.lacks and not self.troubles


@dataclass(frozen=True)
class Report:
    """What the doctor found; ``states`` of all items that the rows need.

    Attributes:
        named: whether some scorers were asked for by name, and the others are beside the point.
    """

    mode: Mode
    weights: Path
    rows: tuple[Row, ...]
    states: dict[str, State]
    environment: str
    environment_ready: bool
    devices: str
    detectron2: str
    disk_gb: float | None
    memory_gib: float | None
    folder: Folder | None
    named: bool = False

    @property
    def ready(self) -> bool:
        """Whether all that was asked for can run."""
        return all(row.ready for row in self.rows if row.asked)

    def missing(self, asked: bool = False) -> list[str]:
        """Keys of unusable items, each once, those of the asked scorers first (or only those)."""
        rows = sorted(self.rows, key=lambda row: not row.asked)
        keys = [key for row in rows if row.asked or not asked for key in row.lacks]
        return list(dict.fromkeys(keys))

    @property
    def unfiltered(self) -> bool:
        """Whether temporal flickering was asked for and would be scored on moving videos too."""
        asked = any(row.asked and row.name == FLICKER for row in self.rows)
        return asked and self.mode == "short" and not self.row(STATIC_FILTER).ready

    def row(self, name: str) -> Row:
        """The row of a scorer."""
        return next(row for row in self.rows if row.name == name)


def examine(
    *,
    dimensions: Sequence[str] = (),
    mode: Mode = "short",
    weights: Path | None = None,
    detectron2: Path | None = None,
    environment: Path | None = None,
    videos: Path | None = None,
    trust: bool = False,
) -> Report:
    """Look at everything that scoring needs; nothing is changed but the cache of hashes.

    Args:
        dimensions: names or groups, see :func:`dimensions.choose`; by default the 16, or of custom
            clips those that score any clip.

    Raises:
        UserError: an unknown dimension, or a folder that cannot be read.
    """
    asked = _asked(dimensions, mode)
    root = weights_folder(weights)
    seen = None if videos is None else look_into(videos)
    found, problem = _environment(environment)
    wrong = _wrong(found, mode)
    had, told = _detectron2(detectron2, root, found, trust)
    states: dict[str, State] = {}
    rows: list[Row] = []
    for name in ROWS:
        keys = keys_for(name, root, mode)
        states |= {key: look(key, root) for key in keys if key not in states}
        lacks = [key for key in keys if not states[key].usable(trust)]
        if name in DIMENSIONS and DIMENSIONS[name].detectron2 and not had:
            lacks.append(DETECTRON2)
        troubles: list[str] = []
        if name not in NATIVE and (problem or wrong):
            troubles.append("no environment" if problem else "environment's versions")
        troubles += _packages(name)
        if mode == "custom" and name in DIMENSIONS and not is_free(name):
            troubles.append("needs VBench's prompts")
        cost = cost_of(name)
        seconds = cost.seconds(seen.videos, seen.frames) if seen else None
        rows.append(Row(name, name in asked, tuple(lacks), tuple(troubles), cost.gib, seconds))
    return Report(
        mode,
        root,
        tuple(rows),
        states,
        problem or wrong or _described(found),
        not (problem or wrong),
        _devices(found).text(),
        told,
        _free_gb(root),
        memory_gib(),
        seen,
        bool(dimensions),
    )


def _asked(dimensions: Sequence[str], mode: Mode) -> tuple[str, ...]:
    if dimensions:
        return scorers_for(mode, dimensions)  # what a run would say of them
    return tuple(name for name in DIMENSIONS if mode != "custom" or is_free(name))


def _environment(given: Path | None) -> tuple[Environment | None, str]:
    try:
        return find_environment(given), ""
    except UserError as error:
        return None, str(error)


def _wrong(found: Environment | None, mode: Mode) -> str:
    if found is None:
        return ""
    pins = {**PINS, **(PINS_LONG if mode == "long" else {})}
    wrong = found.differences(pins)
    return (
        f"{found.root} has {told_differences(wrong, pins)}: `make setup-vbench` puts that right"
        if wrong
        else ""
    )


def _described(found: Environment | None) -> str:
    if found is None:
        return ""
    known = ", ".join(f"{name} {found.versions[name]}" for name in ("vbench", "torch", "numpy"))
    return f"{found.root} ({known})"


def _packages(name: str) -> list[str]:
    """What a scorer of our own environment does not find there."""
    if name == "hpsv3" and not (find_spec("hpsv3") or os.environ.get("MLA_STUDY_HPSV3_PYTHON")):
        return ["package hpsv3 (MLA_STUDY_HPSV3_PYTHON)"]
    if name in ("clip_t", "clip_f") and not find_spec("transformers"):
        return ["package transformers (mla-study[video])"]
    return []


def _devices(found: Environment | None) -> Devices:
    return Devices(problem="no environment to ask") if found is None else ask_devices(found)


def _detectron2(
    given: Path | None, weights: Path, found: Environment | None, trust: bool
) -> tuple[bool, str]:
    """Whether it is usable, and one line on it."""
    lacking = {} if found is None else found.differences(PINS_DETECTRON2)
    if lacking:
        needs = told_differences(lacking, PINS_DETECTRON2)
        return False, f"cannot be imported in the environment: {needs}"
    installed = found is not None and DETECTRON2 in found.versions
    if given is None and installed:
        return True, "installed in the environment"
    try:
        place = find_detectron2(given, weights, trust=trust)
    except UserError as error:
        if given is not None:
            raise
        return False, str(error)
    return True, str(place)


def _free_gb(folder: Path) -> float | None:
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free / 1e9
        except OSError:
            continue
    return None
