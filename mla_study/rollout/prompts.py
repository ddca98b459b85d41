"""What a rollout is told: prompts, embeddings or finished keys, at the start and at later chunks.

Shapes: B batch, T text tokens, E text channels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.model.transformer import Conditioning, WanTransformer

Prompts = str | Sequence[str] | Tensor | Conditioning
"""One prompt, one a sample, text embeddings [B, T, E] or [T, E], or finished conditioning."""

Encoder = Callable[[Sequence[str]], Tensor]
"""Prompts to text embeddings [B, T, E]."""

UMT5_WIDTH = 4096


@dataclass(frozen=True)
class WordHash:
    """A stand-in for a text encoder, without weights: each word gets the same Gaussian vector.

    It knows no meaning; equal words give equal embeddings on every machine. Words beyond ``length``
    are dropped.
    """

    width: int
    length: int

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, length, width] float32, rows of zeros after the last word."""
        out = np.zeros((len(prompts), self.length, self.width), dtype=np.float32)
        for row, prompt in zip(out, prompts, strict=True):
            for slot, word in zip(row, prompt.lower().split(), strict=False):
                slot[:] = _word(word, self.width)
        return torch.from_numpy(out)


@functools.lru_cache(maxsize=1024)
def _word(word: str, width: int) -> np.ndarray:
    return philox("word", word).standard_normal(width, dtype=np.float32)


def stand_in(config: ModelConfig) -> WordHash:
    """The :class:`WordHash` of a model's text width and length."""
    return WordHash(config.text_dim, config.text_len)


def philox(*names: object) -> np.random.Generator:
    """A random stream of its own for these names, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def default_encoder(config: ModelConfig) -> Encoder:
    """The stand-in for a model whose text width no published encoder has.

    Raises:
        UserError: a model that reads UMT5 embeddings.
    """
    if config.text_dim == UMT5_WIDTH:
        raise UserError(
            f"model '{config.name}' reads UMT5 embeddings: pass encode=..., or embeddings made "
            "before, in place of prompts"
        )
    return stand_in(config)


def embed(prompts: Prompts, config: ModelConfig, encode: Encoder | None) -> Tensor | Conditioning:
    """Embeddings [B, T, E] on the CPU; a conditioning stays as it is.

    Raises:
        UserError: no prompt, or embeddings of another shape than the model reads.
    """
    if isinstance(prompts, Conditioning):
        return prompts
    if isinstance(prompts, Tensor):
        held = prompts[None] if prompts.ndim == 2 else prompts
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise UserError("there is no prompt: give at least one")
        held = (encode or default_encoder(config))(texts)
    if held.ndim != 3 or held.shape[-1] != config.text_dim:
        raise UserError(
            f"text embeddings of shape {list(held.shape)} do not fit model '{config.name}', "
            f"which reads [batch, tokens, {config.text_dim}]"
        )
    return held


def conditioning_for(
    model: WanTransformer, told: Tensor | Conditioning, batch: int
) -> Conditioning:
    """Cross-attention keys for ``batch`` samples; one prompt serves all of them.

    Raises:
        UserError: as many prompts as neither one nor the batch, or keys that are not finite.
    """
    if isinstance(told, Conditioning):
        made = told
    else:
        weight = model.patch_embedding.weight
        made = model.condition(told.to(weight.device, weight.dtype))
    count = made.keys[0][0][0].shape[0]
    if count not in (1, batch):
        raise UserError(f"{count} prompts do not fit a batch of {batch}: give 1 or {batch}")
    for layer, entries in enumerate(made.keys):
        if not all(bool(torch.isfinite(x).all()) for pair in entries for x in pair):
            raise UserError(
                f"layer {layer}: the cross-attention keys of the prompt are not finite: "
                "its weights or the text embeddings hold NaN or infinity"
            )
    if count == batch:
        return made
    wide = tuple(
        tuple((k.expand(batch, *k.shape[1:]), v.expand(batch, *v.shape[1:])) for k, v in entries)
        for entries in made.keys
    )
    return Conditioning(wide)


def batch_of(told: Tensor | Conditioning) -> int:
    """How many samples embeddings or a conditioning speak of."""
    return told.shape[0] if isinstance(told, Tensor) else told.keys[0][0][0].shape[0]


def digest(script: Mapping[int, Tensor | Conditioning]) -> str:
    """SHA-256 over what is told, and when."""
    made = hashlib.sha256()
    for chunk, told in sorted(script.items()):
        tensors = (
            [told]
            if isinstance(told, Tensor)
            else [x for entries in told.keys for pair in entries for x in pair]
        )
        for tensor in tensors:
            made.update(f"{chunk} {tuple(tensor.shape)}".encode())
            made.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
    return made.hexdigest()
