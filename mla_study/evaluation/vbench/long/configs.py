"""Settings of VBench's long mode: lengths of clips, weights of its two branches, mapping tables.

VBench's wheel leaves its four YAML files out. Their published values travel with this package as
data; ``--long-configs DIR`` reads upstream's own files instead. They are flat lists of
``name: number``, which is all that is read here, so no YAML library is needed.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS
from mla_study.study.runs import json_sha256

DATA = Path(__file__).resolve().parents[3] / "data" / "vbench"
PUBLISHED = "published values"
LENGTHS, WEIGHTS = "clip_length_mix.yaml", "slow_fast_params.yaml"
TABLES = {
    "subject_consistency": "subject_mapping_table.yaml",
    "background_consistency": "background_mapping_table.yaml",
}
"""The two dimensions that compare clips with each other, and the files of their tables."""
FILES = (LENGTHS, WEIGHTS, *TABLES.values())
CUSTOM_SECONDS = 2
"""Upstream cuts videos of one's own (long_custom_input) into clips of this length, always."""

Table = tuple[tuple[float, float], ...]
_SUFFIX = {"subject_consistency": "sb", "background_consistency": "bg"}


@dataclass(frozen=True)
class LongConfigs:
    """What the four files say.

    Attributes:
        clip_seconds: dimension -> length of its clips.
        slow_fast: upstream's names -> numbers (``w_inclip_sb`` and so on). Its means and standard
            deviations are carried along, but upstream's code does not use them.
        tables: dimension -> pairs (clip-to-clip score, mapped score), by rising score.
        source: ``published values``, or the folder that was read.
    """

    clip_seconds: Mapping[str, float]
    slow_fast: Mapping[str, float]
    tables: Mapping[str, Table]
    source: str = PUBLISHED

    def weights(self, dimension: str, dev: bool = True) -> tuple[float, float]:
        """Weights of in-clip and mapped clip-to-clip score; (1, 0) without upstream's dev_flag."""
        if not dev:
            return 1.0, 0.0
        suffix = _SUFFIX[dimension]
        return self.slow_fast[f"w_inclip_{suffix}"], self.slow_fast[f"w_clip2clip_{suffix}"]

    def seconds(self, dimension: str, exact: bool, members: Iterable[str] | None = None) -> float:
        """Length of the clips that a dimension is scored on.

        Args:
            exact: upstream's way. It cuts a video once for all dimensions, at the longest length
                among those that its prompt belongs to, and cuts the fraction of a second off; a
                video of one's own always at two seconds. Otherwise the dimension's own length.
            members: dimensions that the prompt belongs to in VBench's list; None for a video of
                one's own.

        Raises:
            UserError: upstream's way, and less than a second.
        """
        if not exact:
            return self.clip_seconds[dimension]
        if members is None:
            return float(CUSTOM_SECONDS)
        longest = max(self.clip_seconds[name] for name in {dimension, *members})
        if longest < 1:
            raise UserError(
                f"clips of {longest:g} s for {dimension} ({self.source}): upstream's code cuts "
                "that down to 0 s and stops; write at least 1, or choose the corrected way"
            )
        return float(int(longest))

    @property
    def sha256(self) -> str:
        """Of the values, wherever they came from."""
        tables = {name: [list(pair) for pair in table] for name, table in self.tables.items()}
        values = [dict(self.clip_seconds), dict(self.slow_fast), tables]
        return json_sha256(values)


def load_configs(folder: Path | None = None) -> LongConfigs:
    """The published values, or upstream's four files.

    Args:
        folder: that of the files, or a checkout of VBench that holds it.

    Raises:
        UserError: no such folder, a file that is missing or not readable as ``name: number`` lines,
            or values that no long mode can work with.
    """
    if folder is None:
        return _published()
    if not folder.is_dir():
        raise UserError(f"--long-configs {folder} is no folder: name the one with {LENGTHS}")
    places = (folder, folder / "configs", folder / "vbench2_beta_long" / "configs")
    place = next((place for place in places if (place / LENGTHS).is_file()), folder)
    missing = [file for file in FILES if not (place / file).is_file()]
    if missing:
        raise UserError(
            f"--long-configs {place} lacks {', '.join(missing)}: it needs upstream's four files "
            f"({', '.join(FILES)}), or leave the option out for the published values"
        )
    tables: dict[str, Table] = {}
    for name, file in TABLES.items():
        pairs = [(_number(place / file, key), value) for key, value in _read(place / file).items()]
        tables[name] = tuple(sorted(pairs))
    lengths, weights = _read(place / LENGTHS), _read(place / WEIGHTS)
    return _checked(LongConfigs(lengths, weights, tables, str(folder)), place)


def _published() -> LongConfigs:
    values = json.loads((DATA / "long_params.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader(io.StringIO((DATA / "long_mapping.csv").read_text("utf-8"))))
    columns = {name: f"{name.removesuffix('_consistency')}_mapped" for name in TABLES}
    tables = {
        name: tuple((float(row["clip_to_clip_score"]), float(row[column])) for row in rows)
        for name, column in columns.items()
    }
    return _checked(LongConfigs(values["clip_seconds"], values["slow_fast"], tables), DATA)


def _read(path: Path) -> dict[str, float]:
    """A flat YAML mapping of names to numbers."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): is it upstream's file?") from error
    found: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text or text == "---":
            continue
        key, colon, value = (part.strip() for part in text.partition(":"))
        if not colon or not key or line[0].isspace():
            raise UserError(f"{path}, line {number}: '{text}' is not 'name: number'")
        if key in found:
            raise UserError(f"{path}, line {number}: '{key}' stands there twice; keep one")
        found[key] = _number(path, value, number)
    return found


def _number(path: Path, text: str, line: int = 0) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        place = f", line {line}" if line else ""
        raise UserError(f"{path}{place}: '{text}' is no number")
    return value


def _checked(configs: LongConfigs, place: Path) -> LongConfigs:
    lacking = [name for name in DIMENSIONS if name not in configs.clip_seconds]
    if lacking:
        raise UserError(f"{place / LENGTHS} has no length for {', '.join(lacking)}: add it")
    for name, seconds in configs.clip_seconds.items():
        if seconds <= 0:
            raise UserError(
                f"{place / LENGTHS}: {name} has clips of {seconds:g} s; use more than 0"
            )
    for suffix in _SUFFIX.values():
        for key in (f"w_inclip_{suffix}", f"w_clip2clip_{suffix}"):
            if configs.slow_fast.get(key, -1.0) < 0:
                raise UserError(f"{place / WEIGHTS} has no weight {key} of at least 0: add it")
    for name, table in configs.tables.items():
        if len(table) < 2 or len({score for score, _ in table}) < len(table):
            raise UserError(f"{place / TABLES[name]} needs two different scores or more")
    return configs
