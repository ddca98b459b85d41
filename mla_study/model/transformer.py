"""The Wan2.1 transformer: bidirectional teacher and chunk-causal student from the same weights.

Shapes: B batch, F latent frames, C channels, height x width of the latent, d width, L = F h w
tokens.
Parameter names are those of the original Wan checkpoints; latent self-attention adds its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import Positions, Segment, Visibility, bidirectional, step_of
from mla_study.model.attention import (
    CrossAttention,
    DenseSelfAttention,
    Entry,
    LatentSelfAttention,
    LayerMemory,
    LayerStep,
    Piece,
)
from mla_study.model.layers import FreshGELU, LayerNorm, gated, modulate, timestep_embedding
from mla_study.model.rope import RotaryEmbedding, Rotation


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
            nn.Linear(d, config.ffn_width), FreshGELU(), nn.Linear(config.ffn_width, d)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, d).div_(d**0.5))

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        time: Float[Tensor, "B F 6 d"],
        pieces: Sequence[Piece],
        cross: Sequence[Entry],
        memory: LayerStep | None = None,
    ) -> Float[Tensor, "B L d"]:
        """One block; ``time`` is the projected timestep embedding of each frame."""
        e = (self.modulation[:, None].to(time.dtype) + time).to(x.dtype).unbind(2)
        e = [part[:, :, None] for part in e]
        y = self.self_attn(modulate(self.norm1(x), e[0], e[1]), pieces, memory)
        x = gated(x, y, e[2])
        x = x + self.cross_attn(self.norm3(x), cross)
        return gated(x, self.ffn(modulate(self.norm2(x), e[3], e[4])), e[5])


class Head(nn.Module):
    """Modulated norm and projection to patches; its modulation takes the unprojected embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.norm = LayerNorm(d, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(d, math.prod(config.patch) * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, d).div_(d**0.5))

    def forward(
        self, x: Float[Tensor, "B L d"], e: Float[Tensor, "B F d"]
    ) -> Float[Tensor, "B L p"]:
        """Tokens to flattened patches."""
        both = (self.modulation[:, None].to(e.dtype) + e[:, :, None]).to(x.dtype)
        return self.head(modulate(self.norm(x), both[:, :, :1], both[:, :, 1:]))


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


