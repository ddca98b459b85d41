"""A whole dense checkpoint to latent attention, layer by layer, and sweeps over the latent's size.

One pass over the source: each block runs on the inputs, its self-attention is converted with what
these inputs look like there, the errors are measured on held-out ones. Finished layers are kept in
``.latentize`` inside the target until the end, so that the same call goes on after an interruption.

Shapes: S samples, L tokens, d width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_study.checkpoints.wan.convert import source_item, weights_sha256
from mla_study.checkpoints.wan.load import WanSource, expected_shapes
from mla_study.checkpoints.wan.native import DTYPES, as_bytes, filled, require_finite
from mla_study.checkpoints.wan.save import write_layout
from mla_study.checkpoints.wan.stage import drop_stages, occupied
from mla_study.checkpoints.wan.writer import Item
from mla_study.config import LatentConfig, ModelConfig, to_dict
from mla_study.errors import UserError
from mla_study.model.conversion_inputs import HELD_OUT, Inputs, file_inputs, noise_inputs
from mla_study.model.conversion_report import Probe, ranks
from mla_study.model.conversion_tables import write_report
from mla_study.model.conversion_work import WORK, Work
from mla_study.model.dense_layer import DenseAttention, Moments
from mla_study.model.dense_stream import DenseStream
from mla_study.model.latent_init import (
    INITS,
    Init,
    LayerConversion,
    Recipe,
    RopeKey,
    rotary_channels,
)
from mla_study.study.runs import RUN_FILE

REPORT = "conversion"
MODULES = ("mla_study.model.latentize", "mla_study.model.conversion_report")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """What a conversion does; a ``sweep`` over d_c measures all inits and writes no weights."""

    latent: LatentConfig
    init: Init = "spectral"
    rope_key: RopeKey = "svd"
    seed: int = 0
    samples: int = 4
    sweep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}, but at least 1 is needed")
        if self.sweep and (min(self.sweep) < 1 or len(set(self.sweep)) < len(self.sweep)):
            raise UserError(
                f"the sweep d_c={','.join(map(str, self.sweep))} needs different values from 1 on"
            )


@dataclass(frozen=True)
class Converted:
    """What was written, what was measured (rows of tidy tables), and remarks."""

    path: Path
    config: ModelConfig
    rows: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    run: Mapping[str, Any]
    notes: list[str]


def latentize(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    options: Options,
    *,
    config: ModelConfig | str | None = None,
    weights: str | None = None,
    covariance: str | PathLike[str] | None = None,
    latents: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Converted:
    """Convert a dense checkpoint of any layout into a folder of ours, or sweep over d_c.

    Non-attention tensors keep their bits; new ones get the dtype of the block's W_q. The folder
    gets ``conversion/`` with the measured errors and ``run.json``.

    Args:
        src: as for :func:`~mla_study.checkpoints.wan.load_model`.
        dst: folder; made if absent. It must not hold weights, nor another conversion's results.
        options: sizes and init.
        config, weights: as for ``load_model``.
        covariance: second moments of each layer's attention inputs (see
            :mod:`mla_study.probes.activations`), in place of those collected on the way.
        latents: file for :func:`~mla_study.model.conversion_inputs.file_inputs`; None: noise.
        progress: (finished layers, all layers).
        say: gets remarks at once: those of the result before the work, and that the end is near.

    Raises:
        UserError: bad input, or a target that cannot be written.
    """
    target = Path(dst)
    source = WanSource(src, weights)
    try:
        described = source.describe(config)
        job = _Job(source, described.config, options, covariance)
        source.require(expected_shapes(described.config), described.where)
        inputs = (
            noise_inputs(job.dense, options.samples, options.seed)
            if latents is None
            else file_inputs(job.dense, Path(latents), options.samples, options.seed)
        )
        notes = [*source.notes, *described.notes, inputs.note, *job.notes]
        for note in notes if say is not None else ():
            say(note)  # type: ignore[misc]
        work = Work(target / WORK, job.identity(inputs))
        there = occupied(target)
        if (target / REPORT / RUN_FILE).exists() and not work.mine():
            there.append(REPORT)
        if there:
            raise UserError(f"{target} holds {', '.join(there[:3])} already: choose another folder")
        with work:
            job.run(inputs, work, progress)
            if say is not None and not options.sweep:
                say("all layers are converted: the checkpoint is being hashed and written")
            rows, found = work.tables(job.dense.layers)
            run = write_report(
                target / REPORT,
                rows,
                found,
                config={"model": to_dict(job.config), "options": asdict(options)},
                inputs=job.hashes(inputs),
                seed=options.seed,
                modules=MODULES,
                real=inputs.real,
                notes=notes,
            )
            if not options.sweep:
                job.write(target, work, described.window_told)
            shutil.rmtree(work.folder)
    finally:
        source.close()
    return Converted(target, job.config, rows, found, run, notes)


class _Job:
    """One source and what is to be made of it."""

    def __init__(
        self,
        source: WanSource,
        dense: ModelConfig,
        options: Options,
        covariance: str | PathLike[str] | None,
    ) -> None:
        if dense.latent is not None:
            raise UserError(f"{source.path} has latent attention already: give a dense checkpoint")
        self.source, self.dense, self.options = source, dense, options
        self.latent = replace(options.latent, d_c=max(options.sweep or (options.latent.d_c,)))
        self.config = replace(dense, latent=self.latent)
        rotary_channels(dense.head_dim, self.latent.rope_pairs)
        self.cast = source.target(None)
        self.notes: list[str] = []
        self.covariance = None if covariance is None else Path(covariance)
        self._keys: dict[int, str] = {}
        if self.covariance is not None:
            self._keys = _covariance_keys(self.covariance, dense.layers)
            self.notes.append(f"inits and norms are calibrated on {self.covariance.name}")

    def identity(self, inputs: Inputs) -> str:
        """What must be the same for an interrupted conversion to go on."""
        from mla_study.study.codehash import code_hash

        stamp = None
        if self.covariance is not None:
            stat = self.covariance.stat()
            stamp = [stat.st_size, stat.st_mtime_ns]
        parts = [
            self.source.checkpoint.fingerprint,
            to_dict(self.config),
            asdict(self.options),
            inputs.sha256,
            stamp,
            code_hash(*MODULES),
        ]
        return json.dumps(parts, sort_keys=True)

    def run(self, inputs: Inputs, work: Work, progress: Progress | None) -> None:
        """Convert or measure all layers that are not finished yet."""
        total = self.dense.layers
        start, hidden = work.resume(total)
        if progress is not None:
            progress(start, total)
        if start == 0:
            self._require_finite()

        def on_block(index: int, tensors: dict[str, Tensor], tokens: Tensor, out: Tensor) -> None:
            dense = DenseAttention.of(
                {name: value.numpy() for name, value in tensors.items()},
                self.dense.heads,
                self.dense.eps,
            )
            probe = Probe(dense, tokens[-HELD_OUT:], self.dense, inputs.grid(self.dense.patch))
            moments = self._moments(index, tokens[:-HELD_OUT])
            if self.options.sweep:
                stored, rows, found = {}, list(self._swept(index, dense, moments, probe)), {}
            else:
                stored, rows, found = self._converted(index, dense, moments, probe)
            work.finish(index, stored, rows, found, out)
            if progress is not None:
                progress(index + 1, total)

        if start < total:
            DenseStream(self.dense, self._read, on_block).run(inputs, start, hidden)

    def _require_finite(self) -> None:
        """Read all weights once: a damaged one is told now, and not after hours."""
        for name in expected_shapes(self.dense):
            for _ in source_item(self.source, name, self.cast).pieces():
                pass

    def _read(self, name: str) -> Tensor:
        """A parameter as float32, read and not mapped: mapped pages would count as memory."""
        stored = self.source.names[name]
        values = filled(self.source.checkpoint, stored, torch.float32)
        require_finite(as_bytes(values), "F32", stored, self.source.path)
        return values

    def _moments(self, index: int, tokens: Tensor) -> Moments:
        if self.covariance is None:
            return Moments.of(tokens.flatten(0, 1).numpy())
        from mla_study.probes.activations import load_covariance

        key = self._keys[index]
        second = load_covariance(self.covariance, [key])[key]
        if second.shape[0] != self.dense.width:
            raise UserError(
                f"{self.covariance}: '{key}' is {list(second.shape)}, but the model's width is "
                f"{self.dense.width}: collect it on this model"
            )
        return Moments(second)

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor of the source is written as."""
        return self.cast or DTYPES[self.source.stored_dtype(name)]

    def _converted(
        self, index: int, dense: DenseAttention, moments: Moments, probe: Probe
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, float]]:
        options = self.options
        recipe = Recipe(options.init, options.rope_key, options.seed)
        conversion = LayerConversion(dense, self.latent, recipe, moments, index)
        stem = f"blocks.{index}.self_attn."
        dtype = self.dtype(f"{stem}q.weight")
        stored = _cast(conversion.tensors(), dtype, stem, self.source.path)
        used = {name: value.float() for name, value in stored.items()}
        used["o.weight"] = torch.from_numpy(dense.o.weight)
        rows = [
            {"layer": index, "decision": name, "logit_error": e.logits, "output_error": e.output}
            for name, e in probe.steps(conversion, used).items()
        ]
        del conversion
        found = ranks(dense, used)
        return {stem + name: value for name, value in stored.items()}, rows, found

    def _swept(
        self, index: int, dense: DenseAttention, moments: Moments, probe: Probe
    ) -> Iterator[dict[str, Any]]:
        options = self.options
        for init in INITS:
            recipe = Recipe(init, options.rope_key, options.seed)
            conversion = LayerConversion(dense, self.latent, recipe, moments, index)
            for d_c in sorted(options.sweep, reverse=True):
                latent = replace(self.latent, d_c=d_c)
                used = {
                    name: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
                    for name, value in conversion.tensors(d_c=d_c).items()
                }
                used["o.weight"] = torch.from_numpy(dense.o.weight)
                wanted = {"latent_norm": probe.final(latent, used)}
                if d_c == self.latent.d_c:
                    wanted["shared_key"] = probe.steps(conversion, used)["shared_key"]
                for decision, e in wanted.items():
                    yield {
                        "layer": index,
                        "init": init,
                        "d_c": d_c,
                        "decision": decision,
                        "logit_error": e.logits,
                        "output_error": e.output,
                    }

    def hashes(self, inputs: Inputs) -> dict[str, str]:
        """SHA-256 of everything that the result is made of."""
        made = {"source": self.source_sha256, "inputs": inputs.sha256}
        if self.covariance is not None:
            with self.covariance.open("rb") as file:
                made["covariance"] = hashlib.file_digest(file, "sha256").hexdigest()
        return made

    @cached_property
    def source_sha256(self) -> str:
        return weights_sha256(self.source)

    def write(self, target: Path, work: Work, window_told: bool) -> None:
        """The checkpoint: new tensors from finished layers, all others with their bits."""
        made: dict[str, Item] = {}
        for index in range(self.dense.layers):
            made |= work.items(index)
        items = [
            made[name] if name in made else source_item(self.source, name, self.cast)
            for name in expected_shapes(self.config)
        ]
        metadata = {
            "source_sha256": self.source_sha256,
            "init": self.options.init,
            "rope_key": self.options.rope_key,
            "seed": self.options.seed,
        }
        drop_stages(target)
        write_layout(items, self.config, target, "latent", metadata=metadata, window=window_told)


