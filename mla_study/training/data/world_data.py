"""Clips of the miniature world as training data: rendered on the fly, coded, never repeated.

Shapes: B clips, C latent channels, F frames, h x w latent, T words, E text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.training.batch import Batch
from mla_study.world.codec import Codec
from mla_study.world.render import render
from mla_study.world.scenes import Scenes, World, sample_scenes
from mla_study.world.text import CaptionEncoder


@dataclass(frozen=True)
class WorldData:
    """Scenes of a world; sample n follows from (seed, n) alone.

    Attributes:
        captions_only: give no latents, for objectives that need prompts only.
    """

    world: World
    codec: Codec
    encoder: CaptionEncoder
    seed: int = 0
    captions_only: bool = False

    @property
    def null(self) -> Float[Tensor, "1 T E"]:
        """Zeros, as the encoder makes of an empty prompt."""
        return torch.zeros(1, self.encoder.length, self.encoder.width)

    def batch(self, samples: Sequence[int]) -> Batch:
        """The clips with these numbers."""
        drawn = [sample_scenes(self.world, 1, self.seed, number) for number in samples]
        captions = tuple(caption for scene in drawn for caption in scene.captions)
        told = tuple(str(caption) for caption in captions)
        latents = None
        if not self.captions_only:
            start = torch.cat([scene.start for scene in drawn])
            latents = self.codec.encode(render(Scenes(self.world, captions, start)))
        return Batch(self.encoder(told), latents, told)

    def facts(self) -> dict[str, Any]:
        """World, codec and seed."""
        codec = {"channels": len(self.codec.basis), "seed": self.codec.seed}
        return {
            "kind": "world",
            "world": asdict(self.world),
            "codec": codec,
            "seed": self.seed,
            "captions_only": self.captions_only,
        }
