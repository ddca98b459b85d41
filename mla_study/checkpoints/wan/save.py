"""Models and streams of tensors into any layout, complete or not at all, with the config beside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mla_study.checkpoints.formats.safetensors_file import SafetensorsFile
from mla_study.checkpoints.locate import read_json
from mla_study.checkpoints.wan.config import SCHEMA, parse, same_weights
from mla_study.checkpoints.wan.layouts import (
    Layout,
    diffusers_json,
    original_json,
    own_json,
    renamed,
)
from mla_study.checkpoints.wan.native import NAMES, Mapper, as_bytes, parse_dtype
from mla_study.checkpoints.wan.stage import occupied, staged
from mla_study.checkpoints.wan.writer import (
    Item,
    OnBytes,
    item_of,
    write_safetensors,
    write_sharded,
)
from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.model.transformer import WanTransformer, meta_model

SHARD_SIZE = 10_000_000_000
_TORCH = (".pt", ".pth")
_PANEL = 1 << 22  # elements


def save_model(
    model: WanTransformer | Mapping[str, Tensor],
    path: str | PathLike[str],
    layout: Layout = "original",
    dtype: str | torch.dtype | None = None,
    shard_size: int | None = None,
    *,
    config: ModelConfig | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a model, or a state dict in original names, and its config.

    Args:
        path: a folder; or a ``.safetensors`` file (``.pt`` for Self-Forcing's layout) that gets
            ``config.json`` beside it.
        layout: ``original`` Wan, ``diffusers``, ``self-forcing`` (a ``.pt`` that holds
            ``generator``), or ``latent``, our own, which alone holds latent attention.
        dtype: cast to it; None keeps what there is.
        shard_size: largest file in bytes (default 10 GB); a file is never split.
        config: of a state dict; a model has its own.
        metadata: of our own layout: ``source_sha256``, ``init`` and other plain values.
        overwrite: replace weights that lie there.

    Returns:
        The folder or file that :func:`~mla_study.checkpoints.wan.load.load_model` opens.

    Raises:
        UserError: names or shapes that do not fit the config, a layout that cannot hold it, weights
            in the way, no space: nothing is left half-written.
    """
    if isinstance(model, WanTransformer):
        state: Mapping[str, Tensor] = model.state_dict()
        config = model.config
    elif config is None:
        raise UserError("a state dict does not say how many heads it has: give config as well")
    else:
        state = model
    _check(state, config)
    target = parse_dtype(dtype)
    items = [_cast(name, tensor, target) for name, tensor in state.items()]
    return write_layout(
        items,
        config,
        Path(path),
        layout,
        shard_size=shard_size,
        metadata=metadata,
        overwrite=overwrite,
    )


def _check(state: Mapping[str, Tensor], config: ModelConfig) -> None:
    expected = {name: value.shape for name, value in meta_model(config).state_dict().items()}
    wrong = [f"{n} is missing" for n in expected if n not in state]
    for name, tensor in state.items():
        if name not in expected:
            wrong.append(f"{name} is not the model's")
        elif tensor.shape != expected[name]:
            wrong.append(f"{name} is {list(tensor.shape)} where {list(expected[name])} is due")
        elif tensor.dtype not in NAMES or tensor.is_meta:
            wrong.append(f"{name} is {'meta' if tensor.is_meta else tensor.dtype}")
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(
            f"the state dict does not fit config '{config.name}': {'; '.join(wrong[:6])}{more}: "
            "give the one that belongs to it"
        )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Item:
    if dtype is None or tensor.dtype == dtype:
        return item_of(name, tensor)

    def pieces() -> Iterator[memoryview]:
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _PANEL):
            yield as_bytes(flat[start : start + _PANEL].to(dtype))

    return Item(name, NAMES[dtype], tuple(tensor.shape), pieces)


def write_layout(
    items: Sequence[Item],
    config: ModelConfig,
    target: Path,
    layout: Layout,
    *,
    shard_size: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    window: bool = True,
    overwrite: bool = False,
    on_bytes: OnBytes | None = None,
) -> Path:
    """Write tensors in original names as a layout, with its config, atomically.

    ``window`` says whether ``config.window`` is known to belong to these weights. Other arguments
    and errors as in :func:`save_model`.
    """
    plan = _plan(config, target, layout, dict(metadata or {}), window)
    if shard_size is not None and shard_size < 1:
        raise UserError(f"a shard size of {shard_size} bytes holds nothing: give at least 1")
    stale = _make_way(plan, config, overwrite)
    named = [item.renamed(renamed(item.name, layout)) for item in items]
    with staged(plan.folder, last=["config.json"], stale=stale) as stage:
        if layout == "self-forcing":
            _save_torch(stage / plan.file, named, on_bytes)
        elif plan.alone:
            write_safetensors(stage / plan.file, named, plan.metadata, on_bytes)
        else:
            size = shard_size or SHARD_SIZE
            write_sharded(stage, plan.file, named, size, plan.metadata, on_bytes)
        beside = plan.folder / "config.json"
        if overwrite or not (plan.alone and beside.exists()):
            (stage / "config.json").write_text(plan.config, encoding="utf-8")
    return target


