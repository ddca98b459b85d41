"""Wan transformers from any layout that the field ships, strictly, in about one copy of memory.

A :class:`WanSource` shows a checkpoint (original Wan, diffusers, Self-Forcing, Krea or our own;
safetensors, PyTorch or GGUF) under original Wan names; :func:`load_model` builds the model on the
meta device and puts the mapped tensors in.

Example::

    model = load_model("Wan2.1-T2V-1.3B", dtype="bf16")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from mla_study.checkpoints.lora import LoraCheckpoint
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.reader import OpenSpec
from mla_study.checkpoints.wan.config import Described, Shapes, resolve
from mla_study.checkpoints.wan.lora import Addition
from mla_study.checkpoints.wan.names import (
    AUXILIARY,
    is_latent,
    naming_of,
    to_diffusers,
    to_original,
)
from mla_study.checkpoints.wan.native import (
    DTYPES,
    NAMES,
    Mapper,
    as_bytes,
    filled,
    parse_dtype,
    refuse_integers,
    require_finite,
    stored_in,
)
from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.model.transformer import WanTransformer, meta_model

_SHOWN = 60  # more than two blocks' tensors


@dataclass(frozen=True)
class Difference:
    """Where tensors and config disagree, in the file's own names."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.misshapen)

    def sentences(self) -> Iterator[str]:
        """One phrase for each kind of disagreement: a few names, then a count."""
        if self.missing:
            yield f"{len(self.missing)} tensors are missing ({_some(self.missing)})"
        if self.extra:
            yield f"{len(self.extra)} are not the model's ({_some(self.extra)})"
        if self.misshapen:
            told = [f"{n} is {list(a)} where {list(b)} is due" for n, a, b in self.misshapen]
            yield f"{len(self.misshapen)} have another shape ({_some(told)})"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


