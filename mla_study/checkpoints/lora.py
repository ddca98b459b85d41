"""Low-rank adapters: peft (``lora_A/B``), diffusers and kohya (``lora_down/up``, ``alpha``) files.

Without a base an adapter's own product ``scale * up @ down`` is what its tensors mean; with a base
every tensor of the base is seen with the product added.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_study.checkpoints.container import TensorInfo
from mla_study.checkpoints.reader import Checkpoint, peel
from mla_study.errors import UserError

_PAIR = re.compile(
    r"^(?P<stem>.+?)[._](?P<side>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
    r"(?:\.(?!weight$)[\w-]+)?(?:\.weight)?$"
)
_DOWN = {"lora_A", "lora_down", "lora.down"}
_KOHYA = re.compile(r"^lora_(unet|te\d?|transformer)_")


def is_lora(names: Mapping[str, object]) -> bool:
    """Whether the tensors of a file are adapter pairs."""
    return any(_PAIR.match(name) for name in names)


@dataclass(frozen=True)
class Pair:
    """The stored tensors of one adapted weight."""

    stem: str
    down: str
    up: str
    alpha: str | None


def pairs(checkpoint: Checkpoint) -> dict[str, Pair]:
    """Stem -> pair; a half pair is a :class:`UserError` that names the missing half."""
    sides: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        match = _PAIR.match(name)
        if match:
            side = "down" if match["side"] in _DOWN else "up"
            sides.setdefault(match["stem"], {})[side] = name
    found: dict[str, Pair] = {}
    for stem, both in sides.items():
        missing = {"down", "up"} - set(both)
        if missing:
            raise UserError(
                f"{checkpoint.spec.path}: the adapter of {stem!r} has no '{missing.pop()}' half: "
                "get the complete file"
            )
        alpha = f"{stem}.alpha" if f"{stem}.alpha" in checkpoint.tensors else None
        found[stem] = Pair(stem, both["down"], both["up"], alpha)
    return found


def _flat(name: str) -> str:
    return re.sub(r"[._]", "_", peel(_KOHYA.sub("", name)))


class LoraCheckpoint(Checkpoint):
    """An adapter seen as weights: its own products, or the base with them merged in."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint | None) -> None:
        self.spec = adapter.spec
        self.files = adapter.files
        self.notes = adapter.notes
        self._adapter = adapter
        self._base = base
        self.config = adapter.config if base is None else (base.config or None)
        self.config_path = adapter.config_path if base is None else base.config_path
        self._containers = adapter._containers + (base._containers if base else [])
        self._noted_fp8 = False
        self._pairs = {}
        found = pairs(adapter)
        for pair in found.values():
            self._check(pair)
        if base is None:
            for stem, pair in found.items():
                name = f"{_KOHYA.sub('', stem)}.weight"
                self._pairs[name] = pair
            self.tensors = {name: self._info(name, pair) for name, pair in self._pairs.items()}
            if _is_config_of_adapter(self.config):
                self.config = None
            self.notes.append(
                f"{len(found)} adapter pairs: their own products are probed; "
                "--base CHECKPOINT merges them into the weights."
            )
            return
        targets = {
            _flat(n.removesuffix(".weight")): n for n in base.tensors if n.endswith("weight")
        }
        for stem, pair in found.items():
            target = targets.get(_flat(stem))
            shape = self._shape(pair)
            if target is None or int(np.prod(base.tensors[target].shape)) != int(np.prod(shape)):
                have = (
                    "nothing of that name" if target is None else list(base.tensors[target].shape)
                )
                raise UserError(
                    f"{self.spec.path}: the adapter of {stem!r} has shape {list(shape)}, but the base "
                    f"{base.spec.path} has {have}: it belongs to another base"
                )
            self._pairs[target] = pair
        self.tensors = dict(base.tensors)
        self.notes.append(f"{len(found)} adapter pairs merged into {base.spec.path}.")

    def _check(self, pair: Pair) -> None:
        down, up = (self._adapter.tensors[n].shape for n in (pair.down, pair.up))
        if len(down) < 2 or len(up) < 2 or up[1] != down[0] or 0 in down or 0 in up:
            raise UserError(
                f"{self.spec.path}: the adapter of {pair.stem!r} has shapes {list(up)} and "
                f"{list(down)}, which do not multiply"
            )

    def _shape(self, pair: Pair) -> tuple[int, int]:
        down, up = (self._adapter.tensors[n].shape for n in (pair.down, pair.up))
        return up[0], int(np.prod(down[1:]))

    def _info(self, name: str, pair: Pair) -> TensorInfo:
        stored = [self._adapter.tensors[n] for n in (pair.down, pair.up)]
        return TensorInfo(name, self._shape(pair), stored[0].dtype, sum(t.nbytes for t in stored))

    def _product(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """(up scaled by alpha / rank, down), float64 and two-dimensional."""
        down = self._adapter.read(pair.down).astype(np.float64)
        up = self._adapter.read(pair.up).astype(np.float64)
        scale = 1.0
        if pair.alpha is not None:
            scale = float(self._adapter.read(pair.alpha).reshape(-1)[0]) / down.shape[0]
        elif _is_config_of_adapter(self._adapter.config):
            config: dict[str, Any] = self._adapter.config or {}
            alpha, rank = config.get("lora_alpha"), config.get("r")
            if isinstance(alpha, int | float) and isinstance(rank, int) and rank > 0:
                scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        return up.reshape(up.shape[0], -1) * scale, down.reshape(down.shape[0], -1)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of the product, or of the base with the product added."""
        pair = self._pairs.get(name)
        if self._base is None:
            assert pair is not None
            up, down = self._product(pair)
            return up[start:stop] @ down
        values = self._base.read(name, start, stop)
        if pair is None:
            return values
        up, down = self._product(pair)
        return values.astype(np.float64) + (up[start:stop] @ down).reshape(values.shape)

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(up, down) of an unmerged adapter."""
        pair = self._pairs.get(name)
        return self._product(pair) if self._base is None and pair is not None else None

    def raw_sha256(self, name: str) -> str:
        """sha256 over the stored bytes of the base tensor and of both adapter halves."""
        pair = self._pairs.get(name)
        parts = [self._base.raw_sha256(name)] if self._base is not None else []
        if pair is not None:
            names = [pair.down, pair.up] + ([pair.alpha] if pair.alpha else [])
            parts += [self._adapter.raw_sha256(n) for n in names]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def _is_config_of_adapter(config: dict[str, Any] | None) -> bool:
    return config is not None and ("lora_alpha" in config or "peft_type" in config)
