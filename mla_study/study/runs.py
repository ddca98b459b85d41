"""Provenance: what identifies a result is hashed, what was only observed stands beside it.

A result folder holds tidy tables (``table.parquet`` and others) and ``run.json``. Its ``identity``
(resolved config, SHA-256 of each input, seed, hash of the code) gives the ``run_hash``; its
``observed`` part (revision, versions, device, time, memory, date) does not count. "Same bytes" is
said of the tables and figures, never of ``run.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np

from mla_study.errors import UserError
from mla_study.study.codehash import code_hash
from mla_study.study.observe import Stopwatch, observe, peak_memory

if TYPE_CHECKING:
    import pandas as pd

Provenance = Literal["measured", "modelled", "null-model", "paper-quoted"]
Validity = Literal["full", "partial", "substitute", "invalid"]
SCHEMA = 1
RUN_FILE = "run.json"

__all__ = [
    "Provenance",
    "Result",
    "Stopwatch",
    "Validity",
    "atomic_write",
    "canonical_json",
    "code_hash",
    "file_sha256",
    "json_sha256",
    "parquet_bytes",
    "peak_memory",
    "read_record",
    "read_result",
    "round_significant",
    "run_record",
    "write_result",
]


@dataclass(frozen=True)
class Result:
    """A result folder as read back: its tables by name, and the run record."""

    folder: Path
    tables: Mapping[str, pd.DataFrame]
    run: Mapping[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """The main table."""
        return self.tables["table"]

    @property
    def run_hash(self) -> str:
        return self.run["run_hash"]

    @property
    def provenance(self) -> Provenance:
        return self.run["provenance"]

    @property
    def validity(self) -> Validity:
        return self.run["validity"]


def canonical_json(value: object) -> str:
    """One spelling for one value: sorted keys, no spaces, ASCII, dataclasses as objects.

    :raises TypeError: something has no JSON form (a path, say: machine-dependent, so give a name).
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def json_sha256(value: object) -> str:
    """SHA-256 (hex) of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_record(file: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where it cannot be read."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def run_record(
    *,
    config: object,
    inputs: Mapping[str, str],
    seed: int | None,
    modules: Iterable[str],
    provenance: Provenance,
    validity: Validity,
    units: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
    observed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``run.json`` but for the tables; nothing is written.

    :param config: resolved configuration: a mapping or dataclass of plain values.
    :param inputs: name of each input -> SHA-256 of its content.
    :param modules: dotted names of the modules that computed the result, see :func:`code_hash`.
    :param units: column or metric -> unit.
    :param observed: what was only observed by the caller (time, memory); joined to our own.
    """
    if provenance not in get_args(Provenance) or validity not in get_args(Validity):
        raise ValueError(f"unknown class {provenance!r} or validity {validity!r}")
    names = sorted(modules)
    identity = {
        "config": _plain(config),
        "inputs": _plain(inputs),
        "seed": seed,
        "code": code_hash(*names),
        "modules": names,
    }
    return {
        "schema": SCHEMA,
        "run_hash": json_sha256(identity),
        "provenance": provenance,
        "validity": validity,
        "identity": identity,
        "units": _plain(units or {}),
        "notes": list(notes),
        "observed": {**observe(), **_plain(observed or {})},
    }