class WanSource:
    """A checkpoint of a Wan transformer under original names; nothing but headers is read.

    Attributes:
        naming: of the file: ``original`` or ``diffusers``.
        names: original name -> name in the checkpoint.
        shapes: shapes by original name.
        extra: names without a counterpart in the original naming.
        notes: sentences about choices made while opening.

    Raises:
        UserError: the checkpoint cannot be read, or holds no Wan transformer.
    """

    def __init__(self, path: str | PathLike[str], weights: str | None = None) -> None:
        self.path = fspath(path)
        self.checkpoint = open_checkpoint(OpenSpec(self.path, weights))
        if isinstance(self.checkpoint, LoraCheckpoint):
            self.close()
            raise UserError(
                f"{self.path} holds an adapter, not a model: name its base, and give it as lora"
            )
        tensors = self.checkpoint.tensors
        naming = naming_of(tensors)
        if naming is None:
            self.close()
            raise UserError(
                f"{self.path} holds no Wan transformer (its tensors: {_some(list(tensors))}): "
                "name a checkpoint in original Wan or diffusers names"
            )
        self.naming = naming
        self.names: dict[str, str] = {}
        self.extra: list[str] = []
        self.auxiliary: list[str] = []
        for name in tensors:
            original = name if naming == "original" else to_original(name)
            if AUXILIARY.search(name):
                self.auxiliary.append(name)
            elif original is None:
                self.extra.append(name)
            else:
                self.names[original] = name
        self.shapes: Shapes = {name: tensors[stored].shape for name, stored in self.names.items()}
        self.notes = list(self.checkpoint.notes)
        self._mapper = Mapper()

    @property
    def prefix(self) -> str:
        """What stands before the names in the file: ``model.``, ``generator.`` ..., or nothing."""
        name = next(iter(self.names.values()))
        return stored_in(self.checkpoint, name)[1].removesuffix(name)

    @property
    def layout(self) -> str:
        """What the checkpoint is, in a word or two."""
        if self._own_config or is_latent(self.names):
            return "latent"
        if self.naming == "diffusers":
            return "diffusers"
        if "model." in self.prefix:
            return "self-forcing" if self.checkpoint.format == "torch" else "krea"
        return "original"

    @property
    def _own_config(self) -> bool:
        beside = self.config_beside or {}
        return "layers" in beside and "width" in beside

    @cached_property
    def config_beside(self) -> Mapping[str, Any] | None:
        if self.checkpoint.config is not None:
            return self.checkpoint.config
        text = self.checkpoint.metadata.get("config")
        if not isinstance(text, str) or len(text) > 1_000_000:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def describe(self, config: ModelConfig | str | None = None) -> Described:
        """The config: the given one, or that which lies beside the weights; UserError for none."""
        return resolve(
            config, self.config_beside, self.checkpoint.config_path, self.shapes, self.path
        )

    def differs(self, expected: Shapes) -> Difference:
        """What is missing, extra or misshapen against a model's parameters."""
        return Difference(
            [self._theirs(name) for name in expected if name not in self.names],
            [self.names[name] for name in self.names if name not in expected] + self.extra,
            [
                (self.names[name], self.shapes[name], shape)
                for name, shape in expected.items()
                if name in self.names and self.shapes[name] != shape
            ],
        )

    def _theirs(self, name: str) -> str:
        return name if self.naming == "original" else to_diffusers(name) or name

    def require(self, expected: Shapes, where: str, strict: bool = True) -> None:
        """Raise a UserError that lists every disagreement; extra tensors only where ``strict``."""
        found = self.differs(expected)
        if not strict:
            found = Difference(found.missing, [], found.misshapen)
        if found:
            raise UserError(
                f"{self.path} does not fit {where}: {'; '.join(found.sentences())}: get the whole "
                "file, or give the config that belongs to it"
            )

    def stored_dtype(self, name: str) -> str:
        """The name of a tensor's stored dtype, such as ``BF16``."""
        return self.checkpoint.tensors[self.names[name]].dtype

    def target(self, dtype: torch.dtype | None, keep_fp8: bool = False) -> torch.dtype | None:
        """The dtype asked for; else bfloat16 for all where a file is quantised, else None (kept).

        ``keep_fp8`` lets fp8 without scales pass as it is.
        """
        if dtype is not None:
            return dtype
        for name in self.names:
            stored = self.stored_dtype(name)
            plain = keep_fp8 and stored.startswith("F8_") and not self.auxiliary
            if stored not in DTYPES and not plain:
                self.notes.append(f"{self.path} holds {stored} weights: they become bfloat16.")
                return torch.bfloat16
        return None

    def kept(self, name: str, dtype: torch.dtype | None = None) -> bool:
        """Whether a tensor comes out bit by bit as it is stored."""
        stored = self.stored_dtype(name)
        return dtype is None or DTYPES.get(stored) == dtype

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, additions: Sequence[Addition] = ()
    ) -> Tensor:
        """One tensor: mapped where its dtype is kept, else a copy; adapters added; finite.

        Raises:
            UserError: NaN or Inf in it.
        """
        stored = self.names[name]
        found = self.mapped(name) if self.kept(name, dtype) else None
        if found is None:
            info = self.checkpoint.tensors[stored]
            refuse_integers(info, self.path)
            kind = dtype or DTYPES.get(info.dtype, torch.bfloat16)
            found = filled(self.checkpoint, stored, kind, self._mapper)
        require_finite(as_bytes(found), NAMES[found.dtype], stored, self.path)
        for addition in additions:
            if addition.touches(name):
                found = addition.add_to(name, found)
        return found

    def mapped(self, name: str) -> Tensor | None:
        """The stored tensor on the file's own pages, or None where that is not possible."""
        return self._mapper(*stored_in(self.checkpoint, self.names[name]))

    def close(self) -> None:
        """Close the files; mapped tensors stay valid."""
        self.checkpoint.close()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by original name."""
    return {name: tuple(value.shape) for name, value in meta_model(config).state_dict().items()}


def load_model(
    path: str | PathLike[str],
    config: ModelConfig | str | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str | None = None,
    lora: Sequence[str | tuple[str, float]] = (),
    device: str | torch.device = "cpu",
    strict: bool = True,
    notes: list[str] | None = None,
) -> WanTransformer:
    """The model of a checkpoint, in eval mode, its config as ``model.config``.

    On the CPU with the dtype kept, the parameters are the file's own pages: overwriting the file
    in place would change them (replacing it does not).

    Args:
        path: file, sharded index, folder or address; original Wan, diffusers (also a pipeline),
            Self-Forcing, Krea, or our own.
        config: where none lies beside the weights: a config, JSON file, folder or preset's name.
        dtype: None keeps what is stored (fp8 and GGUF's blocks become bfloat16).
        weights: which dictionary of a PyTorch file (default ``generator``).
        lora: adapters to merge, each with its strength if that is not 1.
        strict: False leaves out tensors that are not the model's. Missing and misshapen ones are
            errors always.
        notes: remarks about choices made are appended here.

    Raises:
        UserError: unreadable, incomplete, not fitting its config, or NaN or Inf in a tensor.
    """
    target = parse_dtype(dtype)
    source = WanSource(path, weights)
    additions: list[Addition] = []
    try:
        described = source.describe(config)
        model = meta_model(described.config)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        source.require(expected, described.where, strict)
        for entry in lora:
            adapter, strength = entry if isinstance(entry, tuple) else (entry, 1.0)
            additions.append(Addition(fspath(adapter), expected, strength))
        target = source.target(target)
        state = {name: source.tensor(name, target, additions).to(device) for name in expected}
    finally:
        for addition in additions:
            addition.close()
        source.close()
    model.load_state_dict(state, strict=True, assign=True)
    if notes is not None:
        notes.extend([*source.notes, *described.notes])
    return model.eval()
