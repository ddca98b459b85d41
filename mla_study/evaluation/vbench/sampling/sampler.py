"""A model that makes the videos: prompt and seed to frames in an MP4 file.

Shapes: B batch, C channels, f frames, h x w latent, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mla_study.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mla_study.config import ModelConfig
    from mla_study.model.transformer import WanTransformer
    from mla_study.rollout.setup import ModelChoice
    from mla_study.rollout.video import Decoder

Say = Callable[[str], object]
CODEC = {"preset": "veryfast", "crf": "17", "bf": "0", "x264-params": "mbtree=0"}
"""x264's options, as generate's. With one thread the same frames then give the same bytes; with
bidirectional frames, or quality spread over frames to come (mbtree), they do not."""


@dataclass(frozen=True)
class Recipe:
    """How videos are made; as in ``mla-study generate``, whose defaults these are."""

    checkpoint: str | None = None
    preset: str | None = None
    variant: Literal["dense", "latent"] | None = None
    weights: str | None = None
    lora: tuple[str, ...] = ()
    wan: Path | None = None
    embeddings: Path | None = None
    seconds: float = 5.0
    fps: float | None = None
    size: str | None = None
    window: str | None = None
    positions: Literal["absolute", "relative"] | None = None
    storage: str | None = None
    clean_pass: bool = True
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    upscale: int | None = None


@dataclass(frozen=True)
class Made:
    """What became of one video."""

    frames: int
    latents: str
    """SHA-256 of the latents' float32 values."""


class Sampler:
    """A model with its text encoder and decoder, ready for any number of videos.

    Raises:
        UserError: something that the recipe names is not there, or does not suit the model.
    """

    def __init__(self, recipe: Recipe, say: Say) -> None:
        import torch

        from mla_study.config import parse_window
        from mla_study.rollout.record import latent_frames
        from mla_study.rollout.resume import weights_digest
        from mla_study.rollout.setup import ModelChoice, parse_size
        from mla_study.rollout.stream import RolloutConfig, whole_chunks
        from mla_study.world.shipped import is_world

        self.recipe = recipe
        choice = ModelChoice(
            recipe.checkpoint, False, recipe.preset, recipe.variant, recipe.weights, recipe.lora,
            recipe.dtype, recipe.device,
        )  # fmt: skip
        self.model = _model(recipe, choice, say)
        config: ModelConfig = self.model.config
        self.world = is_world(config)
        if recipe.threads is not None and recipe.threads < 1:
            raise UserError(f"--threads is {recipe.threads}, but it must be at least 1")
        if recipe.threads or self.world:
            torch.set_num_threads(recipe.threads or 1)
        video = config.fps if recipe.fps is None else recipe.fps
        if not 0 < video <= 1000:
            raise UserError(f"--fps is {video}, but it must lie between 0 and 1000")
        size = None if recipe.size is None else parse_size(recipe.size)
        window = None if recipe.window is None else parse_window(recipe.window)
        self._rollout = RolloutConfig(
            0, 1, window, size, recipe.positions, recipe.storage, recipe.clean_pass  # type: ignore[arg-type]
        )  # fmt: skip
        frames = latent_frames(recipe.seconds, video, config.codec_stride[0])
        self.chunks = whole_chunks(frames, (window or config.window).chunk)
        self.encode = _encoder(recipe, choice, config, self.world, say)
        self._decoder, self.fps = _decoders(
            recipe, choice, config, size or config.latent_size, self.world, video, say
        )
        self.digest = weights_digest(self.model)
        """SHA-256 over the weights as they run, see :func:`weights_digest`."""

    def check(self, texts: Sequence[str]) -> None:
        """Refuse texts that the model cannot read.

        Raises:
            UserError: the miniature is told something else than a caption of its world.
        """
        if not self.world or self.recipe.embeddings is not None:
            return
        from mla_study.world.grammar import parse_caption

        for text in texts:
            try:
                parse_caption(text)
            except UserError:
                raise UserError(
                    f"the miniature reads captions of its own world alone, and '{text[:60]}' is "
                    "none: give --checkpoint of a larger model, or --prompts mini"
                ) from None

    def make(self, told: Tensor, seed: int, path: Path) -> Made:
        """Make one video.

        Args:
            told: embedding of its prompt [1, T, E].

        Raises:
            UserError: the model's output is not finite, or the file cannot be written.
        """
        from dataclasses import replace

        from mla_study.rollout.stream import Rollout

        rollout = Rollout(self.model, told, replace(self._rollout, seed=seed))
        decoder, digest = self._decoder(), hashlib.sha256()
        with Mp4(path, self.fps) as video:
            for _ in range(self.chunks):
                latents = rollout.advance().latents
                digest.update(latents.float().cpu().contiguous().numpy().tobytes())
                video.write(decoder.decode(latents)[0])
        return Made(video.frames, digest.hexdigest())

    def facts(self) -> dict[str, Any]:
        """What must be the same for two videos to belong to one set; plain JSON."""
        import dataclasses

        recipe = dataclasses.asdict(self.recipe)
        # where the weights lie and what runs them are no part of what is made
        for name in ("checkpoint", "wan", "embeddings", "device", "threads"):
            recipe.pop(name)
        own = {"model": self.model.config.name, "weights": self.digest, "chunks": self.chunks}
        return {**recipe, **own, "fps": str(self.fps), "decoder": type(self._decoder()).__name__}


