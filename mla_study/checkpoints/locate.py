"""From what a user types to the files that hold the weights: file, index, folder, hub or https."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mla_study.checkpoints.formats.bytesource import is_remote
from mla_study.checkpoints.formats.sources import open_bytes
from mla_study.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx")
COMPONENTS = ("transformer", "unet", "prior", "transformer_2")
CONFIGS = ("config.json", "params.json")
ADAPTER_CONFIG = "adapter_config.json"
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
_SHARD = re.compile(r"^(.*?)-?(\d{5})-of-(\d{5})((?:\.\w+)+)$", re.ASCII)
_INDEX = re.compile(r"\.(?:safetensors|bin|pt|pth)\.index(?:\.\w+)?\.json$")
_VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|fp8\w*|non_ema|ema)(?=[.-])")
_TRAINING = re.compile(
    r"^(?:optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state)"
)
_MAX_JSON = 64_000_000


@dataclass(frozen=True)
class Located:
    """Files of one checkpoint (addresses that a container opens), its config and remarks."""

    files: tuple[str, ...]
    config: dict[str, Any] | None = None
    config_path: str | None = None
    weight_map: dict[str, str] | None = None  # tensor -> file, from an index
    index: str | None = None
    adapter_config: str | None = None  # path of a peft adapter's own config
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Place:
    """A folder, or a hub repository: the relative names in it, and how to address them."""

    shown: str
    names: tuple[str, ...]
    address: Callable[[str], str]

    @property
    def top(self) -> list[str]:
        return [name for name in self.names if "/" not in name]

    @property
    def weights(self) -> list[str]:
        return [n for n in self.top if n.endswith(SUFFIXES) and not _TRAINING.match(n)]

    @property
    def indices(self) -> list[str]:
        return [name for name in self.top if _INDEX.search(name)]

    def inner(self, folder: str) -> _Place:
        prefix = folder + "/"
        return _Place(
            f"{self.shown.rstrip('/')}/{folder}",
            tuple(n[len(prefix) :] for n in self.names if n.startswith(prefix)),
            lambda name: self.address(prefix + name),
        )


def locate(path: str) -> Located:
    """Find the weight files behind ``path``; raises :class:`UserError` when there is no one answer.

    ``path`` is a weight file, a sharded index (``*.index.json``), a folder (original Wan, diffusers
    pipeline or component, transformers model, shards), ``hf://org/name[/path]`` or an ``https://``
    address of a file or an index.
    """
    if path.startswith("hf://"):
        from mla_study.checkpoints.formats.remote import resolve_hub

        repo = resolve_hub(path)
        return _inside(_Place(path, repo.files, repo.address), repo.inside)
    if is_remote(path):
        url = urlsplit(path)
        if not _INDEX.search(url.path):
            return Located((path,))
        folder = url.path.rpartition("/")[0]
        return _from_index(
            path, lambda name: urlunsplit(url._replace(path=f"{folder}/{name}")), path, None
        )
    try:
        if not path:
            raise UserError("the path is empty: give a weight file, an index or a folder")
        given = Path(path)
        if given.name == "model_index.json" and given.is_file():
            given = given.parent
        if given.is_dir():
            return _choose(_folder(str(given)))
        if not given.exists():
            raise UserError(f"{path} does not exist: give a weight file, an index or a folder")
    except (OSError, ValueError) as error:
        raise UserError(f"{path[:200]!r} cannot be opened ({error}): check the path") from None
    place = _folder(str(given.parent), deep=False)
    if path.endswith("index.json") or _INDEX.search(path):
        found = _from_index(path, place.address, path, None)
    else:
        found = Located((path,), notes=_shard_note(given.name))
    return _with_config(found, place)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a local path or an address; raises UserError that names it."""
    source = open_bytes(path)
    try:
        if source.size > _MAX_JSON:
            raise UserError(
                f"{path} has {source.size} bytes, too many for a JSON description: "
                "name a config or index file"
            )
        data = json.loads(bytes(source.read(0, source.size)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend or replace it") from None
    finally:
        source.close()
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object, as a config or index would: replace it")
    return data


def _folder(folder: str, deep: bool = True) -> _Place:
    """A local folder and, where ``deep``, the visible folders in it that can be read."""
    names: list[str] = []
    try:
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                names.append(entry.name)
            elif deep:
                names += _files_of(entry.path, entry.name)
    except OSError as error:
        if deep:
            raise UserError(
                f"{folder} cannot be listed ({error.strerror}): check its rights"
            ) from None
    return _Place(folder, tuple(names), lambda name: str(Path(folder) / name))


def _files_of(path: str, prefix: str) -> list[str]:
    try:
        return [
            f"{prefix}/{e.name}"
            for e in sorted(os.scandir(path), key=lambda e: e.name)
            if not e.name.startswith(".") and not e.is_dir()
        ]
    except OSError:
        return []


def _from_index(
    index: str, address: Callable[[str], str], shown: str, listed: Sequence[str] | None
) -> Located:
    data = read_json(index)
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{shown} has no weight_map, so it is no sharded index: name a weight file or a folder"
        )
    places: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{shown} sends tensor {tensor!r} to {str(name)[:80]!r}, which is no file name: "
                "get the index again"
            )
        if name in places:
            continue
        if ".." in PurePosixPath(name).parts or name.startswith("/") or "://" in name:
            raise UserError(
                f"{shown} sends tensor {tensor!r} to {name!r}, outside its folder: "
                "get the index from where the weights came from"
            )
        places[name] = address(name)
        absent = listed is not None and name not in listed
        if absent or (not is_remote(places[name]) and not _is_file(places[name])):
            count = sum(1 for shard in weight_map.values() if shard == name)
            raise UserError(
                f"{shown} names the shard {name}, which is missing ({count} of its tensors lie "
                "there): put that file beside the index"
            )
    return Located(
        tuple(places[name] for name in sorted(places)),
        weight_map={tensor: places[name] for tensor, name in weight_map.items()},
        index=index,
    )


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _inside(place: _Place, inside: str) -> Located:
    """A path inside a repository: one file, an index, or a folder."""
    if not inside:
        return _choose(place)
    if inside in place.names:
        folder, _, name = inside.rpartition("/")
        here = place.inner(folder) if folder else place
        if name == "model_index.json":
            return _choose(here)
        return _read(here, [name], list(_shard_note(name)))
    inner = place.inner(inside.rstrip("/"))
    if not inner.names:
        raise UserError(
            f"{place.shown}: there is no {inside} in it: name one of {_some(place.names)}"
        )
    return _choose(inner)


