"""Results of a user that a notebook's parameter names: folders with commas between them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mla_study.errors import UserError
from mla_study.study.runs import RUN_FILE


def folders(names: str, root: Path, command: str) -> list[Path]:
    """The folders that a parameter names, relative ones below ``root``.

    Args:
        command: what makes such a result.

    Raises:
        UserError: one of them holds no result.
    """
    found: list[Path] = []
    for part in filter(None, (text.strip() for text in names.split(","))):
        folder = root / part
        if not (folder / RUN_FILE).is_file():
            raise UserError(
                f"{folder} holds no {RUN_FILE}: name the --out folder of a finished `{command}`"
            )
        found.append(folder)
    return found


def named(places: Iterable[Path]) -> dict[str, Path]:
    """Folders by their names, each once; a number parts those of one name."""
    unique = {folder.resolve(): folder for folder in places}.values()
    found: dict[str, Path] = {}
    for folder in unique:
        name, count = folder.name, 2
        while name in found:
            name, count = f"{folder.name}-{count}", count + 1
        found[name] = folder
    return found


def files(places: dict[str, Path]) -> dict[str, Path]:
    """Their run records and tables, as ``INPUTS`` of a figure gives them."""
    return {
        f"{name}/{file.name}": file
        for name, folder in places.items()
        for file in sorted([folder / RUN_FILE, *folder.glob("*.parquet")])
    }
