"""The state of a rollout on disk, saved after each chunk, from which it goes on bit for bit.

Noise depends on (seed, chunk, sample) alone, so there is no random state to keep: the cache, the
latents that a re-cache or a decoder may need, and the counters are all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mla_study.config import to_dict
from mla_study.errors import UserError
from mla_study.rollout.prompts import digest
from mla_study.rollout.sinks import Mark, marks_from, marks_json, replace, writing
from mla_study.rollout.stream import Rollout

_KIND = "mla-study rollout state"
_SCHEMA = "1"
_SAMPLED = 1024


@dataclass(frozen=True)
class Saved:
    """What :func:`load` found: where the files stood, and the latents [B, C, f, h, w] before."""

    next_chunk: int
    marks: list[Mark]
    tail: Tensor | None
    finished: bool


def state_path(out: Path) -> Path:
    """Where the state of the rollout that writes ``out`` is kept."""
    return out.with_name(f"{out.name}.state.safetensors")


def identity(rollout: Rollout, more: Mapping[str, object] | None = None) -> dict[str, Any]:
    """What must be the same for a resumed rollout to go on as if undisturbed; plain JSON.

    Args:
        more: further facts, such as the prompts as text or the decoder.
    """
    weights = rollout.model.patch_embedding.weight
    facts: dict[str, Any] = {
        "model": to_dict(rollout.model.config),
        "weights": weights_digest(rollout.model),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "rollout": dataclasses.asdict(rollout.config),
        "embeddings": digest(rollout.script),
        **(more or {}),
    }
    return json.loads(json.dumps(facts))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, and up to 1024 evenly spaced values of every parameter."""
    made = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // _SAMPLED)
        made.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        made.update(flat[::step].double().cpu().numpy().tobytes())
    return made.hexdigest()


def save(
    path: Path,
    rollout: Rollout,
    facts: Mapping[str, Any],
    marks: list[Mark],
    tail: Tensor | None = None,
    finished: bool = False,
) -> None:
    """Write the state whole or not at all.

    Args:
        facts: :func:`identity` of the rollout, made once.
        marks: how far the output files have come.
        tail: last latents, where the decoder needs them to go on.
        finished: the output files are final.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    from safetensors.torch import save_file

    tensors = {f"cache.{name}": tensor for name, tensor in rollout.cache.state().items()}
    # clones, for safetensors refuses tensors that share memory
    tensors |= {f"recent.{frame}": _copy(x) for frame, x in rollout.recent.items()}
    if tail is not None:
        tensors["tail"] = _copy(tail)
    metadata = {
        "kind": _KIND,
        "schema": _SCHEMA,
        "identity": json.dumps(facts, sort_keys=True),
        "next_chunk": str(rollout.next_chunk),
        "marks": marks_json(marks),
        "finished": str(int(finished)),
    }
    with writing(path, marks[0].frames):
        replace(path, lambda to: save_file(tensors, to, metadata=metadata))


def load(path: Path, rollout: Rollout, facts: Mapping[str, Any]) -> Saved:
    """Put a rollout where the saved one stood.

    Raises:
        UserError: the file is no state, or belongs to a rollout that differs (each difference is
            listed).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND or metadata.get("schema") != _SCHEMA:
                raise UserError(f"{path} is no saved state of a rollout: remove it and start anew")
            unlike = differences(json.loads(metadata["identity"]), facts)
            if unlike:
                raise UserError(
                    f"{path} was saved by another rollout, so --resume cannot go on: "
                    + "; ".join(unlike)
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and start anew") from None
    cache = {name[6:]: x for name, x in tensors.items() if name.startswith("cache.")}
    rollout.cache.restore(cache)
    device = rollout.model.patch_embedding.weight.device
    rollout.recent = {
        int(name[7:]): x.to(device) for name, x in tensors.items() if name.startswith("recent.")
    }
    chunk = int(metadata["next_chunk"])
    rollout.resume(chunk)
    tail = tensors["tail"].to(device) if "tail" in tensors else None
    return Saved(chunk, marks_from(metadata["marks"]), tail, metadata["finished"] == "1")


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, by dotted name: what was saved, and what is given now."""
    old, new = _flat(saved), _flat(now)
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in names]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]}..."


def kept_tail(tail: Tensor | None, latents: Tensor, frames: int) -> Tensor | None:
    """The last ``frames`` latent frames of ``tail`` and ``latents`` [B, C, f, h, w] joined."""
    if frames == 0:
        return None
    joined = latents if tail is None else torch.cat([tail, latents], dim=2)
    return joined[:, :, -frames:]
