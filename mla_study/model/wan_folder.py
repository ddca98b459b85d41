"""Where a Wan folder keeps its VAE, text encoder and tokenizer, and how their weights come in.

Two layouts are known: the original one (``Wan2.1_VAE.pth`` and its companions at the top) and that
of diffusers (a folder a component, each with ``config.json``).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mla_study.checkpoints.formats.container import shown
from mla_study.checkpoints.locate import SUFFIXES
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.reader import Checkpoint
from mla_study.checkpoints.wan.native import (
    DTYPES,
    NAMES,
    Mapper,
    as_bytes,
    filled,
    refuse_integers,
    require_finite,
    stored_in,
)
from mla_study.errors import UserError

ORIGINAL_REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"
DIFFUSERS_REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@dataclass(frozen=True)
class Part:
    """One component of a Wan release: its files in both layouts, with sizes for who lacks them."""

    title: str
    owner: str
    original: str
    original_size: str
    folder: str
    diffusers: str
    diffusers_size: str


VAE = Part(
    "VAE",
    "AutoencoderKLWan",
    "Wan2.1_VAE.pth",
    "508 MB",
    "vae",
    "config.json and diffusion_pytorch_model.safetensors",
    "508 MB in float32",
)
TEXT_ENCODER = Part(
    "text encoder",
    "UMT5EncoderModel",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "11.4 GB",
    "text_encoder",
    "config.json, model.safetensors.index.json and its shards",
    "22.7 GB in float32, 11.4 GB in bfloat16",
)
TOKENIZER = Part(
    "tokenizer",
    "",
    "google/umt5-xxl/tokenizer.json",
    "17 MB",
    "tokenizer",
    "tokenizer.json",
    "17 MB",
)


def missing(folder: Path, part: Part) -> UserError:
    """The sentence for weights that are not there: which file, how large, from where, whereto."""
    return UserError(
        f"{folder} holds no Wan {part.title}: put {part.original} ({part.original_size}; Hugging "
        f"Face repository {ORIGINAL_REPOSITORY}) there, or the folder {part.folder}/ with "
        f"{part.diffusers} ({part.diffusers_size}; repository {DIFFUSERS_REPOSITORY})"
    )


def find(wan: str | Path, part: Part) -> Path:
    """The file (original layout) or folder (diffusers) of a component of the Wan folder ``wan``.

    ``wan`` may also name that file or that component's folder itself.

    Raises:
        UserError: it is not there; says which file to put where, and how large it is.
    """
    folder = Path(wan)
    if folder.is_file():
        return folder
    if (folder / part.original).is_file():
        return folder / part.original
    if _is_component(folder / part.folder, part):
        return folder / part.folder
    # The folder itself may be another component's, such as the transformer's.
    if _is_component(folder, part) and (not part.owner or part.owner in _owners(folder)):
        return folder
    raise missing(folder, part)


def _is_component(place: Path, part: Part) -> bool:
    if part is TOKENIZER:
        return (place / "tokenizer.json").is_file()
    if not (place / "config.json").is_file():
        return False
    return any(child.name.endswith(SUFFIXES) for child in place.iterdir())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): replace it") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object: replace it")
    return config


def _owners(folder: Path) -> list[str]:
    config = _config(folder)
    return [str(n) for n in (config.get("_class_name"), *(config.get("architectures") or [])) if n]


def read_config(folder: Path, part: Part) -> dict[str, Any]:
    """``config.json`` of a component's folder.

    Raises:
        UserError: it cannot be read, or says that it is another model's.
    """
    owners = _owners(folder)
    if owners and part.owner not in owners:
        raise UserError(
            f"{folder / 'config.json'} describes a {owners[0]}, but a {part.owner} is needed here"
        )
    return _config(folder)


def open_weights(path: Path) -> Checkpoint:
    """The weights of a component: a file, or a folder with one file or shards."""
    return open_checkpoint(str(path))


def fill(
    model: nn.Module,
    source: Checkpoint,
    names: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    unused: Collection[str] = (),
) -> None:
    """Give a model on the meta device its weights: the file's own pages, or one copy.

    On the CPU with the stored dtype nothing is copied: do not overwrite the file in place then.

    Args:
        model: with parameters on the meta device.
        source: where the weights are.
        names: parameter of the model -> tensor of ``source``, all parameters and no others.
        dtype: what the weights become.
        device: where they go.
        unused: tensors that may be there, as copies of others, and are not read.

    Raises:
        UserError: a tensor is missing, left over, misshapen, or holds NaN or Inf.
    """
    where = source.spec.path
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    absent = [names[name] for name in wanted if names[name] not in source.tensors]
    extra = sorted(set(source.tensors) - set(names.values()) - set(unused))
    if absent or extra:
        raise UserError(
            f"{where} does not fit {type(model).__name__}: missing {_listed(absent)}, "
            f"unknown {_listed(extra)}; get the complete file of Wan2.1"
        )
    for name, shape in wanted.items():
        stored = source.tensors[names[name]].shape
        if tuple(stored) != shape:
            raise UserError(
                f"{where}: tensor {shown(names[name])} has shape {list(stored)}, but "
                f"{type(model).__name__} needs {list(shape)}: config and weights disagree"
            )
    mapper = Mapper()
    state = {name: _read(source, names[name], dtype, mapper).to(device) for name in wanted}
    # Tied parameters stand once among the parameters and under every name in the state.
    model.load_state_dict(state, strict=False, assign=True)


def _read(source: Checkpoint, name: str, dtype: torch.dtype, mapper: Mapper) -> torch.Tensor:
    info, where = source.tensors[name], source.spec.path
    kept = DTYPES.get(info.dtype) == dtype
    found = mapper(*stored_in(source, name)) if kept else None
    if found is None:
        refuse_integers(info, where)
        found = filled(source, name, dtype, mapper)
    require_finite(as_bytes(found), NAMES[dtype], name, where)
    return found


def _listed(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(shown(name) for name in names[:count]) + more if names else "none"
