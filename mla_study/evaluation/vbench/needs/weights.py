"""Whether a weights folder holds what a scorer needs, and that it is what it should be.

VBench unpickles its checkpoints, which runs what stands in them: every file's sha256 is therefore
checked before a worker starts. Hashes are kept in ``WEIGHTS/.sha256.json`` by size and time of
change, so that only new files are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mla_study.errors import UserError
from mla_study.evaluation.vbench.needs.items import (
    CLIP_T,
    CLIP_T_KEYS,
    ITEMS,
    NEEDS,
    Item,
    Mode,
    needed_by,
)
from mla_study.study.runs import atomic_write, file_sha256, read_record

__all__ = [
    "ITEMS",
    "NEEDS",
    "Item",
    "Mode",
    "State",
    "amount",
    "code_sha256",
    "find_detectron2",
    "fingerprint",
    "is_random",
    "keys_for",
    "look",
    "needed_by",
    "path_of",
    "require",
    "size_text",
    "weights_folder",
]

CACHE = ".sha256.json"
RANDOM = "RANDOM_WEIGHTS.json"
DETECTRON2 = "detectron2"
TRUST = "--trust-weights"
_ASSETS = "MLA_STUDY_ASSETS"

Name = Literal["ready", "missing", "damaged", "unknown"]


@dataclass(frozen=True)
class State:
    """What is at an item's place.

    Attributes:
        name: ``unknown`` is there, whole as far as one can tell, but vouched for by nobody: the
            user's word (``--trust-weights``) makes it usable.
        sentence: why, with what to do; empty where it is ready.
        sha256: of the file, or of a folder's code, where it was computed.
    """

    name: Name
    sentence: str = ""
    sha256: str | None = None

    def usable(self, trust: bool = False) -> bool:
        """Whether a worker may read it."""
        return self.name == "ready" or (trust and self.name == "unknown")


def weights_folder(given: Path | None = None) -> Path:
    """The weights folder: the argument, VBENCH_CACHE_DIR, or ``~/.cache/vbench``; may be absent.

    Raises:
        UserError: it is no folder, or cannot be read.
    """
    told = os.environ.get("VBENCH_CACHE_DIR")
    place = given or (Path(told) if told else Path.home() / ".cache" / "vbench")
    place = place.expanduser().absolute()
    try:
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, but the weights need a folder: name another")
        if place.is_dir():
            next(place.iterdir(), None)
    except OSError as error:
        raise UserError(
            f"the weights folder {place} cannot be read ({error.strerror or error}): "
            "check its rights"
        ) from None
    return place


def keys_for(scorer: str, weights: Path, mode: Mode = "short") -> tuple[str, ...]:
    """Keys of what a scorer reads in this folder: :func:`needed_by`, but for CLIP-T and CLIP-F the
    folder ``clip_t`` where it is there.

    Raises:
        KeyError: no such scorer.
    """
    keys = needed_by(scorer, mode)
    if scorer in ("clip_t", "clip_f") and (weights / CLIP_T).is_dir():
        return CLIP_T_KEYS
    return keys


def path_of(key: str, weights: Path) -> Path:
    """Where an item is read from: its place, or for substitutes ``$MLA_STUDY_ASSETS/weights``."""
    item = ITEMS[key]
    place = weights / item.place
    assets = os.environ.get(_ASSETS)
    if assets and item.place.startswith("substitutes/") and not place.exists():
        other = Path(assets) / "weights" / place.name
        if other.is_file():
            return other
    return place


def look(key: str, weights: Path) -> State:
    """Look at an item's place, and hash what is there unless that was done before.

    Raises:
        KeyError: no such item.
        UserError: it cannot be read.
    """
    item, path = ITEMS[key], path_of(key, weights)
    try:
        if path.exists() and is_random(weights, [key]):
            return State(
                "unknown",
                f"{path} holds random numbers ({RANDOM} says so), so its scores mean nothing: "
                f"{TRUST} uses it all the same",
            )
        if item.kind in ("file", "package"):
            return _file_state(item, path, weights)
        return _folder_state(item, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): check its rights"
        ) from None


def require(
    scorers: Iterable[str],
    weights: Path,
    mode: Mode = "short",
    *,
    trust: bool = False,
    without: Iterable[str] = (),
) -> None:
    """Refuse to start where something is missing, damaged or vouched for by nobody.

    Of detectron2 see :func:`find_detectron2`.

    Args:
        trust: the user vouches for what nobody else does.
        without: keys of what is had otherwise.

    Raises:
        UserError: tells of the first such item, and how many more there are.
    """
    keys = [key for scorer in scorers for key in keys_for(scorer, weights, mode)]
    had = set(without)
    found = [look(key, weights) for key in dict.fromkeys(keys) if key not in had]
    bad = [one.sentence for one in found if not one.usable(trust)]
    if bad:
        more = f"; {len(bad) - 1} more: `mla-study vbench doctor` lists them" if bad[1:] else ""
        raise UserError(f"{bad[0]}{more}")


def find_detectron2(
    given: Path | None,
    weights: Path,
    installed: bool = False,
    *,
    trust: bool = False,
) -> Path | None:
    """The checkout to put on a worker's path, or None where the environment has it installed.

    Args:
        given: the user's own checkout, taken as it is; else ``WEIGHTS/detectron2`` is.
        installed: whether the environment has it.

    Raises:
        UserError: it is nowhere, or the code below the weights is of another revision.
    """
    item = ITEMS[DETECTRON2]
    if given is not None:
        if not (given / item.contains[0]).is_file():
            raise UserError(f"{given} is no checkout of detectron2: it has no {item.contains[0]}")
        return given.expanduser().absolute()
    if installed:
        return None
    found = look(DETECTRON2, weights)
    if found.usable(trust):
        return path_of(DETECTRON2, weights)
    raise UserError(
        f"{found.sentence}, or check out github.com/facebookresearch/detectron2 at "
        f"{item.revision[:8]} and give --detectron2 PATH"
    )


def fingerprint(scorer: str, weights: Path, mode: Mode = "short") -> dict[str, str]:
    """Place -> sha256 of all that a scorer reads, what is missing left out. Keys sorted.

    Of a folder of code that of its Python files, of another folder that of each file.
    """
    found: dict[str, str] = {}
    for key in keys_for(scorer, weights, mode):
        item, path = ITEMS[key], path_of(key, weights)
        if item.is_code:
            if path.is_dir():
                found[item.place] = code_sha256(path)
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file() and not any(p.startswith(".") for p in file.parts[-2:]):
                    name = f"{item.place}/{file.relative_to(path).as_posix()}"
                    found[name] = _cached_sha256(file, weights)
        elif path.is_file():
            found[item.place] = _cached_sha256(path, weights)
    return dict(sorted(found.items()))


def is_random(weights: Path, keys: Iterable[str]) -> bool:
    """Whether any of these items holds made-up numbers, by ``RANDOM_WEIGHTS.json``."""
    made_up = _made_up(weights)
    return any(
        place == ITEMS[key].place or place.startswith(ITEMS[key].place + "/")
        for key in keys
        for place in made_up
    )


def code_sha256(folder: Path) -> str:
    """One hash of a folder's Python files: that of the lines ``sha256  path``, sorted by path."""
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*.py")
        if "__pycache__" not in file.parts and file.is_file()
    )
    lines = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def size_text(item: Item) -> str:
    """``354.0 MB (353,976,522 bytes)``, or how little is known."""
    if item.size is None:
        return "size not published"
    told = amount(item.size)
    return f"about {told}" if item.about else f"{told} ({item.size:,} bytes)"


