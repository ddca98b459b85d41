"""Whether a figure must be drawn again: by content, never by time of modification.

After a fresh clone all times are equal or random. A stamp beside the figures keeps the hash of all
that went in, part by part (so that the reason can be told), and of each file that came out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.study.codehash import code_hash, package_roots
from mla_study.study.notebooks import Figure, Project, notebook_cells
from mla_study.study.runs import RUN_FILE, atomic_write, file_sha256, json_sha256, read_record

# A file changed within this time of being hashed could change again without its times moving.
RACY_NS = 2_000_000_000
VBENCH = "score videos by `mla-study vbench run` with --out results/data/vbench_NAME"


class HashCache:
    """SHA-256 of large inputs, taken again unless size, inode, mtime and ctime all stand still.

    A time of modification can be set at will, ctime cannot; a file whose times are too young to be
    told from a further write is hashed every time. Only ever a shortcut: lose it, lose seconds.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[Any]] = read_record(file)

    def sha256(self, path: Path) -> str:
        """:raises UserError: the file cannot be read."""
        path = path.resolve()
        try:
            before = _identity(path)
            known = self._known.get(str(path))
            if known and known[:-1] == before:
                return str(known[-1])
            started = time.time_ns()
            digest = file_sha256(path)
            after = _identity(path)
        except OSError as error:
            raise UserError(f"Input {path} cannot be read ({error.strerror or error}).") from error
        if before == after and max(before[2], before[3]) < started - RACY_NS:
            self._known[str(path)] = [*before, digest]
        return digest

    def save(self) -> None:
        atomic_write(self._file, json.dumps(self._known).encode())


def key_parts(
    figure: Figure, project: Project, values: Mapping[str, Any], cache: HashCache
) -> dict[str, str]:
    """Hash of each thing that the figure is made from.

    :raises UserError: data or an input is missing.
    """
    if reason := absent(figure, project, values):
        raise UserError(f"{figure.id} is drawn from {reason}.")
    versions = {name: importlib.metadata.version(name) for name in ("matplotlib", "numpy")}
    return {
        "notebook": json_sha256(notebook_cells(figure.notebook)),
        "code": code_hash(
            f"analysis.{figure.id}", roots={**package_roots(), "analysis": project.analysis}
        ),
        "parameters": json_sha256(values),
        "data": json_sha256(
            {
                name: _data_hash(path)
                for entry in _drawn(figure, values)
                for name, path in _places(project, entry)
            }
        ),
        "inputs": json_sha256(input_hashes(figure, project, values, cache)),
        "libraries": json_sha256(versions),
    }


def input_hashes(
    figure: Figure, project: Project, values: Mapping[str, Any], cache: HashCache
) -> dict[str, str]:
    """SHA-256 of each file of the module's ``INPUTS(...)``, folders file by file."""
    if "INPUTS" not in figure.functions:
        return {}
    inputs = load_module(figure, project).INPUTS
    found = inputs(**{name: values[name] for name in inspect.signature(inputs).parameters})
    if not isinstance(found, Mapping):
        found = {Path(path).name: path for path in found}
    hashes: dict[str, str] = {}
    for name, path in found.items():
        for relative, file in _files(Path(path)):
            hashes[f"{name}{relative}"] = cache.sha256(file)
    return hashes


def load_module(figure: Figure, project: Project) -> Any:
    """Import ``analysis.<id>`` of this project."""
    root = str(project.root)
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(f"analysis.{figure.id}")


def why_stale(stamp: Mapping[str, Any], parts: Mapping[str, str], folder: Path) -> str:
    """The reason to draw again in a word or two, or '' where the outputs stand as they should."""
    before = stamp.get("parts")
    outputs = stamp.get("outputs")
    if not isinstance(before, dict) or not isinstance(outputs, dict) or not outputs:
        return "never drawn"
    changed = [part for part in parts if before.get(part) != parts[part]]
    if changed:
        return f"changed: {', '.join(changed)}"
    for name, digest in outputs.items():
        try:
            if file_sha256(folder / name) != digest:
                return f"{name} was edited"
        except OSError:
            return f"{name} is missing"
    return ""


def write_stamp(
    file: Path,
    parts: Mapping[str, str],
    outputs: Mapping[str, str],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Keep what a figure was made from and what came out; ``more`` is no part of its key."""
    stamp = {"key": json_sha256(parts), "parts": dict(parts), "outputs": dict(outputs)}
    stamp |= more or {}
    atomic_write(file, (json.dumps(stamp, indent=1) + "\n").encode())


def same_parameters(stamp: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether what was drawn before was drawn with these parameters."""
    parts = stamp.get("parts")
    return isinstance(parts, dict) and parts.get("parameters") == json_sha256(values)


def absent(figure: Figure, project: Project, values: Mapping[str, Any]) -> str:
    """Why a figure's data are not there and how they are made, or '' where all of them are."""
    for entry in _drawn(figure, values):
        if any(path.exists() for _, path in _places(project, entry)):
            continue
        path = project.root / entry
        if "/vbench_" in entry:
            return f"{path}, of which there is none: {VBENCH}"
        study = path.name.startswith("study_")
        how = "study-full" if study else f"data FIG={figure.id}"
        return f"{path}, which is not there: restore it, or measure it by `make {how}`"
    return ""


def _places(project: Project, entry: str) -> list[tuple[str, Path]]:
    """Name and place of an entry of ``DATA``, whose ``*`` stands for any part of a name."""
    root = project.root
    if "*" not in entry:
        return [(entry, root / entry)]
    return [(path.relative_to(root).as_posix(), path) for path in sorted(root.glob(entry))]


def _drawn(figure: Figure, values: Mapping[str, Any]) -> tuple[str, ...]:
    return () if any(values.get(name) for name in figure.instead) else figure.data


def _data_hash(path: Path) -> dict[str, str]:
    return {
        relative: _run_identity(file) if file.name == RUN_FILE else file_sha256(file)
        for relative, file in _files(path)
    }


def _run_identity(file: Path) -> str:
    # Dates and timings in a run record are not what a figure is drawn from.
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        return json_sha256({key: value for key, value in run.items() if key != "observed"})
    except (ValueError, AttributeError):
        return file_sha256(file)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                yield f"/{file.relative_to(path).as_posix()}", file
    else:
        yield "", path


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
