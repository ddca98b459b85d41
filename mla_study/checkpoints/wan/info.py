"""What a checkpoint of a Wan transformer is, from its headers and config alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mla_study.checkpoints.wan.config import Described, inferred, latent_sizes, sane
from mla_study.checkpoints.wan.load import Difference, WanSource, expected_shapes
from mla_study.config import LatentConfig, ModelConfig, to_dict
from mla_study.errors import UserError


@dataclass(frozen=True)
class Info:
    """A checkpoint described; ``config`` is None where there is none and shapes do not tell all."""

    path: str
    layout: str
    format: str
    files: int
    nbytes: int
    prefix: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    shapes: dict[str, Any]
    described: Described | None
    difference: Difference | None
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        described = found.pop("described")
        difference = found.pop("difference")
        found["config"] = None if described is None else to_dict(described.config)
        found["config_from"] = None if described is None else described.where
        found["window_told"] = described is not None and described.window_told
        found["metadata"] = {} if described is None else dict(described.metadata)
        for name in ("missing", "extra", "misshapen"):
            found[name] = None if difference is None else getattr(difference, name)
        return found

    def text(self) -> str:
        """Lines for a person."""
        files = "1 file" if self.files == 1 else f"{self.files} files"
        layout = f"{self.layout} layout"
        layout += " (our own)" if self.layout == "latent" else ""
        layout += f", names under '{self.prefix}'" if self.prefix else ""
        kinds = ", ".join(
            name if len(self.dtypes) == 1 else f"{name} {count:,}"
            for name, count in self.dtypes.items()
        )
        rows = [
            ("is", f"{layout}; {self.format}, {files}, {_size(self.nbytes)}"),
            ("parameters", f"{self.parameters:,} in {self.tensors} tensors, {kinds}"),
            *self._model(),
        ]
        if self.difference is not None:
            against = "the config" if self.described else "its own depth"
            told = "; ".join(self.difference.sentences()) or f"complete against {against}"
            rows.append(("tensors", told))
        rows += [("note", note) for note in self.notes]
        width = max(len(key) for key, _ in rows)
        return "\n".join([self.path, *(f"  {key:<{width}}  {value}" for key, value in rows)])

    def _model(self) -> list[tuple[str, str]]:
        if self.described is None:
            told = ", ".join(f"{key} {_list(value)}" for key, value in self.shapes.items())
            heads = "" if "heads" in self.shapes else "; heads cannot be told from shapes"
            return [
                ("shapes", f"{told}{heads}"),
                ("config", "none beside the weights: give --config FILE or a preset's name"),
            ]
        c = self.described.config
        latent = c.latent
        window = f"sink {c.window.sink}, history {c.window.history}, chunk {c.window.chunk}"
        window += f" ({c.window.key_frames} key frames"
        window += ")" if self.described.window_told else "; our default, the config tells none)"
        rows = [
            (
                "model",
                f"{c.model_type}, {c.layers} layers of width {c.width}, {c.heads} heads of "
                f"{c.head_dim}, ffn {c.ffn_width}, text {c.text_len} x {c.text_dim}, channels "
                f"{c.in_channels} -> {c.out_channels}, patch {_list(c.patch)}",
            ),
            (
                "attention",
                "dense"
                if latent is None
                else f"latent, d_c {latent.d_c}, d_q {latent.d_q}, split {latent.d_nope} + "
                f"{latent.d_rope}, rotary pairs {_list(latent.rope_pairs)}",
            ),
            ("window", window),
            ("config", self.described.where),
        ]
        if self.described.metadata:
            told = ", ".join(f"{k} {v}" for k, v in self.described.metadata.items())
            rows.append(("metadata", told))
        return rows


def _list(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} bytes"


def info(
    path: str | PathLike[str], config: ModelConfig | str | None = None, weights: str | None = None
) -> Info:
    """Describe a checkpoint; no tensor is read.

    Raises:
        UserError: unreadable, no Wan transformer, or a config (given or beside it) that is none.
    """
    source = WanSource(path, weights)
    try:
        shapes = inferred(source.shapes)
        shapes |= {f: v for f, v in latent_sizes(source.shapes).items() if v}
        described = None
        if config is not None or source.config_beside is not None:
            described = source.describe(config)
        assumed = _assumed(shapes) if described is None else described.config
        dtypes: Counter[str] = Counter()
        for name, shape in source.shapes.items():
            dtypes[source.stored_dtype(name)] += math.prod(shape)
        files = source.checkpoint.files
        return Info(
            path=source.path,
            layout=source.layout,
            format=source.checkpoint.format,
            files=len(files),
            nbytes=sum(Path(f).stat().st_size for f in files if Path(f).is_file()),
            prefix=source.prefix,
            tensors=len(source.names),
            parameters=sum(dtypes.values()),
            dtypes=dict(dtypes.most_common()),
            shapes=shapes,
            described=described,
            difference=None if assumed is None else source.differs(expected_shapes(assumed)),
            notes=[*source.notes, *(described.notes if described else ())],
        )
    finally:
        source.close()


def _assumed(shapes: dict[str, Any]) -> ModelConfig | None:
    """A config of the shapes found, its heads made up, to see whether tensors are missing."""
    plain = {f.name for f in fields(ModelConfig)}
    known: dict[str, Any] = {k: v for k, v in shapes.items() if k in plain}
    try:
        known["heads"] = 1
        config = sane(ModelConfig(**known), "the file")
        if "d_c" not in shapes:
            return config
        rope, nope = shapes["d_rope"], shapes["d_nope"]
        latent = LatentConfig(shapes["d_c"], shapes["d_q"], nope, rope, (rope // 2, 0, 0))
        return replace(config, heads=shapes["heads"], latent=latent)
    except (UserError, KeyError):
        return None