def _choose(place: _Place) -> Located:
    """One checkpoint out of a folder."""
    notes: list[str] = []
    folders = sorted(
        {name.split("/")[0] for name in place.names if "/" in name and _is_weights(name)}
    )
    component = next((name for name in COMPONENTS if name in folders), None)
    if (place.weights or place.indices) and not (component and "model_index.json" in place.top):
        return _read(place, _pick(place, notes), notes)
    if component is None and len(folders) == 1:
        component = folders[0]
    if component is None:
        hint = (
            f"name one of its folders: {', '.join(folders)}"
            if folders
            else f"name a folder with one of *{', *'.join(SUFFIXES)}"
        )
        raise UserError(f"{place.shown} holds no weight file: {hint}")
    others = [name for name in folders if name != component]
    rest = f", not {', '.join(others)}" if others else ""
    found = _choose(place.inner(component))
    note = f"{place.shown}: reading its component '{component}'{rest}."
    return replace(found, notes=(note, *found.notes))


def _is_weights(name: str) -> bool:
    last = name.rpartition("/")[2]
    return bool(_INDEX.search(last)) or (last.endswith(SUFFIXES) and not _TRAINING.match(last))


def _pick(place: _Place, notes: list[str]) -> list[str]:
    """The index, the file, or all shards to read among what lies at the top of a folder."""
    plain = [name for name in place.indices if not _VARIANT.search(name)]
    for group in (plain, place.indices):
        safe = [name for name in group if ".safetensors." in name]
        if len(safe) == 1 or len(group) == 1:
            return [(safe or group)[0]]
    chosen = _named(place.weights) or _shards(place)
    if not chosen:
        raise UserError(
            f"{place.shown} holds several weight files: name one of {_some(place.weights)}"
        )
    others = [name for name in place.weights if name not in chosen]
    if others:
        notes.append(f"{place.shown}: reading {_some(chosen, 1)}, not {_some(others, 4)}.")
    return chosen


def _named(weights: Sequence[str]) -> list[str]:
    """The one file that a name or its being alone tells, else nothing."""
    for name in PREFERRED:
        if name in weights:
            return [name]
    for name in PREFERRED:
        variants = [n for n in weights if _VARIANT.sub("", n) == name]
        if len(variants) == 1:
            return variants
    if len({name.rpartition(".")[0] for name in weights}) == 1:  # one or several formats of it
        return [min(weights, key=lambda n: SUFFIXES.index(Path(n).suffix))]
    return []


def _shards(place: _Place) -> list[str]:
    """All of a complete set of numbered shards, of the preferred format."""
    sets: dict[tuple[str, int, str], list[str]] = {}
    for name in place.weights:
        match = _SHARD.match(name)
        if match:
            sets.setdefault((match[1], int(match[3]), match[4]), []).append(name)
    whole = [names for (_, total, _), names in sets.items() if len(names) == total]
    if sets and not whole:
        (stem, total, suffix), names = next(iter(sets.items()))
        raise UserError(
            f"{place.shown} holds {len(names)} of the {total} shards {stem}-*{suffix} and no "
            "index: add the missing files"
        )
    order = [
        (SUFFIXES.index(Path(n[0]).suffix), bool(_VARIANT.search(n[0])), n) for n in sorted(whole)
    ]
    first = sorted(order)[:2]
    if len(first) == 2 and first[0][:2] == first[1][:2]:
        return []
    return first[0][2] if first else []


def _shard_note(name: str) -> tuple[str, ...]:
    match = _SHARD.match(name)
    if match is None or int(match[3]) < 2:
        return ()
    return (f"{name} is one of {int(match[3])} shards: name its folder or index to read all.",)


def _read(place: _Place, chosen: list[str], notes: list[str]) -> Located:
    if len(chosen) == 1 and _INDEX.search(chosen[0]):
        index = place.address(chosen[0])
        listed = place.names if is_remote(index) else None
        found = _from_index(index, place.address, index, listed)
    else:
        found = Located(tuple(place.address(name) for name in chosen))
    return _with_config(replace(found, notes=tuple(notes)), place)


def _with_config(found: Located, place: _Place) -> Located:
    config = next((place.address(n) for n in CONFIGS if n in place.names), None)
    adapter = place.address(ADAPTER_CONFIG) if ADAPTER_CONFIG in place.names else None
    return replace(
        found,
        config=read_json(config) if config else None,
        config_path=config,
        adapter_config=adapter,
    )


def _some(names: Sequence[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(list(names)[:count]) + more if names else "nothing"
