"""Download what the scorers need, check it, and put it where VBench looks for it.

A file comes as ``FILE.part``, is checked by size and sha256, and only then gets its name; archives
are unpacked beside it first. Whatever stops that, the same command goes on.
"""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mla_study.errors import UserError, tell
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, is_free
from mla_study.evaluation.vbench.needs.download import (
    PATIENCE,
    DownloadError,
    Patience,
    discard,
    download,
)
from mla_study.evaluation.vbench.needs.unpack import extract_folder, extract_member
from mla_study.evaluation.vbench.needs.weights import (
    DETECTRON2,
    ITEMS,
    Item,
    Mode,
    amount,
    code_sha256,
    keys_for,
    look,
    needed_by,
    weights_folder,
)
from mla_study.evaluation.vbench.runs.plan import scorers_for
from mla_study.study.runs import file_sha256

_SPARE = 200_000_000  # bytes that the disk keeps


@dataclass(frozen=True)
class Wanted:
    """What to fetch: items to download, and those that a human must get."""

    downloads: tuple[Item, ...]
    by_hand: tuple[Item, ...]
    there: int


def fetch_weights(
    to: Path,
    *,
    dimensions: Sequence[str] = (),
    mode: Mode = "short",
    mirror: str | None = None,
    dry_run: bool = False,
    patience: Patience = PATIENCE,
) -> bool:
    """Fetch what is missing or damaged; True if nothing is missing then. Progress on stderr.

    Raises:
        UserError: an unknown dimension, a bad mirror, a full disk, a folder that cannot be written.
    """
    root = weights_folder(to)
    base = _mirror(mirror)
    wanted = plan(root, dimensions, mode)
    tell(
        f"{wanted.there} of {wanted.there + len(wanted.downloads) + len(wanted.by_hand)} are there"
    )
    failed: dict[str, list[str]] = {}
    if dry_run:
        for item in wanted.downloads:
            size = "size unknown" if item.download is None else amount(item.download)
            print(f"{root / item.place}: {size} from {item.url} ({item.licence})")
    else:
        failed = _fetch_all(wanted.downloads, root, base, patience)
    for item in wanted.by_hand:
        print(
            f"by hand: {item.what}, from {item.url}, to {root / item.place}: {item.by_hand}",
            file=sys.stderr,
        )
    for cause, names in failed.items():
        print(f"not fetched: {', '.join(names)}: {cause}", file=sys.stderr)
    return not failed and not wanted.by_hand and not (dry_run and wanted.downloads)


def plan(root: Path, dimensions: Sequence[str] = (), mode: Mode = "short") -> Wanted:
    """What is not there yet for these dimensions (default: all 16, of custom clips the free ones).

    Raises:
        UserError: unknown dimension, or what is there cannot be read.
    """
    names = scorers_for(mode, dimensions) if dimensions else tuple(DIMENSIONS)
    if mode == "custom" and not dimensions:
        names = tuple(name for name in names if is_free(name))
    keys = [key for name in names for key in keys_for(name, root, mode)]
    if any(name in DIMENSIONS and DIMENSIONS[name].detectron2 for name in names):
        keys.append(DETECTRON2)
    if "temporal_flickering" in names and mode == "short":
        keys += needed_by("static_filter")
    keys = list(dict.fromkeys(keys))
    lacking = [key for key in keys if look(key, root).name in ("missing", "damaged")]
    items = [ITEMS[key] for key in lacking]
    return Wanted(
        tuple(item for item in items if not item.by_hand),
        tuple(item for item in items if item.by_hand),
        len(keys) - len(items),
    )


