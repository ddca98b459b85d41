"""From what a user types to the files that hold the weights: file, index, folder, hub or https."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mla_study.checkpoints.bytesource import is_remote, open_bytes
from mla_study.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx")
COMPONENTS = ("transformer", "unet", "prior", "transformer_2")
PREFERRED = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "adapter_model.bin",
    "model.pt",
)
_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.\w+$")
_INDEX = re.compile(r"\.(safetensors|bin|pt)\.index\.json$")


@dataclass(frozen=True)
class Located:
    """Files of one checkpoint (addresses that a container opens), its config and remarks."""

    files: tuple[str, ...]
    config: dict[str, Any] | None = None
    config_path: str | None = None
    weight_map: dict[str, str] | None = None  # tensor -> file, from an index
    index: str | None = None
    notes: tuple[str, ...] = field(default=())


def locate(path: str) -> Located:
    """Find the weight files behind ``path``; raises :class:`UserError` when there is no one answer.

    ``path`` is a weight file, a sharded index (``*.index.json``), a folder (original Wan, diffusers
    pipeline or component, transformers model), ``hf://org/name[/path]`` or an ``https://`` address.
    """
    if path.startswith("hf://"):
        from mla_study.checkpoints.remote import resolve_hub

        repo = resolve_hub(path)
        return _choose(list(repo.files), path, repo.address, inside=repo.inside)
    if is_remote(path):
        if _INDEX.search(path.split("?")[0]):
            base = path.rsplit("/", 1)[0]
            return _from_index(path, lambda name: f"{base}/{name}", path)
        return Located((path,))
    try:
        if os.path.isdir(path):
            return _choose(_listing(path), path, lambda name: os.path.join(path, name))
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist: give a weight file, an index or a folder")
    except (OSError, ValueError) as error:
        raise UserError(f"{path[:200]!r} cannot be opened ({error}): check the path") from None
    folder = os.path.dirname(path)
    if _INDEX.search(path) or path.endswith("index.json"):
        found = _from_index(path, lambda name: os.path.join(folder, name), path)
    else:
        found = Located((path,))
    config, config_path = _config_beside(folder)
    return Located(found.files, config, config_path, found.weight_map, found.index, found.notes)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a local path or an address; raises UserError that names it."""
    source = open_bytes(path)
    try:
        if source.size > 64_000_000:
            raise UserError(f"{path} has {source.size} bytes, too many for a JSON description")
        data = json.loads(bytes(source.read(0, source.size)))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend or replace it") from None
    finally:
        source.close()
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object: name a config or index file")
    return data


def _config_beside(folder: str) -> tuple[dict[str, Any] | None, str | None]:
    path = os.path.join(folder, "config.json")
    if os.path.isfile(path):
        return read_json(path), path
    return None, None


def _listing(folder: str) -> list[str]:
    names: list[str] = []
    root = Path(folder)

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): check its rights")

    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        relative = Path(here).relative_to(root)
        if len(relative.parts) >= 1:
            folders.clear()
        names += [(relative / name).as_posix() for name in files]
    return sorted(names)


def _from_index(index: str, address: Callable[[str], str], shown: str) -> Located:
    data = read_json(index)
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{shown} has no weight_map: it is not a sharded index")
    for tensor, name in weight_map.items():
        parts = PurePosixPath(str(name)).parts
        if not isinstance(name, str) or ".." in parts or PurePosixPath(name).is_absolute():
            raise UserError(f"{shown} sends tensor {tensor!r} to {name!r}, outside its folder")
    shards = sorted(set(weight_map.values()))
    places = {name: address(name) for name in shards}
    for name, place in places.items():
        if not is_remote(place) and not os.path.isfile(place):
            count = sum(1 for shard in weight_map.values() if shard == name)
            raise UserError(
                f"{shown} names the shard {name}, which is missing ({count} of its tensors lie "
                "there): put that file beside the index"
            )
    return Located(
        tuple(places.values()),
        weight_map={tensor: places[name] for tensor, name in weight_map.items()},
        index=index,
    )