def write_result(
    folder: Path | str,
    tables: Mapping[str, pd.DataFrame],
    *,
    config: object,
    inputs: Mapping[str, str],
    seed: int | None,
    modules: Iterable[str],
    provenance: Provenance,
    validity: Validity,
    units: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
    observed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``{name}.parquet`` for each table and ``run.json``; return the run record.

    All files are written under temporary names and renamed when they are complete, ``run.json``
    last. Arguments as in :func:`run_record`.

    :raises UserError: the folder cannot be written (no space, no permission); nothing is left.
    """
    folder = Path(folder)
    run = run_record(
        config=config,
        inputs=inputs,
        seed=seed,
        modules=modules,
        provenance=provenance,
        validity=validity,
        units=units,
        notes=notes,
        observed=observed,
    )
    contents = {f"{name}.parquet": parquet_bytes(frame) for name, frame in tables.items()}
    run["tables"] = {
        name: {
            "file": f"{name}.parquet",
            "rows": len(frame),
            "sha256": hashlib.sha256(contents[f"{name}.parquet"]).hexdigest(),
        }
        for name, frame in tables.items()
    }
    contents[RUN_FILE] = (json.dumps(run, indent=1, allow_nan=False) + "\n").encode()
    _write_all(folder, contents)
    return run


def read_result(folder: Path | str) -> Result:
    """Read a folder that :func:`write_result` wrote.

    :raises UserError: it is absent, incomplete, or a table is not the one that ``run.json`` names.
    """
    import pandas as pd

    folder = Path(folder)
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        tables: dict[str, pd.DataFrame] = {}
        for name, entry in run["tables"].items():
            file = folder / entry["file"]
            if file_sha256(file) != entry["sha256"]:
                raise UserError(
                    f"{file} is not the table that {RUN_FILE} beside it describes: "
                    "restore it, or measure it anew."
                )
            tables[name] = pd.read_parquet(file)
    except OSError as error:
        raise UserError(
            f"Result folder {folder} cannot be read ({error.strerror or error}): measure it first."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / RUN_FILE} is no run record ({error}): measure the result anew."
        ) from error
    return Result(folder, tables, run)


def parquet_bytes(frame: pd.DataFrame) -> bytes:
    """The frame as Parquet, the same bytes for the same values (for one pyarrow version).

    The index is dropped; pandas' own metadata, which name library versions, are left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    fields = [pa.field(field.name, _stored_type(field.type)) for field in table.schema]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.cast(pa.schema(fields)),
        sink,
        version="2.6",
        compression="zstd",
        data_page_version="1.0",
        store_schema=False,
    )
    return sink.getvalue().to_pybytes()


def _stored_type(kind: Any) -> Any:
    # pandas 2 and 3 differ in how they hand over text, and categories are an in-memory matter.
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_large_string(kind) else kind


def file_sha256(path: Path | str) -> str:
    """SHA-256 (hex) of a file's content. :raises OSError: it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: Path | str, content: bytes | Callable[[Path], object]) -> None:
    """Write a file that is either complete or absent.

    :param content: the bytes, or a function that writes them to the path it is given (which has
        the same suffix and stands in the same folder).
    :raises UserError: the file cannot be written; the temporary one is removed.
    """
    path = Path(path)
    _write_all(path.parent, {path.name: content})


@overload
def round_significant(values: pd.DataFrame, digits: int = 7) -> pd.DataFrame: ...
@overload
def round_significant(values: np.ndarray, digits: int = 7) -> np.ndarray: ...
def round_significant(
    values: pd.DataFrame | np.ndarray, digits: int = 7
) -> pd.DataFrame | np.ndarray:
    """Round floats to ``digits`` significant decimal digits; other columns stay as they are.

    Another processor's last bits then change nothing that is drawn or stored. Correctly rounded by
    way of the decimal form; NaN and infinities stay.

    :param values: data frame, or float array of any shape (dtype kept).
    """
    if isinstance(values, np.ndarray):
        spell = f"%.{digits - 1}e"
        flat = [float(spell % value) for value in values.ravel().tolist()]
        return np.array(flat, dtype=values.dtype).reshape(values.shape)
    frame = values.copy()
    for column in frame.columns:
        if frame[column].dtype.kind == "f":
            frame[column] = round_significant(frame[column].to_numpy(), digits)
    return frame


def _write_all(folder: Path, contents: Mapping[str, bytes | Callable[[Path], object]]) -> None:
    written: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            final = folder / name
            temporary = final.with_name(f".{final.stem}.{os.getpid()}.tmp{final.suffix}")
            written[temporary] = final
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                content(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        for temporary, final in written.items():
            temporary.replace(final)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): "
            "free some space or choose another folder."
        ) from error
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")
