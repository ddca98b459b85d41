"""Text embeddings of training data, made once: the text encoder is larger than the video model.

Shapes: B prompts, T text tokens, E text channels, t tokens of one prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from mla_study.checkpoints.formats.container import shown
from mla_study.errors import UserError
from mla_study.model.embeddings import padded
from mla_study.rollout.prompts import Encoder
from mla_study.training.data.shards import Shards

Rows = Callable[[Sequence[str]], list[Tensor]]
"""Prompts to their embeddings [t, E] without padding."""

_GROUP = 64


class Texts:
    """An encoder that reads what :meth:`prepare` has made.

    Args:
        shards: where embeddings are kept, of this one encoder.
        length: T; rows beyond a prompt's own tokens are zeros.
        make: loads the encoder; asked only where an embedding is missing.
    """

    def __init__(self, shards: Shards, length: int, make: Callable[[], Rows]) -> None:
        self.shards = shards
        self.length = length
        self.make = make

    def prepare(self, prompts: Sequence[str], progress: bool = True) -> None:
        """Embed what is missing; the same call goes on after an interruption.

        Raises:
            UserError: the encoder cannot be loaded, or the folder cannot be written.
        """
        from tqdm import tqdm

        told = list(dict.fromkeys(prompts))
        if all(_key(prompt) in self.shards for prompt in told):
            return
        with self.shards.adding():
            lacking = [prompt for prompt in told if _key(prompt) not in self.shards]
            rows = self.make() if lacking else None
            bar = tqdm(total=len(lacking), desc="captions", unit="", disable=not progress)
            for first in range(0, len(lacking), _GROUP):
                group = lacking[first : first + _GROUP]
                assert rows is not None
                for prompt, row in zip(group, rows(group), strict=True):
                    self.shards.put(_key(prompt), row)
                bar.update(len(group))
            bar.close()

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "B T E"]:
        """Embeddings, float32.

        Raises:
            UserError: a prompt that was not prepared.
        """
        for prompt in prompts:
            if _key(prompt) not in self.shards:
                raise UserError(
                    f"{self.shards.folder} has no embedding of {shown(prompt, 60)}: "
                    "prepare it first"
                )
        return padded([self.shards.read(_key(p)).float() for p in prompts], self.length)


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def ready(encode: Encoder, prompts: Sequence[str]) -> Encoder:
    """The encoder, after it has seen the prompts, and the empty one, where it keeps them."""
    if isinstance(encode, Texts):
        encode.prepare([*prompts, ""])
    return encode


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) that tells weights apart without reading 11 GB: sizes, and a MiB at each end.

    Args:
        path: a file, or a folder whose files count in the order of their names.

    Raises:
        UserError: it cannot be read.
    """
    end = 2**20
    made = hashlib.sha256()
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            size = file.stat().st_size
            made.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
            with file.open("rb") as source:
                made.update(source.read(end))
                source.seek(max(0, size - end))
                made.update(source.read(end))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    return made.hexdigest()
