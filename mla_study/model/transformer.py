"""The Wan2.1 transformer: bidirectional teacher and chunk-causal student from the same weights.

Shapes: B batch, F latent frames, C channels, height x width of the latent, d width, L = F h w tokens.
Parameter names are those of the original Wan checkpoints; latent self-attention adds its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import Visibility, bidirectional
from mla_study.model.attention import (
    CrossAttention,
    DenseSelfAttention,
    Entry,
    LatentSelfAttention,
    LayerMemory,
    Piece,
)
from mla_study.model.rope import RotaryEmbedding


def timestep_embedding(t: Float[Tensor, "*B"], size: int) -> Float[Tensor, "*B size"]:
    """[cos | sin] of t against 10000^(-i / half), float64: Wan's sinusoidal embedding."""
    half = size // 2
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.double()[..., None] * torch.pow(torch.tensor(10000.0).double(), -exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class LayerNorm(nn.LayerNorm):
    """LayerNorm with statistics in float32 at least."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; the result has the input's dtype."""
        work = input if input.dtype == torch.float64 else input.float()
        weight = None if self.weight is None else self.weight.to(work.dtype)
        bias = None if self.bias is None else self.bias.to(work.dtype)
        out = F.layer_norm(work, self.normalized_shape, weight, bias, self.eps)
        return out.type_as(input)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; modulated by the timestep of each frame."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.norm1 = LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.self_attn = (
            DenseSelfAttention(config)
            if config.latent is None
            else LatentSelfAttention(config, config.latent)
        )
        self.norm3 = LayerNorm(d, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(d, config.ffn_width), nn.GELU("tanh"), nn.Linear(config.ffn_width, d)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, d) / d**0.5)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        time: Float[Tensor, "B F 6 d"],
        pieces: Sequence[Piece],
        cross: Sequence[Entry],
        memory: LayerMemory | None = None,
    ) -> Float[Tensor, "B L d"]:
        """One block; ``time`` is the projected timestep embedding of each frame."""
        frames = time.shape[1]
        dtype = x.dtype
        e = (self.modulation[:, None].to(time.dtype) + time).unbind(2)
        e = [part[:, :, None].to(dtype) for part in e]

        def split(y: Tensor) -> Tensor:
            return y.unflatten(1, (frames, -1))

        y = _modulate(split(self.norm1(x)), e[0], e[1]).flatten(1, 2)
        x = x + (split(self.self_attn(y, pieces, memory)) * e[2]).flatten(1, 2)
        x = x + self.cross_attn(self.norm3(x), cross)
        y = _modulate(split(self.norm2(x)), e[3], e[4]).flatten(1, 2)
        return x + (split(self.ffn(y)) * e[5]).flatten(1, 2)


class Head(nn.Module):
    """Modulated norm and projection to patches; its modulation takes the unprojected embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.norm = LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(d, math.prod(config.patch) * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, d) / d**0.5)

    def forward(
        self, x: Float[Tensor, "B L d"], e: Float[Tensor, "B F d"]
    ) -> Float[Tensor, "B L p"]:
        """Tokens to flattened patches."""
        shift, scale = (self.modulation[:, None].to(e.dtype) + e[:, :, None]).unbind(2)
        y = self.norm(x).unflatten(1, (e.shape[1], -1))
        y = _modulate(y, shift[:, :, None].to(x.dtype), scale[:, :, None].to(x.dtype))
        return self.head(y.flatten(1, 2))


class ImageProjection(nn.Module):
    """I2V: CLIP image tokens [B, 257, 1280] to the width (original name ``img_emb``)."""

    def __init__(self, width: int, image_dim: int = 1280) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, width),
            nn.LayerNorm(width),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Project."""
        return self.proj(image)


@dataclass(frozen=True)
class Conditioning:
    """Cross-attention keys and values of every block, made once for a prompt."""

    keys: tuple[tuple[Entry, ...], ...]


