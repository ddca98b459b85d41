"""Zip archives, taken apart so that nothing in them reaches outside the folder they go to."""

from __future__ import annotations

import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from mla_study.errors import UserError

_MOST = 64_000_000_000
_BLOCK = 1 << 20


def extract_member(archive: Path, member: str, to: Path) -> None:
    """Write one file of an archive to ``to``.

    Raises:
        UserError: the archive is no zip, is damaged, or has no such file.
    """
    with _opened(archive) as held:
        try:
            info = held.getinfo(member)
        except KeyError:
            raise UserError(f"{archive} holds no {member}: it is another archive") from None
        _copy(held, info, to)


def extract_folder(archive: Path, to: Path, strip: bool) -> None:
    """Unpack an archive into the folder ``to``, which appears when it is complete.

    Links and macOS's resource forks are left out.

    Args:
        strip: leave out the one folder that everything in the archive lies in, if there is one.

    Raises:
        UserError: no zip, damaged, too large, or a name that leads out of the folder.
    """
    fresh = to.with_name(f".{to.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with _opened(archive) as held:
            files = [info for info in held.infolist() if not info.is_dir() and not _skipped(info)]
            if sum(info.file_size for info in files) > _MOST:
                raise UserError(f"{archive} would unpack to more than {_MOST / 1e9:.0f} GB")
            names = {info.filename: _inside(info.filename, archive) for info in files}
            tops = {name.parts[0] for name in names.values()}
            cut = 1 if strip and len(tops) == 1 else 0
            for info in files:
                parts = names[info.filename].parts[cut:]
                if parts:
                    _copy(held, info, fresh.joinpath(*parts))
        if to.is_dir():
            shutil.rmtree(to)
        fresh.replace(to)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _opened(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except zipfile.BadZipFile:
        raise UserError(f"{archive} is no zip archive, or is cut short") from None


def _inside(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    drive = ":" in path.parts[0] if path.parts else True
    if path.is_absolute() or drive or ".." in path.parts:
        raise UserError(f"{archive} holds {name!r}, which leads out of its folder: do not use it")
    return path


def _skipped(info: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(info.external_attr >> 16) or info.filename.startswith("__MACOSX/")


def _copy(held: zipfile.ZipFile, info: zipfile.ZipInfo, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with held.open(info) as source, to.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        to.unlink(missing_ok=True)
        raise UserError(f"{held.filename} is damaged at {info.filename} ({error})") from None