class Mp4:
    """An MP4 file of RGB frames; on an error it is closed as far as it came.

    Raises:
        UserError: PyAV is absent, has no H.264, or the file cannot be written.
    """

    def __init__(self, path: Path, fps: Fraction) -> None:
        try:
            import av
        except ImportError:
            raise UserError("writing MP4 needs the package av: pip install av") from None
        self.path, self.fps, self.frames = path, fps, 0
        try:
            self._container = av.open(str(path), "w", format="mp4")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error})") from None
        self._stream: Any = None

    def __enter__(self) -> Mp4:
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [n, H, W, 3]; odd sizes gain a row or column."""
        import av

        pads = [(0, 0), *((0, s % 2) for s in frames.shape[1:3]), (0, 0)]
        frames = np.pad(frames, pads, "edge")
        try:
            if self._stream is None:
                self._stream = self._container.add_stream("libx264", rate=self.fps, options=CODEC)
                self._stream.height, self._stream.width = frames.shape[1:3]
                self._stream.pix_fmt = "yuv420p"
                self._stream.codec_context.time_base = 1 / self.fps
                self._stream.codec_context.thread_count = 1
            for pixels in frames:
                frame: Any = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(pixels), format="rgb24"
                )
                frame.pts, frame.time_base = self.frames, 1 / self.fps
                self._container.mux(self._stream.encode(frame))
                self.frames += 1
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be written ({error}): free some space") from None

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if self._stream is not None and kind is None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
        except OSError as error:
            if kind is None:
                raise UserError(f"{self.path} cannot be written ({error}): free space") from None


def _model(recipe: Recipe, choice: ModelChoice, say: Say) -> WanTransformer:
    from mla_study.model.storage import DTYPES
    from mla_study.rollout.setup import build_model, usable_device
    from mla_study.world.shipped import is_world, load_shipped

    if recipe.checkpoint is not None:
        model = build_model(choice, say)
        return model.float() if is_world(model.config) and recipe.dtype is None else model
    if recipe.preset not in (None, "mini") or recipe.wan or recipe.weights or recipe.lora:
        raise UserError("--preset, --wan, --weights and --lora speak of a --checkpoint: give one")
    dtype = None if recipe.dtype is None else DTYPES[recipe.dtype]
    return load_shipped(recipe.variant or "latent").to(usable_device(recipe.device), dtype)


def _encoder(
    recipe: Recipe, choice: ModelChoice, config: ModelConfig, world: bool, say: Say
) -> Callable[[Sequence[str]], Tensor]:
    from mla_study.rollout.setup import choose_encoder
    from mla_study.world.text import CaptionEncoder

    if world and recipe.embeddings is None:
        return CaptionEncoder.of(config)
    return choose_encoder(config, choice, recipe.wan, recipe.embeddings, say)


def _decoders(
    recipe: Recipe,
    choice: ModelChoice,
    config: ModelConfig,
    size: tuple[int, int],
    world: bool,
    video: float,
    say: Say,
) -> tuple[Callable[[], Decoder], Fraction]:
    """What gives a decoder for a new video, and the frames a second that it makes."""
    from mla_study.rollout.setup import choose_decoder
    from mla_study.rollout.video import VaeDecoder
    from mla_study.world.serving import WorldDecoder, codec_for, visible_scale

    if recipe.upscale is not None and (recipe.upscale < 1 or not world):
        raise UserError("--upscale is a number from 1 and shows the pixels of the miniature")
    if world:
        if recipe.wan is not None:
            raise UserError("the miniature has words and a codec of its own: leave out --wan")
        scale = recipe.upscale or visible_scale(size)
        own = WorldDecoder(codec_for(config, recipe.checkpoint), scale)
        return lambda: own, Fraction(video).limit_denominator(1001)
    decoder, fps = choose_decoder(config, size, choice, recipe.wan, video, True, say)
    if isinstance(decoder, VaeDecoder):
        # it remembers the frames before: each video begins with one that has seen none
        return decoder.anew, fps
    return lambda: decoder, fps