class WanTransformer(nn.Module):
    """Wan2.1 with dense or latent self-attention, by ``config.latent``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.patch_embedding = nn.Conv3d(config.in_channels, d, config.patch, config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, d), nn.GELU("tanh"), nn.Linear(d, d)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        if config.model_type == "i2v":
            self.img_emb = ImageProjection(d)
        self.recompute = False
        kept = None if config.latent is None else config.latent.rope_pairs
        self.rope = RotaryEmbedding(config.head_dim, config.rope_base, kept)

    def condition(
        self, context: Float[Tensor, "B T text"], image: Tensor | None = None
    ) -> Conditioning:
        """Cross-attention keys and values of all blocks.

        Args:
            context: text embeddings, zero-padded here to ``config.text_len`` tokens.
            image: CLIP image tokens [B, 257, 1280] (I2V only).
        """
        missing = self.config.text_len - context.shape[1]
        if missing < 0:
            raise UserError(
                f"the text has {context.shape[1]} tokens, but the model takes at most "
                f"{self.config.text_len}: shorten the prompt"
            )
        dtype = self.patch_embedding.weight.dtype
        text = self.text_embedding(F.pad(context.to(dtype), (0, 0, 0, missing)))
        pixels = None
        if image is not None:
            pixels = self.img_emb(image.to(dtype))
        keys = [tuple(block.cross_attn.keys(text, pixels)) for block in self.blocks]
        return Conditioning(tuple(keys))

    def pieces(
        self, rule: Visibility, height: int, width: int, device: torch.device
    ) -> list[Piece]:
        """A rule in tokens, with the rotations of each segment; used by all layers."""
        tokens = height * width
        dtype = torch.float64 if self.patch_embedding.weight.dtype == torch.float64 else torch.float32
        tables: dict[tuple[int, ...], object] = {}

        def turn(positions: tuple[int, ...]) -> object:
            if positions not in tables:
                times = torch.tensor(positions, device=device)
                tables[positions] = self.rope.table(times, height, width, dtype)
            return tables[positions]

        everything = tuple(range(rule.frames))
        made: list[Piece] = []
        for segment in rule.segments:
            queries = None if segment.queries == everything else _slices(segment.queries, tokens)
            keys = None if segment.keys == everything else _slices(segment.keys, tokens)
            made.append(
                Piece(queries, keys, turn(segment.query_positions), turn(segment.key_positions))  # type: ignore[arg-type]
            )
        return made

    def forward(
        self,
        x: Float[Tensor, "B C F height width"],
        t: Float[Tensor, "B F"] | Float[Tensor, " B"],
        conditioning: Conditioning,
        rule: Visibility | None = None,
        pieces: Sequence[Piece] | None = None,
        memory: Sequence[LayerMemory] | None = None,
    ) -> Float[Tensor, "B C2 F height width"]:
        """Flow prediction (noise - x0).

        Args:
            x: noisy latents.
            t: timesteps on the scale 0 .. 1000, one a sample or one a frame.
            conditioning: from :meth:`condition`.
            rule: who sees whom; None: every frame sees every frame.
            pieces: the rule in tokens, where the caller has it ready (rollout).
            memory: one cache view a layer.

        Raises:
            UserError: channels or sizes that do not fit the config.
        """
        config = self.config
        frames, height, width = self._grid(x)
        tokens = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        tokens = tokens.flatten(2).transpose(1, 2)
        if pieces is None:
            pieces = self.pieces(rule or bidirectional(frames), height, width, x.device)
        t = t[:, None] if t.ndim == 1 else t
        e = self.time_embedding(timestep_embedding(t, config.freq_dim).to(tokens.dtype))
        e0 = self.time_projection(e).unflatten(-1, (6, config.width))
        if e.shape[1] != frames:
            e, e0 = e.expand(-1, frames, -1), e0.expand(-1, frames, -1, -1)
        for index, block in enumerate(self.blocks):
            held = None if memory is None else memory[index]
            keys = conditioning.keys[index]
            if self.recompute and torch.is_grad_enabled():
                tokens = recompute(block, tokens, e0, pieces, keys, held, use_reentrant=False)
            else:
                tokens = block(tokens, e0, pieces, keys, held)
        return self._unpatch(self.head(tokens, e), frames, height, width)

    def _grid(self, x: Tensor) -> tuple[int, int, int]:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_channels:
            raise UserError(
                f"latents of shape {list(x.shape)} do not fit: the model takes "
                f"[batch, {config.in_channels}, frames, height, width]"
            )
        sizes = [s // p for s, p in zip(x.shape[2:], config.patch, strict=True)]
        if any(s % p for s, p in zip(x.shape[2:], config.patch, strict=True)):
            raise UserError(
                f"latents of {list(x.shape[2:])} do not divide into patches of {config.patch}"
            )
        return sizes[0], sizes[1], sizes[2]

    def _unpatch(self, x: Tensor, frames: int, height: int, width: int) -> Tensor:
        p, q, r = self.config.patch
        c = self.config.out_channels
        x = x.unflatten(-1, (p, q, r, c)).unflatten(1, (frames, height, width))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(x.shape[0], c, frames * p, height * q, width * r)


def _slices(frames: Sequence[int], tokens: int) -> tuple[slice, ...]:
    """Runs of neighbouring frames as token slices, in order."""
    runs: list[list[int]] = []
    for frame in frames:
        if runs and runs[-1][1] == frame:
            runs[-1][1] = frame + 1
        else:
            runs.append([frame, frame + 1])
    return tuple(slice(start * tokens, stop * tokens) for start, stop in runs)


def meta_model(config: ModelConfig) -> WanTransformer:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return WanTransformer(config)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The same model with dense self-attention."""
    return replace(config, latent=None)
