"""Low-rank adapters: peft (``lora_A/B``), diffusers and kohya (``lora_down/up``, ``alpha``) files.

Without a base an adapter's own product ``scale * up @ down`` is what its tensors mean; with a base
every tensor of the base is seen with the product added.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from math import prod

import numpy as np

from mla_study.checkpoints.formats.container import TensorInfo
from mla_study.checkpoints.lora_names import (
    KOHYA,
    Adapter,
    Pair,
    component,
    parse,
    peft_config,
    scale_rule,
    targets_of,
)
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError


class LoraCheckpoint(Checkpoint):
    """An adapter seen as weights: its own products, or the base with them merged in."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint | None) -> None:
        if isinstance(base, LoraCheckpoint):
            raise UserError(
                f"{base.spec.path} is an adapter itself: give the dense checkpoint as --base"
            )
        self.spec = adapter.spec
        self.files = adapter.files
        self.notes = adapter.notes + (base.notes if base else [])
        self.adapter_config = adapter.adapter_config
        self._adapter = adapter
        self._base = base
        self._containers = adapter._containers + (base._containers if base else [])
        self._noted_fp8 = False
        self._scales = {}
        self._last: tuple[Pair, np.ndarray, np.ndarray] | None = None
        parsed = parse(adapter)
        self._scale = scale_rule(adapter, parsed)
        self._inputs_first = parsed.inputs_first and base is not None
        for pair in parsed.pairs:
            self._check(pair)
        self._pairs: dict[str, Pair] = {}
        self._diffs: dict[str, str] = {}
        if base is None:
            self.config = None if _of_adapter(adapter.config) else adapter.config
            self.config_path = adapter.config_path if self.config else None
            self._alone(parsed)
        else:
            self.config, self.config_path = base.config, base.config_path
            self._merge(parsed, base)

    def _alone(self, parsed: Adapter) -> None:
        short = {pair.stem: f"{KOHYA.sub('', pair.stem)}.weight" for pair in parsed.pairs}
        counts = Counter(short.values())
        for pair in parsed.pairs:
            name = short[pair.stem]
            self._pairs[name if counts[name] == 1 else f"{pair.stem}.weight"] = pair
        self.tensors = {name: self._info(name, pair) for name, pair in self._pairs.items()}
        self.notes.append(
            f"{_counted(len(self._pairs), 'adapter pair')}: the products by themselves are "
            "probed; --base CHECKPOINT merges them into the weights."
        )
        if parsed.magnitudes:
            count = _counted(len(parsed.magnitudes), "DoRA magnitude")
            self.notes.append(
                f"{count} ({parsed.magnitudes[0]} ...) left out: the products alone are not the "
                "whole change."
            )
        self._note_rest(parsed, [*parsed.rest, *parsed.diffs.values()])

    def _note_rest(self, parsed: Adapter, rest: list[str]) -> None:
        if parsed.unmatched_scale:
            self.notes.append("no alpha in file or adapter_config.json: the products' scale is 1.")
        if rest:
            count = _counted(len(rest), "tensor")
            self.notes.append(f"{count} outside the adapter pairs ({rest[0]} ...) left out.")

    def _merge(self, parsed: Adapter, base: Checkpoint) -> None:
        if parsed.magnitudes:
            raise UserError(
                f"{self.spec.path} holds DoRA magnitudes ({parsed.magnitudes[0]!r}), which scale "
                "the merged weights anew: merge it with the program that trained it, and probe that"
            )
        targets = targets_of(base)
        by_part: dict[str, list[tuple[Pair, str | None]]] = {}
        for pair in parsed.pairs:
            by_part.setdefault(component(pair.stem), []).append((pair, targets.find(pair.stem)))
        foreign = {part for part, found in by_part.items() if not any(t for _, t in found)}
        if len(foreign) == len(by_part):
            foreign = set()
        for part, found in by_part.items():
            if part in foreign:
                count = _counted(len(found), "adapter pair")
                self.notes.append(f"{count} of {part!r}, another model's, left out.")
                continue
            for pair, target in found:
                self._aim(pair, target, base)
        left: list[str] = list(parsed.rest)
        for stem, name in parsed.diffs.items():
            target = targets.find(stem, name.endswith("_b"))
            shape = self._adapter.tensors[name].shape
            if target is not None and base.tensors[target].shape == shape:
                self._diffs[target] = name
            elif component(stem) not in foreign:
                left.append(name)
        self.tensors = dict(base.tensors)
        merged = _counted(len(self._pairs), "adapter pair")
        if self._diffs:
            merged += f" and {_counted(len(self._diffs), 'full difference')}"
        self.notes.append(f"{merged} merged into {base.spec.path}.")
        self._note_rest(parsed, left)

    def _aim(self, pair: Pair, target: str | None, base: Checkpoint) -> None:
        shape = list(self._shape(pair))
        has = "no tensor of that name"
        if target is not None:
            stored = base.tensors[target].shape
            if len(stored) >= 2 and [stored[0], prod(stored[1:])] == shape:
                other = self._pairs.setdefault(target, pair)
                if other is not pair:
                    raise UserError(
                        f"{self.spec.path}: the adapters of {other.stem!r} and {pair.stem!r} both "
                        f"mean {target!r}: keep one of them"
                    )
                return
            has = f"{list(stored)} there"
        raise UserError(
            f"{self.spec.path}: the adapter of {pair.stem!r} has shape {shape}, but the base "
            f"{base.spec.path} has {has}: give the base that it was trained on"
        )

    def _check(self, pair: Pair) -> None:
        down, up = (self._adapter.tensors[n].shape for n in (pair.down, pair.up))
        flat_up = len(up) >= 2 and up[1:] == (*down[:1], *(1,) * (len(up) - 2))
        if len(down) < 2 or not flat_up or 0 in down or 0 in up:
            raise UserError(
                f"{self.spec.path}: the adapter of {pair.stem!r} has shapes {list(up)} and "
                f"{list(down)}, which do not multiply: get an undamaged file"
            )

    def _shape(self, pair: Pair) -> tuple[int, int]:
        down, up = (self._adapter.tensors[n].shape for n in (pair.down, pair.up))
        m, n = up[0], prod(down[1:])
        return (n, m) if self._inputs_first else (m, n)

    def _info(self, name: str, pair: Pair) -> TensorInfo:
        stored = [self._adapter.tensors[n] for n in (pair.down, pair.up)]
        return TensorInfo(name, self._shape(pair), stored[0].dtype, sum(t.nbytes for t in stored))

    def _product(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """(up scaled by alpha / rank, down), float64 and two-dimensional."""
        if self._last is None or self._last[0] is not pair:
            down = self._adapter.read(pair.down).astype(np.float64)
            up = self._adapter.read(pair.up).astype(np.float64) * self._scale(pair)
            up, down = up.reshape(len(up), -1), down.reshape(len(down), -1)
            if self._inputs_first:
                up, down = down.T, up.T
            self._last = pair, up, down
        return self._last[1], self._last[2]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of the product, or of the base with the product added."""
        pair = self._pairs.get(name)
        if self._base is None:
            up, down = self._product(self._pairs[name])
            return up[start:stop] @ down
        values = self._base.read(name, start, stop)
        if name in self._diffs:
            values = values.astype(np.float64) + self._adapter.read(self._diffs[name], start, stop)
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
        names = [pair.down, pair.up, *([pair.alpha] if pair.alpha else [])] if pair else []
        names += [self._diffs[name]] if name in self._diffs else []
        parts += [self._adapter.raw_sha256(n) for n in names]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """A cheap identity of the files, and of the config that scales the products."""
        text = super().fingerprint + str(peft_config(self._adapter))
        return hashlib.sha256(text.encode()).hexdigest()

    def _is_fp8_weight(self, name: str) -> bool:
        if self._base is not None:
            return self._base._is_fp8_weight(name)
        pair = self._pairs[name]
        return any(self._adapter._is_fp8_weight(n) for n in (pair.down, pair.up))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _of_adapter(config: dict[str, object] | None) -> bool:
    return config is not None and ("lora_alpha" in config or "peft_type" in config)