@dataclass(frozen=True)
class _Plan:
    """Where things go: a file ``alone`` in a folder that is not ours, or a folder of ours."""

    folder: Path
    file: str  # of a folder of safetensors: the stem
    alone: bool
    config: str
    metadata: dict[str, str]


def _plan(
    config: ModelConfig, target: Path, layout: Layout, extra: dict[str, Any], window: bool
) -> _Plan:
    if layout not in get_args(Layout):
        raise UserError(f"there is no layout '{layout}': give one of {', '.join(get_args(Layout))}")
    metadata = {"format": "pt"}
    if layout == "diffusers":
        text = diffusers_json(config)
    elif layout == "latent":
        text = own_json(config, extra, window=window)
        metadata["schema"] = str(SCHEMA)
        metadata["config"] = json.dumps(json.loads(text), separators=(",", ":"))
        metadata.update({k: str(extra[k]) for k in ("source_sha256", "init") if k in extra})
    else:
        text = original_json(config, causal=layout == "self-forcing", window=window)
    suffix = target.suffix.lower()
    torch_file = layout == "self-forcing"
    if suffix in (".safetensors", *_TORCH):
        if (suffix in _TORCH) != torch_file:
            due = "a .pt file" if torch_file else "a .safetensors file"
            raise UserError(f"{target} cannot hold layout '{layout}': name {due} or a folder")
        return _Plan(target.parent, target.name, True, text, metadata)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, and the weights need a folder: name another")
    stem = "model" if layout == "latent" else "diffusion_pytorch_model"
    return _Plan(target, "model.pt" if torch_file else stem, False, text, metadata)


def _make_way(plan: _Plan, config: ModelConfig, overwrite: bool) -> list[str]:
    """Refuse what is in the way; the names that the new files replace."""
    if plan.alone:
        place = plan.folder / plan.file
        if place.exists() and not overwrite:
            raise UserError(f"{place} exists: choose another name, or say --overwrite")
        beside = plan.folder / "config.json"
        if beside.exists() and not overwrite and not _same(beside, config):
            raise UserError(
                f"{beside} describes another model than {place.name} would hold: choose another "
                "folder, or say --overwrite"
            )
        return []
    there = occupied(plan.folder)
    if there and not overwrite:
        raise UserError(
            f"{plan.folder} holds {', '.join(there[:3])} already: choose another folder, or say "
            "--overwrite"
        )
    return there


def _same(path: Path, config: ModelConfig) -> bool:
    """Whether a config file describes the same shapes and heads."""
    try:
        shapes = {"text_embedding.0.weight": (config.width, config.text_dim)}
        patch = (config.width, config.in_channels, *config.patch)
        found = parse(read_json(str(path)), {**shapes, "patch_embedding.weight": patch}, str(path))
    except UserError:
        return False
    return same_weights(replace(found.config, model_type=config.model_type), config)


def _save_torch(path: Path, items: Sequence[Item], on_bytes: OnBytes | None) -> None:
    """``torch.save`` of mapped tensors; what has to be computed is put on disk first."""
    tensors = {item.name: item.mapped() for item in items}
    loose = [item for item in items if tensors[item.name] is None]
    if loose:
        spool = path.with_name("spool.safetensors")
        write_safetensors(spool, loose)
        file, mapper = SafetensorsFile(str(spool)), Mapper()
        tensors |= {item.name: mapper(file, item.name) for item in loose}
        file.close()
        spool.unlink()
    generator: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        assert tensor is not None
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        plain = tensor.detach().cpu()
        generator[name] = plain if whole and tensor.is_contiguous() else plain.clone().contiguous()
    with path.open("xb") as file:
        counted = _Counted(file, on_bytes)
        try:
            torch.save({"generator": generator}, counted)  # pyright: ignore[reportArgumentType]
        except RuntimeError:  # torch's writer says this of any failed write
            if counted.error is not None:
                raise counted.error from None
            raise


class _Counted:
    """A file for ``torch.save`` that reports progress and remembers why a write failed."""

    def __init__(self, file: Any, on_bytes: OnBytes | None) -> None:
        self._file, self._on_bytes = file, on_bytes
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        if self._on_bytes is not None:
            self._on_bytes(len(data))
        return len(data)

    def flush(self) -> None:
        self._file.flush()