def _choose(
    names: Sequence[str], shown: str, address: Callable[[str], str], inside: str = ""
) -> Located:
    """One checkpoint out of a listing of relative names (folder or hub repository)."""
    notes: list[str] = []
    if inside:
        if inside in names:
            if _INDEX.search(inside):
                return _finish(inside, names, shown, address, notes)
            return _with_config((inside,), inside, names, address, notes)
        prefix = inside.rstrip("/") + "/"
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"{shown}: there is no {inside} in it; it holds {_some(names)}")
        names = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        return _choose(names, shown, lambda name: address(prefix + name))
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(SUFFIXES)]
    if not weights and not any(_INDEX.search(name) for name in top):
        folders = sorted({name.split("/")[0] for name in names if name.endswith(SUFFIXES)})
        component = next((name for name in COMPONENTS if name in folders), None)
        if component is None and len(folders) == 1:
            component = folders[0]
        if component is None:
            hint = (
                f"name one of its folders: {', '.join(folders)}"
                if folders
                else f"a folder needs one of *{', *'.join(SUFFIXES)}"
            )
            raise UserError(f"{shown} holds no weight file: {hint}")
        others = [name for name in folders if name != component]
        rest = f", not {', '.join(others)}" if others else ""
        notes.append(f"{shown}: reading its component '{component}'{rest}.")
        prefix = component + "/"
        part = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        found = _choose(part, f"{shown.rstrip('/')}/{component}", lambda n: address(prefix + n))
        return Located(
            found.files,
            found.config,
            found.config_path,
            found.weight_map,
            found.index,
            (*notes, *found.notes),
        )
    return _finish(_pick(top, weights, shown, notes), names, shown, address, notes)


def _pick(top: Sequence[str], weights: Sequence[str], shown: str, notes: list[str]) -> str:
    """The file to read among those at the top of a folder; '' stands for 'all shards'."""
    indices = [name for name in top if _INDEX.search(name)]
    plain = [name for name in indices if not re.search(r"\.(fp16|bf16|fp8)\.", name)]
    for group in (plain, indices):
        safe = [name for name in group if ".safetensors." in name]
        if len(safe) == 1 or len(group) == 1:
            return (safe or group)[0]
    for name in PREFERRED:
        if name in weights:
            others = [other for other in weights if other != name]
            if others:
                notes.append(f"{shown}: reading {name}, not {', '.join(others[:4])}.")
            return name
    if len(weights) == 1:
        return weights[0]
    shards = [_SHARD.match(name) for name in weights]
    if all(shards) and len({(m[1], m[3]) for m in shards if m}) == 1:
        total = int(next(m[3] for m in shards if m))
        if len(weights) != total:
            raise UserError(
                f"{shown} holds {len(weights)} of {total} shards and no index: "
                "add the missing files"
            )
        return ""
    raise UserError(f"{shown} holds several weight files: name one of {_some(weights)}")


def _finish(
    chosen: str,
    names: Sequence[str],
    shown: str,
    address: Callable[[str], str],
    notes: list[str],
) -> Located:
    if chosen and not _INDEX.search(chosen):
        return _with_config((chosen,), chosen, names, address, notes)
    if not chosen:
        shards = tuple(n for n in names if "/" not in n and n.endswith(SUFFIXES))
        return _with_config(shards, shards[0], names, address, notes)
    folder = str(PurePosixPath(chosen).parent)
    prefix = "" if folder == "." else folder + "/"
    for_index = _from_index(address(chosen), lambda name: address(prefix + name), shown)
    found = _with_config((chosen,), chosen, names, address, notes)
    return Located(
        for_index.files,
        found.config,
        found.config_path,
        for_index.weight_map,
        for_index.index,
        found.notes,
    )


def _with_config(
    files: tuple[str, ...],
    beside: str,
    names: Sequence[str],
    address: Callable[[str], str],
    notes: list[str],
) -> Located:
    folder = str(PurePosixPath(beside).parent)
    config_name = "config.json" if folder == "." else f"{folder}/config.json"
    config_path = address(config_name) if config_name in names else None
    config = read_json(config_path) if config_path else None
    return Located(tuple(address(name) for name in files), config, config_path, notes=tuple(notes))


def _some(names: Sequence[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(list(names)[:count]) + more if names else "nothing"
