"""What ``vbench sample`` leaves beside a folder of videos, read back.

``NAME.sampling`` stands beside the folder NAME: ``samples.csv`` has a row a video,
``sampling.json`` says how they were made.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_study.errors import UserError

TABLE, RECORD = "samples.csv", "sampling.json"


@dataclass(frozen=True)
class Sampled:
    """One video's row.

    Attributes:
        told: what the model was told for the prompt. sha256: of the file that was made.
    """

    prompt: str
    told: str
    seed: int
    sha256: str


@dataclass(frozen=True)
class Records:
    """What is known of a folder of sampled videos.

    Attributes:
        path: of ``sampling.json``.
        prompts: hash of the file of prompts. known_as: whose it is, as far as the hash says.
        extended: hash of the file of longer prompts, None where the short ones were told.
        extended_by: who wrote it. seed: the one that the videos' own follow from.
        videos: file name -> row.
    """

    path: Path
    prompts: str
    known_as: str
    extended: str | None
    extended_by: str
    seed: int | None
    videos: Mapping[str, Sampled]


def records_of(folder: Path) -> Path:
    """Where the records of a folder of sampled videos lie."""
    whole = folder.absolute()
    return whole.with_name(f"{whole.name}.sampling")


def read_records(place: Path) -> Records | None:
    """The records of a folder, or of the folder that a video lies in; None where there are none.

    Raises:
        UserError: they are there, but cannot be read.
    """
    folder = records_of(place.parent if place.is_file() else place)
    path, table = folder / RECORD, folder / TABLE
    if not path.is_file():
        return None
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        identity, prompts = held["identity"], held["prompts"]
        text = table.read_text(encoding="utf-8") if table.is_file() else ""
        videos = {
            row["file"]: Sampled(row["prompt"], row["told"], int(row["seed"]), row["sha256"])
            for row in csv.DictReader(io.StringIO(text, newline=""))
        }
        return Records(
            path, identity["inputs"]["prompts"], prompts["known_as"],
            identity["inputs"].get("extended"), prompts["extended_by"], identity["seed"], videos,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} says how the videos were sampled, but cannot be read "
            f"({type(error).__name__}: {error}): restore it, or move it away"
        ) from None
