"""Small checkpoints on disk, and the parts of an attention read back as plain matrices."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.safetensors_bytes import build
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.blocks import Attention, Found
from mla_study.checkpoints.operators.find import find_operators
from mla_study.checkpoints.operators.roles import parse_map
from mla_study.checkpoints.reader import Checkpoint, OpenSpec

Arrays = dict[str, np.ndarray]


class Maker:
    """Random float32 matrices of asked shapes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def all(self, shapes: Mapping[str, Sequence[int]]) -> Arrays:
        return {name: self(*shape) for name, shape in shapes.items()}


def save(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    config: Any = None,
    name: str = "model.safetensors",
    **more: Any,
) -> str:
    """A safetensors file in a folder, with ``config.json`` beside it where given."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / name).write_bytes(build(arrays, **more))
    return str(folder / name)


def opened(
    folder: Path, arrays: Mapping[str, np.ndarray], beside: Any = None, **more: Any
) -> Checkpoint:
    """The checkpoint of :func:`save`; ``more`` are fields of OpenSpec."""
    return open_checkpoint(OpenSpec(save(folder, arrays, beside), **more))


def find(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    config: Any = None,
    maps: Sequence[str] = (),
    **options: Any,
) -> tuple[Checkpoint, Found]:
    """Save, open, and find the operators."""
    checkpoint = opened(folder, arrays, config)
    found = find_operators(checkpoint, maps=[parse_map(text) for text in maps], **options)
    return checkpoint, found


def matrix(checkpoint: Checkpoint, attention: Attention, role: str) -> np.ndarray:
    """One part as [m, n]."""
    part = attention.parts[role]
    stored = checkpoint.read(part.tensor)
    flat = stored.reshape(stored.shape[0], -1)
    if part.transposed:
        flat = flat.T
    rows = np.concatenate([flat[start:stop] for start, stop in part.rows])
    assert rows.shape == (part.m, part.n)
    return rows


def summary(found: Found) -> list[tuple[int, str, str]]:
    """(layer, kind, roles) of each block."""
    return [(a.layer, a.kind, " ".join(a.parts)) for a in found.attentions]
