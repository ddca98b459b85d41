"""Tensors to safetensors, streamed: what is written need not be in memory, nor together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mla_study.checkpoints.formats.dtypes import BITS, stored_nbytes
from mla_study.checkpoints.wan.native import NAMES, as_bytes

OnBytes = Callable[[int], object]
_PIECE = 1 << 24


@dataclass(frozen=True)
class Item:
    """A tensor to be written.

    ``dtype`` is safetensors' name of it; ``pieces`` yields its bytes in row-major order;
    ``mapped`` gives it as a tensor that takes no memory of its own, or None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes | memoryview]]
    mapped: Callable[[], Tensor | None] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes it takes in a file."""
        return stored_nbytes(self.dtype, self.shape) or 0

    def renamed(self, name: str) -> Item:
        """The same under another name."""
        return replace(self, name=name)


def item_of(name: str, tensor: Tensor) -> Item:
    """A tensor in memory (of any device) as an :class:`Item`."""

    def pieces() -> Iterator[memoryview]:
        raw = as_bytes(tensor)
        for start in range(0, len(raw), _PIECE):
            yield raw[start : start + _PIECE]

    return Item(name, NAMES[tensor.dtype], tuple(tensor.shape), pieces, lambda: tensor)


def write_safetensors(
    path: Path,
    items: Iterable[Item],
    metadata: Mapping[str, str] | None = None,
    on_bytes: OnBytes | None = None,
) -> None:
    """Write one file; wider dtypes first, so that each tensor is aligned.

    Raises:
        OSError: it cannot be written.
    """
    ordered = sorted(items, key=lambda item: -BITS[item.dtype])
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for item in ordered:
        header[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [at, at + item.nbytes],
        }
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in ordered:
            written = 0
            for piece in item.pieces():
                file.write(piece)
                written += len(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
            if written != item.nbytes:
                raise RuntimeError(f"{item.name}: {written} bytes came where {item.nbytes} are due")


def write_sharded(
    folder: Path,
    stem: str,
    items: Sequence[Item],
    shard_size: int,
    metadata: Mapping[str, str] | None = None,
    on_bytes: OnBytes | None = None,
) -> str:
    """Write ``stem.safetensors``, or numbered shards with an index where it would exceed
    ``shard_size`` bytes; returns the name of the file to open.

    A tensor is never split: one that is larger than a shard gets a shard of its own.
    """
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + item.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.nbytes
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", items, metadata, on_bytes)
        return f"{stem}.safetensors"
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, metadata, on_bytes)
    index = {
        "metadata": {"total_size": sum(item.nbytes for item in items)},
        "weight_map": {i.name: n for n, shard in zip(names, shards, strict=True) for i in shard},
    }
    place = folder / f"{stem}.safetensors.index.json"
    place.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return place.name
