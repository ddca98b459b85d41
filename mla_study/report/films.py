"""Videos of the page: the miniature's dense and latent students, beside what was asked for.

Each prompt is rolled out by both students from the same noise, over several training lengths, and
drawn as its caption says by the world itself. H.264 in one thread and without a date, so that the
same pixels give the same bytes.

Shapes: P prompts, F frames, H = W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

PROMPTS = (
    "fast red square moving right middle center on stripes",
    "slow cyan disc moving down top left-side on night",
    "fast yellow cross moving up bottom right-side on pan",
)
VARIANTS = {
    "caption": "as the caption says",
    "dense": "dense attention",
    "latent": "latent attention",
}
"""Who made a video -> in words, in the order of the page."""
FRAMES = 81
SEED = 0
SCALE = 10
_KEY_EVERY = 8  # a slider lands on any frame
# The macroblock tree reads memory that nothing has written: without it bytes follow from pixels.
_X264 = {"preset": "medium", "crf": "23", "bf": "0", "threads": "1", "x264-params": "mbtree=0"}
_MUXER = {"fflags": "+bitexact"}


@dataclass(frozen=True)
class Film:
    """One video.

    Attributes:
        variant: of :data:`VARIANTS`.
        mp4: H.264.
        poster: PNG of the first frame.
        trained: seconds of the clips that the student was trained on.
    """

    variant: str
    prompt: str
    mp4: bytes
    poster: bytes
    seconds: float
    fps: float
    trained: float

    @property
    def told(self) -> str:
        """Who made it."""
        return VARIANTS[self.variant]

    @property
    def captions(self) -> str:
        """WebVTT: what there is to see, before and after the training length."""
        lines = ("WEBVTT", "")
        within = f"{self.told}: {self.prompt}"
        beyond = f"{self.told}: {self.seconds / self.trained:.3g} training lengths, same prompt"
        cues = ((0.0, self.trained, within), (self.trained, self.seconds, beyond))
        told = (f"{_clock(a)} --> {_clock(b)}\n{text}\n" for a, b, text in cues if b > a)
        return "\n".join([*lines, *told])


def films(prompts: Sequence[str] = PROMPTS, frames: int = FRAMES, scale: int = SCALE) -> list[Film]:
    """Videos of all prompts and variants, prompt after prompt.

    Args:
        frames: latent frames, which are frames of the miniature's video.
        scale: pixels that a pixel is shown as.

    Raises:
        UserError: a prompt outside the grammar, or PyAV or a shipped model is missing.
    """
    fps, trained, pixels = pixels_of(prompts, frames)
    made: list[Film] = []
    for index, prompt in enumerate(prompts):
        for variant in VARIANTS:
            big = pixels[variant][index].repeat(scale, 1).repeat(scale, 2)
            made.append(
                Film(
                    variant, prompt, encode(big, fps), _png(big[0]), len(big) / fps, fps,
                    trained / fps,
                )
            )  # fmt: skip
    return made


def pixels_of(prompts: Sequence[str], frames: int) -> tuple[float, int, Mapping[str, np.ndarray]]:
    """Frames a second, frames of a training clip, and uint8 [P, F, H, W, 3] of each variant."""
    import torch

    from mla_study.model.codecs import to_uint8
    from mla_study.rollout.stream import stream
    from mla_study.world.grammar import parse_caption
    from mla_study.world.render import render
    from mla_study.world.scenes import Scenes, centres
    from mla_study.world.serving import WorldDecoder
    from mla_study.world.shipped import load_shipped, world_codec
    from mla_study.world.text import CaptionEncoder

    torch.set_num_threads(1)
    captions = tuple(parse_caption(prompt) for prompt in prompts)
    made: dict[str, np.ndarray] = {}
    fps, codec = 0.0, None
    for variant in ("dense", "latent"):
        model = load_shipped(variant)
        fps = model.config.fps
        codec = world_codec(model.config.latent_size[0])
        decoder = WorldDecoder(codec, 1)
        chunks = stream(
            model, list(prompts), frames=frames, seed=SEED, encode=CaptionEncoder.of(model.config)
        )
        made[variant] = np.concatenate([decoder.decode(chunk.latents) for chunk in chunks], axis=1)
    assert codec is not None
    world = codec.world
    scenes = Scenes(world, captions, centres(world, captions))
    made["caption"] = to_uint8(render(scenes, made["latent"].shape[1])).numpy()
    return fps, world.frames, made


def encode(frames: np.ndarray, fps: float) -> bytes:
    """H.264 in MP4 of uint8 frames [F, H, W, 3] of even sizes: the same bytes for the same pixels.

    Raises:
        UserError: PyAV is not installed or lacks H.264.
    """
    from mla_study.rollout.fragments import mp4_bytes

    lacking = "the report's videos need the package av: pip install 'mla-study[report]'"
    rate = Fraction(fps).limit_denominator(1001)
    return mp4_bytes(frames, rate, _X264, _MUXER, _KEY_EVERY, lacking)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60):02d}:{seconds % 60:06.3f}"