class LearnedPositions(nn.Module):
    """Learned embeddings of the place in a frame, and of the first frame of a video.

    Wan has neither; the miniature needs both. The table has the token grid of
    ``config.latent_size``; on another grid it is interpolated.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rows, columns = (s // p for s, p in zip(config.latent_size, config.patch[1:], strict=True))
        self.space = nn.Parameter(torch.randn(1, config.width, rows, columns).mul_(0.02))
        self.first = nn.Parameter(torch.randn(config.width).mul_(0.02))

    def forward(
        self, x: Float[Tensor, "B d F h w"], times: Sequence[int]
    ) -> Float[Tensor, "B d F h w"]:
        """Add them; ``times`` are the frames of the video that x shows."""
        space = self.space
        if space.shape[2:] != x.shape[3:]:
            space = F.interpolate(space, tuple(x.shape[3:]), mode="bilinear")
        first = x.new_zeros(len(times))  # filled on the device, which a CUDA graph can record
        for index, time in enumerate(times):
            if time == 0:
                first[index] = 1
        return x + space[:, :, None] + first[:, None, None] * self.first[:, None, None, None]


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
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        if config.model_type == "i2v":
            self.img_emb = ImageProjection(d)
        if config.learned_positions:
            self.position_embedding = LearnedPositions(config)
        self.recompute = False
        self._known_pieces: dict[object, list[Piece]] = {}
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
            if self.config.model_type != "i2v":
                raise UserError("an image was given, but this model takes text only")
            pixels = self.img_emb(image.to(dtype))
        blocks = cast("Sequence[Block]", self.blocks)
        return Conditioning(tuple(tuple(b.cross_attn.keys(text, pixels)) for b in blocks))

    def pieces(
        self, rule: Visibility, height: int, width: int, device: torch.device
    ) -> list[Piece]:
        """A rule in tokens, with the rotations of each segment; used by all layers.

        The latest few are kept, for a training loop asks for the same ones at every step.

        Args:
            height, width: token grid of a frame.
        """
        key = (rule, height, width, device, self.patch_embedding.weight.dtype)
        if key not in self._known_pieces:
            while len(self._known_pieces) >= 4:
                del self._known_pieces[next(iter(self._known_pieces))]
            # tables born in inference mode could not be saved for a backward
            with torch.inference_mode(False):
                made = self._pieces(rule.segments, rule.frames, rule.frames, height, width, device)
            self._known_pieces[key] = made
        return self._known_pieces[key]

    def step_pieces(
        self,
        chunk: Sequence[int],
        held: Sequence[int],
        positions: Positions,
        height: int,
        width: int,
        device: torch.device,
    ) -> list[Piece]:
        """The same for a rollout's step, good for all passes over a chunk.

        Args:
            chunk: ids of the frames that are being made.
            held: what :meth:`~mla_study.model.cache.RollingCache.begin` returned for them.
            height, width: token grid of a frame.
        """
        step = step_of(chunk, held, positions)
        return self._pieces([step], len(chunk), len(held), height, width, device)

    def _pieces(
        self,
        segments: Sequence[Segment],
        queries: int,
        keys: int,
        height: int,
        width: int,
        device: torch.device,
    ) -> list[Piece]:
        double = self.patch_embedding.weight.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        tables: dict[tuple[int, ...], Rotation] = {}

        def turn(positions: tuple[int, ...]) -> Rotation:
            if positions not in tables:
                times = torch.tensor(positions, device=device)
                tables[positions] = self.rope.table(times, height, width, dtype)
            return tables[positions]

        def where(frames: tuple[int, ...], total: int) -> tuple[slice, ...] | None:
            return None if frames == tuple(range(total)) else _slices(frames, height * width)

        return [
            Piece(
                where(segment.queries, queries),
                where(segment.keys, keys),
                turn(segment.query_positions),
                turn(segment.key_positions),
            )
            for segment in segments
        ]

    def forward(
        self,
        x: Float[Tensor, "B C F height width"],
        t: Float[Tensor, "#B #F"] | Float[Tensor, "#B"],
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
            memory: one cache view a layer, where the past lies in a cache; needs ``pieces``.

        Raises:
            UserError: channels, sizes or timesteps that do not fit.
        """
        config = self.config
        frames, height, width = self._grid(x)
        tokens = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        rule = rule or bidirectional(frames)
        if config.learned_positions:
            times = rule.frame_times if memory is None else memory[0].frames
            tokens = self.position_embedding(tokens, times)
        # every layer norm would copy a strided stream
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()
        if pieces is None:
            if memory is not None or rule.frames != frames:
                raise ValueError("a cache needs the pieces of its step, and a rule all its frames")
            pieces = self.pieces(rule, height, width, x.device)
        t = _per_frame(t, x.shape[0], frames)
        e = self.time_embedding(timestep_embedding(t, config.freq_dim).to(tokens.dtype))
        e0 = self.time_projection(e).unflatten(-1, (6, config.width))
        if e.shape[1] != frames:
            e, e0 = e.expand(-1, frames, -1), e0.expand(-1, frames, -1, -1)
        for index, block in enumerate(self.blocks):
            held = None if memory is None else memory[index].step()
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


def _per_frame(t: Tensor, batch: int, frames: int) -> Tensor:
    """Timesteps [B or 1, F or 1]."""
    if t.dtype in (torch.bfloat16, torch.float16):
        raise UserError(f"timesteps came in {t.dtype}, which cannot hold them: give float32")
    t = t[:, None] if t.ndim == 1 else t
    if t.ndim != 2 or t.shape[0] not in (1, batch) or t.shape[1] not in (1, frames):
        raise UserError(
            f"timesteps of shape {list(t.shape)} do not fit {batch} samples of {frames} frames: "
            "give one a sample, or one a frame"
        )
    return t


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