def amount(size: float) -> str:
    """Bytes in GB, MB or kB."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size:.0f} bytes"


def _file_state(item: Item, path: Path, weights: Path) -> State:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "missing"
        return State("missing", f"{path} is {what}: {get(item)}")
    size = path.stat().st_size
    if item.size is not None and not item.about and size != item.size:
        return State(
            "damaged",
            f"{path} has {size:,} bytes instead of {item.size:,}{_looks_like(path)}: "
            f"remove it, and {get(item)}",
        )
    if item.sha256 is None:
        return State(
            "unknown",
            f"no sha256 is published for {path}: {TRUST} uses it on your word",
            sha256=_cached_sha256(path, weights),
        )
    digest = _cached_sha256(path, weights)
    if digest.startswith(item.sha256):
        return State("ready", sha256=digest)
    if item.hash_from == "recorded":
        return State(
            "unknown",
            f"{path} has sha256 {digest[:12]}… instead of the {item.sha256[:12]}… that others had: "
            f"remove it, and {get(item)}; or vouch for it by {TRUST}",
            sha256=digest,
        )
    return State(
        "damaged",
        f"{path} has sha256 {digest[:12]}… instead of {item.sha256[:12]}…: "
        f"remove it, and {get(item)}",
        sha256=digest,
    )


def _folder_state(item: Item, path: Path) -> State:
    if not path.is_dir():
        return State("missing", f"{path} is missing: {get(item)}")
    lacking = [name for name in item.contains if not (path / name).is_file()]
    if lacking:
        return State("damaged", f"{path} lacks {', '.join(lacking)}: {get(item)}")
    if item.is_code:
        digest = code_sha256(path)
        if digest == item.sha256:
            return State("ready", sha256=digest)
        return State(
            "unknown",
            f"the code in {path} is not that of revision {item.revision[:8]}: check that out, or "
            f"vouch for it by {TRUST}",
            sha256=digest,
        )
    return State("unknown", f"no sha256 is published for {path}: {TRUST} uses it on your word")


def get(item: Item) -> str:
    """What to do to have an item, as the end of a sentence."""
    if item.by_hand:
        return item.by_hand
    inside = f" ({item.member} in it)" if item.member else ""
    return f"`mla-study vbench fetch-weights` gets it from {item.url}{inside}"


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return ", a Git LFS pointer in place of the file"
    if head.startswith((b"<!doctype html", b"<html")):
        return ", a web page in place of the file"
    return ""


def _made_up(weights: Path) -> frozenset[str]:
    try:
        listed = json.loads((weights / RANDOM).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise UserError(f"{weights / RANDOM} cannot be read ({error}): remove it") from None
    if not isinstance(listed, list):
        raise UserError(f"{weights / RANDOM} is no list of paths: remove it")
    return frozenset(str(name) for name in listed)


def _cached_sha256(path: Path, weights: Path) -> str:
    found = path.stat()
    stamp = [found.st_size, found.st_mtime_ns]
    name = path.relative_to(weights).as_posix() if path.is_relative_to(weights) else str(path)
    cache = read_record(weights / CACHE)
    entry = cache.get(name)
    if isinstance(entry, list) and entry[:2] == stamp and len(entry) == 3:
        return str(entry[2])
    digest = file_sha256(path)
    if weights.is_dir():
        told = json.dumps({**read_record(weights / CACHE), name: [*stamp, digest]}, indent=1)
        with contextlib.suppress(UserError):  # where it cannot be written, hash anew each time
            atomic_write(weights / CACHE, told.encode())
    return digest
