"""One layout into another, tensor by tensor and bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch

from mla_study.checkpoints.wan.layouts import Layout
from mla_study.checkpoints.wan.load import WanSource, expected_shapes
from mla_study.checkpoints.wan.native import (
    DTYPES,
    NAMES,
    as_bytes,
    panels,
    parse_dtype,
    raw_pieces,
    refuse_integers,
    require_finite,
)
from mla_study.checkpoints.wan.save import write_layout
from mla_study.checkpoints.wan.writer import Item, OnBytes
from mla_study.config import ModelConfig


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote, and remarks about choices made."""

    path: Path
    config: ModelConfig
    tensors: int
    nbytes: int
    notes: list[str] = field(default_factory=list)


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    to: Layout,
    config: ModelConfig | str | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], OnBytes] | None = None,
) -> Converted:
    """Rewrite a checkpoint of any layout in another one.

    A few MB of memory are held at a time; the values are kept to the bit, unless ``dtype`` asks for
    a cast or they are quantised with scales (fp8, GGUF), which become bfloat16.

    Args:
        config: where none lies beside the weights: a config, JSON file, folder or preset's name.
        weights: which dictionary of a PyTorch file.
        progress: called with the bytes to come, gives a function called after each piece.

    Raises:
        UserError: as :func:`~mla_study.checkpoints.wan.load.load_model` and
            :func:`~mla_study.checkpoints.wan.save.save_model`.
    """
    target = parse_dtype(dtype)
    source = WanSource(src, weights)
    try:
        described = source.describe(config)
        expected = expected_shapes(described.config)
        source.require(expected, described.where)
        cast = source.target(target, keep_fp8=True)
        items = [source_item(source, name, cast) for name in expected]
        total = sum(item.nbytes for item in items)
        metadata = dict(described.metadata)
        metadata.pop("schema", None)
        if to == "latent" and "source_sha256" not in metadata:
            metadata["source_sha256"] = weights_sha256(source)
        write_layout(
            items,
            described.config,
            Path(dst),
            to,
            shard_size=shard_size,
            metadata=metadata,
            window=described.window_told,
            overwrite=overwrite,
            on_bytes=None if progress is None else progress(total),
        )
    finally:
        source.close()
    notes = [*source.notes, *described.notes]
    if to == "diffusers" and described.window_told:
        notes.append("diffusers' config does not hold the window: it is left out.")
    return Converted(Path(dst), described.config, len(items), total, notes)


def source_item(source: WanSource, name: str, dtype: torch.dtype | None) -> Item:
    """A tensor of a source to be written: raw where its dtype is kept, else cast in panels."""
    stored = source.names[name]
    info = source.checkpoint.tensors[stored]
    refuse_integers(info, source.path)
    if source.kept(name, dtype):
        written, kept = info.dtype, DTYPES.get(info.dtype)
    else:
        assert dtype is not None
        written, kept = NAMES[dtype], dtype

    def pieces() -> Iterator[bytes | memoryview]:
        raw = raw_pieces(source.checkpoint, stored) if source.kept(name, dtype) else None
        if raw is None:
            assert kept is not None
            raw = (as_bytes(rows) for _, rows in panels(source.checkpoint, stored, kept))
        for piece in raw:
            require_finite(piece, written, stored, source.path)
            yield piece

    def mapped() -> torch.Tensor | None:
        found = source.mapped(name) if source.kept(name, dtype) else None
        if found is not None:
            require_finite(as_bytes(found), written, stored, source.path)
        return found

    return Item(name, written, info.shape, pieces, mapped)


def weights_sha256(source: WanSource) -> str:
    """sha256 (hex) over the names and stored bytes of all tensors; the same in every layout."""
    digest = hashlib.sha256()
    for name in sorted(source.names):
        own = source.checkpoint.raw_sha256(source.names[name])
        digest.update(f"{name} {source.stored_dtype(name)} {own}\n".encode())
    return digest.hexdigest()
