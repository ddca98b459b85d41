"""What of VBench can run here: dimension by dimension, with every missing file told once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.costs import (
    SETTING,
    Folder,
    cost_of,
    look_into,
    memory_gib,
    time_text,
)
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, NATIVE, SCORERS, choose, is_free
from mla_study.evaluation.vbench.environment import (
    PINS,
    PINS_DETECTRON2,
    PINS_LONG,
    Devices,
    Environment,
    ask_devices,
    find_environment,
    told_differences,
)
from mla_study.evaluation.vbench.weights import (
    DETECTRON2,
    ITEMS,
    Mode,
    State,
    find_detectron2,
    look,
    needed_by,
    size_text,
    weights_folder,
)

ROWS = (
    *SCORERS,
    "static_filter",
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
    """What the doctor found; ``states`` of all items that the rows need."""

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
    trust: bool = field(default=False)

    @property
    def ready(self) -> bool:
        """Whether all that was asked for can run."""
        return all(row.ready for row in self.rows if row.asked)

    def missing(self) -> list[str]:
        """Keys of unusable items, each once, those of the asked scorers first."""
        keys = [key for row in sorted(self.rows, key=lambda r: not r.asked) for key in row.lacks]
        return list(dict.fromkeys(keys))


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
    seen = None if videos is None else _look(videos)
    found, problem = _environment(environment)
    wrong = _wrong(found, mode)
    had, told = _detectron2(detectron2, root, found, trust)
    states: dict[str, State] = {}
    rows: list[Row] = []
    for name in ROWS:
        keys = needed_by(name, mode)
        states |= {key: look(key, root) for key in keys if key not in states}
        lacks = [key for key in keys if not states[key].usable(trust)]
        if name in DIMENSIONS and DIMENSIONS[name].detectron2 and not had:
            lacks.append(DETECTRON2)
        troubles: list[str] = []
        if name not in NATIVE and (problem or wrong):
            troubles.append("no environment" if problem else "environment's versions")
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
        trust,
    )  # fmt: skip


def text(report: Report) -> str:
    """The report for a reader: one table, then what is missing, each item once."""
    lines = [f"{'dimension':<40}{'ready':<7}{'GiB':>6}{'time':>9}  lacks"]
    for row in report.rows:
        if row.name not in DIMENSIONS and not row.asked:
            continue
        lines.append(_line(row))
    others = [row for row in report.rows if row.name not in DIMENSIONS and not row.asked]
    lines += ["others:", *(_line(row) for row in others)]
    lines += [
        "",
        f"environment: {report.environment}",
        f"device:      {report.devices}",
        f"detectron2:  {report.detectron2}",
        f"weights:     {report.weights}",
        f"disk:        {_disk(report)}",
        f"memory:      {_memory(report)}",
    ]
    if report.folder is not None:
        lines.append(f"videos:      {_videos(report)}")
    lines.append(f"GiB and time are estimates ({SETTING}); a dash: not measured.")
    missing = report.missing()
    if missing:
        lines += ["", f"missing or not usable ({len(missing)}):"]
        for key in missing:
            lines += _told(key, report)
    asked = [row for row in report.rows if row.asked]
    ready = sum(row.ready for row in asked)
    lines += ["", f"{ready} of {len(asked)} asked for are ready ({report.mode} mode)"]
    if missing:
        lines.append(
            f"`mla-study vbench fetch-weights --to {report.weights}` gets what an address has"
        )
    return "\n".join(lines)


def document(report: Report) -> dict[str, Any]:
    """The report as JSON has it; sizes in bytes, memory in GiB, disk in GB, time in seconds."""
    return {
        "schema": 1,
        "ready": report.ready,
        "mode": report.mode,
        "weights": str(report.weights),
        "environment": {"ready": report.environment_ready, "told": report.environment},
        "device": report.devices,
        "detectron2": report.detectron2,
        "disk_free_gb": report.disk_gb,
        "memory_free_gib": report.memory_gib,
        "estimates": SETTING,
        "videos": None
        if report.folder is None
        else {
            "path": str(report.folder.path),
            "videos": report.folder.videos,
            "frames": report.folder.frames,
        },
        "scorers": [
            {
                "name": row.name,
                "asked": row.asked,
                "ready": row.ready,
                "lacks": list(row.lacks),
                "troubles": list(row.troubles),
                "memory_gib": row.gib,
                "seconds": row.seconds,
            }
            for row in report.rows
        ],
        "missing": [_entry(key, report) for key in report.missing()],
    }


def _entry(key: str, report: Report) -> dict[str, Any]:
    item, found = ITEMS[key], report.states.get(key)
    return {
        "key": key,
        "what": item.what,
        "kind": item.kind,
        "place": str(report.weights / item.place),
        "state": found.name if found else "missing",
        "sentence": found.sentence if found else f"detectron2: {report.detectron2}",
        "bytes": item.size,
        "bytes_exact": item.size is not None and not item.about,
        "sha256": item.sha256,
        "sha256_from": item.hash_from or None,
        "url": item.url,
        "licence": item.licence,
        "revision": item.revision or None,
        "by_hand": item.by_hand or None,
    }


def _told(key: str, report: Report) -> list[str]:
    item, entry = ITEMS[key], _entry(key, report)
    digest = "not published"
    if item.sha256:
        more = "…" if item.hash_from == "name" else ""
        digest = f"{item.sha256}{more} ({_HASHES[item.hash_from]})"
    of = " of the archive" if item.kind == "folder" and item.size else ""
    size = "code" if item.is_code else size_text(item) + of
    lines = [
        f"  {key}: {item.what}; {size}",
        f"    to      {entry['place']}",
        f"    from    {item.url}{f', {item.member} in it' if item.member else ''}",
        f"    sha256  {digest}",
        f"    licence {item.licence}",
    ]
    if item.by_hand:
        lines.append(f"    how     {item.by_hand}")
    if entry["state"] != "missing":
        lines.append(f"    {entry['state']}: {entry['sentence']}")
    return lines


_HASHES = {
    "source": "published",
    "name": "its beginning, in the file's name",
    "revision": "of its Python files at that revision",
    "recorded": "recorded by those who downloaded it",
}


def _line(row: Row) -> str:
    mark = "yes" if row.ready else "no"
    gib = "–" if row.gib is None else f"{row.gib:.1f}"
    lacks = ", ".join([*row.troubles, *row.lacks])
    return f"{row.name:<40}{mark:<7}{gib:>6}{time_text(row.seconds):>9}  {lacks}".rstrip()


def _asked(dimensions: Sequence[str], mode: Mode) -> tuple[str, ...]:
    if dimensions:
        return choose(dimensions)
    return tuple(name for name in DIMENSIONS if mode != "custom" or is_free(name))


def _look(videos: Path) -> Folder:
    try:
        if not videos.exists():
            raise UserError(f"{videos} does not exist: name a folder of videos, or a video")
        return look_into(videos)
    except OSError as error:
        raise UserError(
            f"{videos} cannot be read ({error.strerror or error}): check its rights"
        ) from None


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


def _sum_gb(keys: Iterable[str]) -> float:
    return sum(ITEMS[key].download or 0 for key in keys) / 1e9


def _disk(report: Report) -> str:
    asked = {key for row in report.rows if row.asked for key in row.lacks}
    free = "not known" if report.disk_gb is None else f"{report.disk_gb:.1f} GB free"
    need = _sum_gb(asked)
    short = report.disk_gb is not None and need > report.disk_gb
    return f"{free}; what is asked for and missing takes about {need:.1f} GB" + (
        ": not enough" if short else ""
    )


def _memory(report: Report) -> str:
    if report.memory_gib is None:
        return "not known"
    asked = [row for row in report.rows if row.asked and row.gib is not None]
    over = [row.name for row in asked if (row.gib or 0) > (report.memory_gib or 0)]
    note = f"; less than {', '.join(over)} took when measured" if over else ""
    return f"{report.memory_gib:.1f} GiB free{note}"


def _videos(report: Report) -> str:
    folder = report.folder
    assert folder is not None
    if folder.videos == 0:
        return f"none in {folder.path}"
    frames = "frames not counted" if folder.frames is None else f"about {folder.frames:.0f} frames"
    asked = [row for row in report.rows if row.asked]
    known = [row.seconds for row in asked if row.seconds is not None]
    blank = len(asked) - len(known)
    rest = f", and what {blank} more take, of which no time is known" if blank else ""
    total = time_text(sum(known)) if known else "unknown"
    return f"{folder.videos} in {folder.path}, {frames}; all that is asked for: {total}{rest}"
