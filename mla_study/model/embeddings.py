"""Embeddings of prompts kept in a file, so that the 11 GB text encoder need not be at hand.

Shapes: B prompts, T tokens of a prompt, L = 512 tokens that the transformer sees, d width (4096).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.checkpoints.formats.container import Container, shown
from mla_study.checkpoints.formats.opening import open_container
from mla_study.config import ModelConfig
from mla_study.errors import UserError

TEXT_LEN = ModelConfig.text_len
_FILE_KIND = "mla-study text embeddings"
_SCHEMA = "1"


def padded(rows: Sequence[Tensor], text_len: int = TEXT_LEN) -> Float[Tensor, "B L d"]:
    """Embeddings [T, d] of different lengths as one batch, zeros behind."""
    batch = rows[0].new_zeros(len(rows), text_len, rows[0].shape[1])
    for index, row in enumerate(rows):
        batch[index, : len(row)] = row
    return batch


def _key(prompt: str) -> str:
    """What a prompt is filed under; white space does not tell prompts apart."""
    return hashlib.sha256(" ".join(prompt.split()).encode()).hexdigest()


def save_embeddings(
    path: str | Path, prompts: Sequence[str], rows: Sequence[Tensor], facts: Mapping[str, str]
) -> None:
    """Write embeddings as safetensors: a tensor [T, d] a prompt, named by the prompt's SHA-256.

    The metadata holds the prompts, the SHA-256 of each tensor's bytes, and ``facts``.

    Raises:
        UserError: the file cannot be written; nothing is left half-made.
    """
    from safetensors.torch import save_file

    target = Path(path)
    tensors = {_key(p): r.detach().cpu().contiguous() for p, r in zip(prompts, rows, strict=True)}
    sums = {
        name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }
    unique = list({_key(p): p for p in prompts}.values())
    metadata = {
        **facts,
        "kind": _FILE_KIND,
        "schema": _SCHEMA,
        "prompts": json.dumps(unique, ensure_ascii=False),
        "sha256": json.dumps(sums, sort_keys=True),
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(target)
    except Exception as error:
        # safetensors reports a full disk by an exception of its own.
        raise UserError(f"cannot write {target}: {error}; give a writable place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Embeddings:
    """Embeddings of prompts in a file of :func:`save_embeddings`, read when asked for.

    Example: ``embeddings("prompts.safetensors")["a red ball"]`` is [512, 4096] float32.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._file: Container = open_container(self.path)
        found = self._file.metadata
        if found.get("kind") != _FILE_KIND or found.get("schema") != _SCHEMA:
            raise UserError(
                f"{self.path} holds no embeddings of prompts that are read here: make it by "
                "mla-study text encode"
            )
        try:
            self.prompts: list[str] = json.loads(str(found["prompts"]))
            self._sums: dict[str, str] = json.loads(str(found["sha256"]))
            self.text_len = int(str(found["text_len"]))
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self.path} has damaged metadata ({error}): make it anew by mla-study text encode"
            ) from None
        own = ("kind", "schema", "prompts", "sha256")
        self.facts = {k: str(v) for k, v in found.items() if k not in own}

    def __len__(self) -> int:
        return len(self.prompts)

    def __contains__(self, prompt: str) -> bool:
        return _key(prompt) in self._file.tensors

    def __getitem__(self, prompt: str) -> Float[Tensor, "L d"]:
        """The embedding of a prompt, zero-padded; UserError with near matches if absent."""
        return padded([self.row(prompt)], self.text_len)[0]

    def batch(self, prompts: Iterable[str]) -> Float[Tensor, "B L d"]:
        """Embeddings of several prompts."""
        return padded([self.row(prompt) for prompt in prompts], self.text_len)

    def tokens(self, prompt: str) -> int:
        """Tokens of a prompt that is in the file, the end token included."""
        return self._file.tensors[_key(prompt)].shape[0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def row(self, prompt: str) -> Float[Tensor, "T d"]:
        """The embedding of a prompt without padding, float32."""
        key = _key(prompt)
        if key not in self._file.tensors:
            near = difflib.get_close_matches(prompt, self.prompts, 3, 0.5)
            hint = f"; near it are {', '.join(shown(name, 60) for name in near)}" if near else ""
            raise UserError(
                f"{self.path} has no embedding of the prompt {shown(prompt, 60)}{hint}: add it by "
                f"mla-study text encode --prompt ... --out {self.path}"
            )
        if self._file.raw_sha256(key) != self._sums.get(key):
            raise UserError(
                f"{self.path}: the embedding of {shown(prompt, 60)} is damaged (its SHA-256 "
                "differs from the recorded one): make the file anew by mla-study text encode"
            )
        return torch.from_numpy(np.array(self._file.read(key)))


def embeddings(path: str | Path) -> Embeddings:
    """Open a file of embeddings; ``embeddings(path)[prompt]`` is one of them.

    Raises:
        UserError: it is no such file.
    """
    return Embeddings(path)