def _cast(
    exact: Mapping[str, np.ndarray], dtype: torch.dtype, stem: str, path: str
) -> dict[str, Tensor]:
    cast = {name: torch.from_numpy(np.ascontiguousarray(v)).to(dtype) for name, v in exact.items()}
    for name, value in cast.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"{path}: the converted {stem}{name} leaves the range of {dtype}: convert the "
                "source to bf16 or fp32 first"
            )
    return cast


def _covariance_keys(path: Path, layers: int) -> dict[int, str]:
    """The key of each layer's input covariance: a projection's name, the block's, or its number."""
    from mla_study.probes.activations import covariance_names

    held = covariance_names(path)
    keys: dict[int, str] = {}
    for n in range(layers):
        stems = [f"blocks.{n}.self_attn.{r}" for r in "kvq"]
        stems += [f"blocks.{n}.attn1.to_{r}" for r in "kvq"]
        stems += [f"blocks.{n}.self_attn", f"blocks.{n}.attn1", f"blocks.{n}", f"layer.{n}", str(n)]
        found = [k for stem in stems for k in held if k == stem or k.endswith("." + stem)]
        if not found:
            raise UserError(
                f"{path} has no covariance for block {n} (it holds {', '.join(held[:4])} ...): "
                f"collect one named blocks.{n}.self_attn.k"
            )
        keys[n] = found[0]
    return keys
