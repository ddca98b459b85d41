"""Finished layers of a conversion on disk, so that an interrupted one goes on with the same result.

A layer is its new tensors, its measured rows and what its block returned; it counts once its
``.json`` is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mla_study.checkpoints.wan.native import NAMES, as_bytes
from mla_study.checkpoints.wan.writer import Item
from mla_study.errors import UserError
from mla_study.study.runs import atomic_write

WORK = ".latentize"


class Work:
    """The folder of one job; ``identity`` is all that its result depends on."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def __enter__(self) -> Work:
        """Make the folder; one without a finished layer is taken over from another job.

        Raises:
            UserError: it cannot be made, or holds another job's layers.
        """
        if not self.mine() and (held := len(self._finished())):
            raise UserError(
                f"{self.folder.parent} holds {held} layers of an unfinished conversion with other "
                f"options, inputs or code: give its command to go on, remove {self.folder.name} "
                "there, or choose another folder"
            )
        try:
            if not self.mine():
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder.parent} cannot be written ({error.strerror or error}): choose "
                "another folder"
            ) from None
        if not self.mine():
            atomic_write(self.folder / "job.json", self.identity.encode())
        return self

    def mine(self) -> bool:
        """Whether the folder is there and belongs to this job."""
        mark = self.folder / "job.json"
        return mark.is_file() and mark.read_text(encoding="utf-8") == self.identity

    def _finished(self) -> list[Path]:
        return list(self.folder.glob("layer-*.json"))

    def __exit__(self, *_: object) -> None:
        if self.folder.is_dir() and not self._finished():
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # something else lies there
                self.folder.parent.rmdir()

    def resume(self, layers: int) -> tuple[int, Tensor | None]:
        """The first unfinished layer, and what the one before it returned."""
        start = 0
        while start < layers and self._layer(start).with_suffix(".json").is_file():
            start += 1
        if start == 0 or start == layers:
            return start, None
        return start, load_file(self._hidden(start))["hidden"]

    def finish(
        self,
        index: int,
        stored: Mapping[str, Tensor],
        rows: Sequence[Mapping[str, Any]],
        found: Mapping[str, float],
        out: Tensor,
    ) -> None:
        """Keep a layer."""
        if stored:
            atomic_write(
                self._layer(index),
                save({name: value.contiguous() for name, value in stored.items()}),
            )
        atomic_write(self._hidden(index + 1), save({"hidden": out.contiguous()}))
        record = json.dumps({"rows": rows, "ranks": found})
        atomic_write(self._layer(index).with_suffix(".json"), record.encode())
        self._hidden(index).unlink(missing_ok=True)

    def tables(self, layers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of all layers, and their ranks."""
        rows: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for index in range(layers):
            record = json.loads(self._layer(index).with_suffix(".json").read_text(encoding="utf-8"))
            rows += record["rows"]
            if record["ranks"]:
                found.append({"layer": index, **record["ranks"]})
        return rows, found

    def items(self, index: int) -> dict[str, Item]:
        """A layer's new tensors, to be written; read when their turn comes."""
        path = self._layer(index)
        made: dict[str, Item] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                made[name] = Item(
                    name, NAMES[tensor.dtype], tuple(tensor.shape), _Pieces(path, name)
                )
        return made

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{index:04d}.safetensors"


class _Pieces:
    """The bytes of one tensor of a layer's file."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __call__(self) -> Iterator[memoryview]:
        with safe_open(self.path, framework="pt") as file:
            yield as_bytes(file.get_tensor(self.name))
