"""Files of a figure's earlier drawing that it no longer draws: removed, lest they look valid.

What an earlier drawing wrote is told by its stamp (:mod:`mla_study.study.staleness`); no other file
is touched, and none that was edited since.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.study.runs import file_sha256, read_record
from mla_study.study.staleness import same_parameters


def withdraw(stamp_file: Path, folder: Path, values: Mapping[str, Any]) -> list[str]:
    """Remove what was drawn with these parameters, and its stamp: the data behind it are gone.

    A drawing with other parameters was drawn from something else and stays.

    :return: sentences that say so.
    :raises UserError: something cannot be removed.
    """
    stamp = read_record(stamp_file)
    if not same_parameters(stamp, values):
        return []
    said = remove(folder, stamp)
    stamp_file.unlink()
    return said


def remove(folder: Path, stamp: Mapping[str, Any], kept: Container[str] = ()) -> list[str]:
    """Remove the files in ``folder`` that a stamp names, but for those that are ``kept``.

    :return: sentences that say so.
    :raises UserError: one cannot be removed.
    """
    outputs = stamp.get("outputs")
    removed: list[str] = []
    edited: list[str] = []
    for name, digest in outputs.items() if isinstance(outputs, dict) else ():
        file = folder / name
        if name in kept or file.name != name or not file.is_file():
            continue
        try:
            if file_sha256(file) != digest:
                edited.append(name)
                continue
            file.unlink()
        except OSError as error:
            raise UserError(
                f"{file} is no longer drawn and cannot be removed ({error.strerror or error}): "
                "remove it by hand."
            ) from error
        removed.append(name)
    said = [f"removed {', '.join(removed)}, which it no longer draws"] if removed else []
    if edited:
        said.append(f"no longer draws {', '.join(edited)}, left as edited by hand")
    return said