def _fetch_all(
    items: Sequence[Item], root: Path, base: str | None, patience: Patience
) -> dict[str, list[str]]:
    """Fetch each; cause -> names of those that failed."""
    failed: dict[str, list[str]] = {}
    dead: dict[str, str] = {}
    for number, item in enumerate(items, 1):
        cause = ""
        for url in (item.url, *item.also):
            address = _address(url, base)
            host = urlsplit(address).netloc
            try:
                if host in dead:
                    raise DownloadError(dead[host])
                _fetch(replace(item, url=address), root, patience, f"{number}/{len(items)}")
            except DownloadError as error:
                cause = cause or error.cause
                if error.host:
                    dead[error.host] = error.cause
            else:
                cause = ""
                break
        if cause:
            failed.setdefault(cause, []).append(item.place)
    return failed


def _fetch(item: Item, root: Path, patience: Patience, count: str) -> None:
    place = root / item.place
    archive = bool(item.member) or item.kind in ("folder", "hub", "checkout")
    name = f"{place.name}.zip" if archive else place.name
    part = place.with_name(f"{name}.part")
    exact = None if item.about or item.member else item.size
    there = part.stat().st_size if part.is_file() else 0
    _room(item, part, there)
    with _bar(f"{count} {place.name}", item.download, there) as bar:

        def on_bytes(new: int, now: int, total: int | None) -> None:
            if total is not None:
                bar.total = total
            bar.update(now - bar.n)

        download(item.url, part, size=exact, patience=patience, on_bytes=on_bytes)
    try:
        if archive:
            _unpacked(item, part, place)
        else:
            _checked(item, part)
            part.replace(place)
    except UserError as error:
        discard(part)
        raise DownloadError(f"{error}; it was removed") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full at {place}: free some space, and the same command goes on"
            ) from None
        raise
    discard(part)
    tell(f"{place} is there, {_proof(item)}")


def _unpacked(item: Item, part: Path, place: Path) -> None:
    if item.member:
        fresh = place.with_name(f".{place.name}.unpacking")
        try:
            extract_member(part, item.member, fresh)
            _checked(item, fresh)
            fresh.replace(place)
        finally:
            fresh.unlink(missing_ok=True)
        return
    extract_folder(part, place, strip=item.is_code)
    lacking = [name for name in item.contains if not (place / name).is_file()]
    wrong = item.is_code and not lacking and code_sha256(place) != item.sha256
    if lacking or wrong:
        shutil.rmtree(place)
        what = f"has no {', '.join(lacking)}" if lacking else "has other code than its revision"
        raise UserError(f"the archive of {place.name} {what}")


def _checked(item: Item, path: Path) -> None:
    size = path.stat().st_size
    if item.size is not None and not item.about and size != item.size:
        raise UserError(f"{item.place} came with {size:,} bytes instead of {item.size:,}")
    if item.sha256 is not None:
        digest = file_sha256(path)
        if not digest.startswith(item.sha256):
            raise UserError(
                f"{item.place} came with sha256 {digest[:12]}… instead of {item.sha256[:12]}…"
            )


def _proof(item: Item) -> str:
    if item.sha256 is None:
        return "whole, but no sha256 is published for it: its use takes --trust-weights"
    return "with the sha256 it should have"


def _room(item: Item, part: Path, there: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    need = (item.download or 0) - there
    if item.member or item.kind == "folder":
        need += item.size or 0  # beside the archive
    free = shutil.disk_usage(next(p for p in part.parents if p.exists())).free
    if need + _SPARE > free:
        raise UserError(
            f"{part.parent} has {amount(free)} free, but {part.name} takes {amount(need)}: free "
            "some space, or name another folder by --to; the same command goes on"
        )


def _mirror(mirror: str | None) -> str | None:
    if mirror is None:
        return None
    parts = urlsplit(mirror)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--mirror {mirror} is no http:// or https:// address")
    return mirror.rstrip("/")


def _address(url: str, base: str | None) -> str:
    return url if base is None else f"{base}/{url.partition('://')[2]}"


def _bar(what: str, total: int | None, there: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total, initial=there, desc=what, unit="B", unit_scale=True, disable=None, leave=False
    )
