"""``mla-study checkpoint info`` and ``mla-study checkpoint convert``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mla_study.errors import UserError


def _need_torch() -> None:
    if find_spec("torch") is None:
        raise UserError("this command needs the package torch: pip install 'mla-study[torch]'")


@dataclass(frozen=True)
class CheckpointInfo:
    """Say what a checkpoint is: layout, format, shapes, window, parameters, dtype, what is missing.

    Example: mla-study checkpoint info self_forcing_dmd.pt --config wan-1.3b
    """

    path: tyro.conf.Positional[str]
    """File, sharded index or folder: original Wan, diffusers, Self-Forcing, Krea or our own."""
    config: str | None = None
    """Config to compare with: a JSON file, a folder that holds one, or wan-1.3b, wan-14b, mini."""
    weights: str | None = None
    """Which dictionary of a PyTorch file, such as generator_ema."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Describe."""
        _need_torch()
        from mla_study.checkpoints.wan.info import info

        found = info(self.path, self.config, self.weights)
        print(json.dumps(found.plain(), indent=1) if self.json else found.text())
        return 0


@dataclass(frozen=True)
class CheckpointConvert:
    """Rewrite a checkpoint in another layout, bit by bit, with the config beside it.

    Example: mla-study checkpoint convert self_forcing_dmd.pt out --to diffusers --config wan-1.3b
    """

    src: tyro.conf.Positional[str]
    """File, sharded index or folder of any layout."""
    dst: tyro.conf.Positional[Path]
    """Folder; or a .safetensors file (.pt for self-forcing), config.json goes beside it."""
    to: Literal["original", "diffusers", "self-forcing", "latent"]
    """Layout; latent is our own, for dense models as well."""
    config: str | None = None
    """Config where none lies beside SRC: a JSON file, a folder with one, or a preset's name."""
    dtype: str | None = None
    """Cast to fp32, bf16, fp16 or fp64 (default: as stored)."""
    weights: str | None = None
    """Which dictionary of a PyTorch file, such as generator_ema (default: generator)."""
    shard_size: str | None = None
    """Largest file, such as 5GB or 500MB (default: 10GB)."""
    overwrite: bool = False
    """Replace weights that lie at DST."""

    def run(self) -> int:
        """Convert."""
        _need_torch()
        size = None if self.shard_size is None else parse_size(self.shard_size)
        from tqdm import tqdm

        from mla_study.checkpoints.wan.convert import convert

        bars: list[tqdm] = []

        def progress(total: int) -> Callable[[int], object]:
            # disable=None: silent where stderr is no terminal
            bars.append(tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False))
            return bars[-1].update

        try:
            done = convert(
                self.src,
                self.dst,
                self.to,
                config=self.config,
                dtype=self.dtype,
                weights=self.weights,
                shard_size=size,
                overwrite=self.overwrite,
                progress=progress,
            )
        finally:
            for bar in bars:
                bar.close()
        for note in done.notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"wrote {done.path}: {done.tensors} tensors, {done.nbytes:,} bytes, {self.to} layout")
        return 0


def parse_size(text: str) -> int:
    """Bytes of ``500MB``, ``5GB``, ``1GiB`` or a plain number; raises UserError for others."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)b?", text.strip().lower())
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** ("kmgt".find(match[2]) + 1 if match[2] else 0))
    if size < 1:
        raise UserError(f"the size {text!r} is not understood: give 5GB, 500MB or plain bytes")
    return size


CheckpointCommand = (
    Annotated[CheckpointInfo, tyro.conf.subcommand("info")]
    | Annotated[CheckpointConvert, tyro.conf.subcommand("convert")]
)


@dataclass(frozen=True)
class Checkpoint:
    """Look into Wan checkpoints, and rewrite them in another layout.

    Example: mla-study checkpoint info Wan2.1-T2V-1.3B
    """

    command: CheckpointCommand = field()

    def run(self) -> int:
        """Run the subcommand."""
        return self.command.run()
