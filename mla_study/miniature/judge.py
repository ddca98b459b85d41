"""Judges a model of the world by its videos: rolled out, decoded, parsed window by window.

How a long video is judged stands in :mod:`mla_study.world.windows`.

Shapes: B videos, F frames, C latent channels, h x w latent, H = W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.config import WindowConfig
from mla_study.kernels.masks import Positions
from mla_study.model.storage import Storage
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.sampler import guided, solve
from mla_study.rollout.stream import positions_of, stream
from mla_study.world.codec import Codec
from mla_study.world.grammar import Caption, sample_captions
from mla_study.world.text import CaptionEncoder
from mla_study.world.windows import records, windows

_TOGETHER = 64
"""Videos that are rolled out at once."""


@dataclass(frozen=True)
class Trial:
    """What is rolled out.

    Attributes:
        videos: how many, each with a caption of its own.
        clips: length in training lengths.
        seed: of captions and noise.
        solver_steps, guidance: of a bidirectional teacher (guidance: uncond + w (cond - uncond)).
    """

    videos: int = 64
    clips: int = 1
    seed: int = 0
    window: WindowConfig | None = None
    positions: Positions | None = None
    storage: Storage | None = None
    clean_pass: bool = True
    solver_steps: int = 32
    guidance: float = 2.0

    @property
    def captions(self) -> list[Caption]:
        """One a video."""
        return sample_captions(self.videos, 77, self.seed)


def rollouts(
    model: WanTransformer, codec: Codec, trial: Trial, bidirectional: bool = False
) -> Iterator[tuple[list[Caption], Float[Tensor, "B 3 F H W"]]]:
    """Videos in [-1, 1] with their captions, some at a time."""
    encode = CaptionEncoder.of(model.config)
    for first in range(0, trial.videos, _TOGETHER):
        told = trial.captions[first : first + _TOGETHER]
        context = encode([str(caption) for caption in told])
        make = _sampled if bidirectional else _streamed
        latents = make(model, context, trial, codec.world.frames, first)
        yield told, codec.decode(latents).clamp(-1, 1)


@torch.no_grad()
def _sampled(
    model: WanTransformer, context: Tensor, trial: Trial, frames: int, first: int
) -> Tensor:
    """Clips of a bidirectional model by many steps of the guided flow."""
    config = model.config
    draw = torch.Generator().manual_seed(1_000_003 * trial.seed + first)
    shape = (len(context), config.in_channels, frames, *config.latent_size)
    noise = torch.randn(shape, generator=draw)
    told, untold = model.condition(context), model.condition(torch.zeros_like(context))
    velocity = guided(
        lambda x, t: model(x, t, told), lambda x, t: model(x, t, untold), trial.guidance
    )
    return solve("euler", noise, velocity, trial.solver_steps, config.flow.shift)[-1]


def _streamed(
    model: WanTransformer, context: Tensor, trial: Trial, frames: int, first: int
) -> Tensor:
    """Rollouts of a few-step student; the seed's noise is that of the sample's place in the run."""
    total = frames * trial.clips
    chunks = stream(
        model,
        context,
        frames=total,
        seed=1_000_003 * trial.seed + first,
        window=trial.window,
        positions=positions_of(model.config, trial.positions),
        storage=trial.storage,
        clean_pass=trial.clean_pass,
    )
    return torch.cat([chunk.latents for chunk in chunks], dim=2)[:, :, :total]


def judge(
    model: WanTransformer,
    codec: Codec,
    trial: Trial,
    bidirectional: bool = False,
    keep: Callable[[Tensor], object] | None = None,
) -> list[dict[str, Any]]:
    """A row a video and window, see :func:`records`; ``video`` counts over the trial.

    Args:
        keep: gets the first videos [B, 3, F, H, W].
    """
    rows: list[dict[str, Any]] = []
    first = 0
    for captions, video in rollouts(model, codec, trial, bidirectional):
        if keep is not None and first == 0:
            keep(video)
        made = records(windows(video, captions, codec.world), captions, codec.world)
        count = len(captions)
        rows += [row | {"video": first + place % count} for place, row in enumerate(made)]
        first += count
    return rows
