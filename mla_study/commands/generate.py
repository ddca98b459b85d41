"""``mla-study generate``: stream a video from a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mla_study.errors import UserError, counted, tell

if TYPE_CHECKING:
    from torch import Tensor

    from mla_study.config import ModelConfig
    from mla_study.model.transformer import WanTransformer
    from mla_study.rollout.setup import ModelChoice
    from mla_study.world.serving import WorldDecoder

_EXIT_INTERRUPTED = 130
_DEFAULT_FRAMES = 21
_OF_CLIPS = (
    "prompts", "out", "checkpoint", "preset", "variant", "weights", "lora", "embeddings", "seed",
    "fps", "batch", "dtype", "device", "threads", "upscale",
)  # fmt: skip
"""Options that suit clips whose frames are made at once."""


@dataclass(frozen=True)
class Generate:
    """Stream a video, chunk after chunk, at constant memory, into a file that plays as it grows.

    Without a checkpoint the trained miniature that the package carries makes it; it reads captions
    such as the example's. Ctrl-C finishes the chunk and closes the file; the same command with
    --resume goes on.

    Example: mla-study generate "fast red square moving right middle center on stripes" --seconds 30
    """

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """One prompt, or one a sample."""
    out: Path = Path("video.mp4")
    """.mp4, .webp, .gif, .png (or no suffix: a folder of frames), or .safetensors for latents."""
    checkpoint: str | None = None
    """Weights: original Wan, diffusers, Self-Forcing, or a folder of ours (default: the shipped
    miniature)."""
    random_weights: bool = False
    """A preset with random weights, to try shapes and speed."""
    preset: str | None = None
    """Model with --random-weights (default mini), or what a checkpoint without config is."""
    variant: Literal["teacher", "dense", "latent"] | None = None
    """Which miniature (default latent), or with --random-weights which self-attention; of a
    checkpoint, a check. The teacher makes clips of 12 frames at once, by many steps."""
    weights: str | None = None
    """Which dictionary of a PyTorch file, such as generator_ema."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An adapter to merge; may be repeated."""
    wan: Path | None = None
    """Wan folder with the VAE and the text encoder (default: the checkpoint's own; the miniature
    has the world's, or codec.safetensors beside its weights)."""
    embeddings: Path | None = None
    """Embeddings of the prompts, made by mla-study text encode, in place of the text encoder."""
    seed: int = 0
    """Noise of chunk n depends on (seed, n, sample) alone."""
    frames: int | None = None
    """Latent frames, rounded up to whole chunks (default 21)."""
    seconds: float | None = None
    """Length of the video instead of --frames; inf goes on until Ctrl-C."""
    fps: float | None = None
    """Frames a second of the video (default: the model's)."""
    size: str | None = None
    """HEIGHTxWIDTH of the latent (default: the model's, 60x104 for Wan)."""
    batch: int | None = None
    """Samples (default: one a prompt); each gets a file of its own."""
    prompt_at: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """CHUNK:PROMPT, a prompt switch at that chunk; may be repeated."""
    recache: bool = False
    """At a switch, recompute the cached frames' entries under the new prompt."""
    clean_pass: bool = True
    """Write cache entries by a last pass at t = 0; without, those of the last step stay."""
    window: str | None = None
    """sink,history,chunk in latent frames (default: the model's)."""
    positions: Literal["absolute", "relative"] | None = None
    """Temporal positions of keys (default: relative for latent attention and the miniature,
    absolute for dense Wan)."""
    storage: Literal["bf16", "fp16", "fp32", "fp64", "int8-channel", "int8-token"] | None = None
    """What the cache holds entries in (default: the model's dtype)."""
    dtype: Literal["bf16", "fp16", "fp32", "fp64"] | None = None
    """Of the weights (default: as stored, and fp32 for the miniature)."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""
    compile: bool = False
    """Compile the blocks once the window is full; the first such chunk waits for it."""
    graph: bool = False
    """Record the passes of a full window as CUDA graphs."""
    fp8: bool = False
    """Projections in fp8 (e4m3), on GPUs that have it; the video changes a little."""
    threads: int | None = None
    """Threads of torch on the CPU (default: its own choice, and one for the miniature)."""
    upscale: int | None = None
    """Side of the square that a pixel of the miniature is shown as (default: the least that makes
    240 pixels a side); 1 shows the pixels themselves."""
    resume: bool = False
    """Go on from the state saved beside --out; all else must be as it was."""
    save_every: int = 1
    """Chunks between saved states; 0 saves none."""

    def run(self) -> int:
        """Generate, and return the exit code."""
        import torch

        from mla_study.config import parse_window
        from mla_study.rollout.accelerate import Acceleration, accelerate
        from mla_study.rollout.record import record
        from mla_study.rollout.setup import (
            ModelChoice,
            choose_decoder,
            choose_encoder,
            parse_size,
            parse_switches,
        )
        from mla_study.rollout.sinks import check_place, kind_of
        from mla_study.rollout.stream import Rollout, RolloutConfig
        from mla_study.world.serving import default_prompts
        from mla_study.world.shipped import is_world
        from mla_study.world.text import CaptionEncoder

        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads is {self.threads}, but it must be at least 1")
        if self.save_every < 0:
            raise UserError(f"--save-every is {self.save_every}, but it must be 0 or more")
        switches = parse_switches(self.prompt_at)
        window = None if self.window is None else parse_window(self.window)
        size = None if self.size is None else parse_size(self.size)
        check_place(self.out)
        choice = ModelChoice(
            self.checkpoint, self.random_weights, self.preset,
            None if self.variant == "teacher" else self.variant,
            self.weights, self.lora, self.dtype, self.device,
        )  # fmt: skip
        model = self._model(choice)
        world = not self.random_weights and is_world(model.config)
        self._check_options(world)
        if self.threads or world:
            torch.set_num_threads(self.threads or 1)
        prompts: tuple[str, ...] = self.prompts or ("",)
        if world:
            prompts = default_prompts(self.seed, self.prompts)
            if not self.prompts:
                tell(f"no prompt was given: this is '{prompts[0]}'")
        if world and self.embeddings is None:
            encode = CaptionEncoder.of(model.config)
        else:
            encode = choose_encoder(model.config, choice, self.wan, self.embeddings, tell)
        video = self.fps if self.fps is not None else model.config.fps
        if not 0 < video <= 1000:
            raise UserError(f"--fps is {video}, but it must lie between 0 and 1000")
        if self.variant == "teacher":
            return self._clips(model, prompts, encode(prompts), video)
        predict = accelerate(model, Acceleration(self.compile, self.graph, self.fp8))
        rollout = Rollout(
            model,
            prompts,
            RolloutConfig(
                self.seed, self.batch, window, size, self.positions, self.storage,
                self.clean_pass, self.recache,
            ),
            prompt_at=switches,
            encode=encode,
            predict=predict,
        )  # fmt: skip
        size = rollout.config.size or model.config.latent_size
        pixels = kind_of(self.out) != "latents"
        facts: dict[str, object] = {"prompts": prompts, "prompt_at": switches}
        if world:
            decoder = self._decoder(model.config, size)
            fps = Fraction(video).limit_denominator(1001)
            facts["upscale"] = decoder.scale
        else:
            decoder, fps = choose_decoder(model.config, size, choice, self.wan, video, pixels, tell)
        chunks = self._chunks(rollout.window.chunk, video, model.config.codec_stride[0])
        made = record(
            rollout,
            self.out,
            decoder,
            fps,
            chunks=chunks,
            resume=self.resume,
            save_every=self.save_every,
            facts={"decoder": type(decoder).__name__, **facts},
            say=tell,
        )
        frames = counted(made.frames, "frame")
        length = f"{counted(made.chunks, 'chunk')}, {frames} ({float(made.frames / fps):.3g} s)"
        print(f"{', '.join(map(str, made.paths))}: {length}")
        if made.interrupted:
            done = counted(made.chunks, "chunk")
            tell(f"interrupted after {done}: the same command with --resume goes on")
            return _EXIT_INTERRUPTED
        return 0

    def _check_options(self, world: bool) -> None:
        """Refuse what has no meaning for the model that is at hand."""
        if self.upscale is not None and self.upscale < 1:
            raise UserError(f"--upscale is {self.upscale}, but it must be at least 1")
        if self.upscale is not None and not world:
            raise UserError("--upscale shows the pixels of the trained miniature: leave it out")
        if self.wan is not None and world:
            raise UserError("the miniature has words and a codec of its own: leave out --wan")
        if self.variant != "teacher":
            return
        if not world:
            raise UserError(
                "--variant teacher makes clips of the trained miniature: leave out --random-weights"
                if self.random_weights
                else f"{self.checkpoint} is no miniature: leave out --variant teacher"
            )
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if given and field.name not in _OF_CLIPS:
                option = field.name.replace("_", "-")
                raise UserError(
                    f"--variant teacher makes all frames of a short clip at once, which --{option} "
                    "does not suit: leave it out, or give --variant latent or dense, which stream"
                )

    def _model(self, choice: ModelChoice) -> WanTransformer:
        """What the choice names, or the shipped miniature where it names nothing."""
        from mla_study.rollout.setup import build_model, usable_device
        from mla_study.world.shipped import is_world, load_shipped

        if self.checkpoint is not None or self.random_weights:
            model = build_model(choice, tell)
            # kept in 16 bits for their size, and no faster in them on a CPU
            return model.float() if is_world(model.config) and self.dtype is None else model
        if self.preset not in (None, "mini") or self.wan is not None:
            raise UserError(
                f"weights of {self.preset or 'Wan'} are needed: give --checkpoint PATH, or "
                "--random-weights to try its shapes; without either the miniature runs"
            )
        if self.weights is not None or self.lora:
            raise UserError("--weights and --lora speak of a --checkpoint: give one")
        from mla_study.model.storage import DTYPES

        device = usable_device(self.device)
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        return load_shipped(self.variant or "latent").to(device, dtype)

    def _decoder(self, config: ModelConfig, size: tuple[int, int]) -> WorldDecoder:
        from mla_study.world.serving import WorldDecoder, codec_for, visible_scale

        return WorldDecoder(codec_for(config, self.checkpoint), self.upscale or visible_scale(size))

    def _clips(
        self, model: WanTransformer, prompts: tuple[str, ...], context: Tensor, video: float
    ) -> int:
        """Clips of the bidirectional teacher, a file a sample."""
        from mla_study.rollout.stream import SeededNoise
        from mla_study.rollout.video import VideoWriter
        from mla_study.world.serving import sample_clips

        config = model.config
        batch = len(prompts) if self.batch is None else self.batch
        if batch < 1:
            raise UserError(f"a batch of {batch} is none: give at least 1")
        decoder, fps = self._decoder(config, config.latent_size), Fraction(video)
        frames = decoder.codec.world.frames
        shape = (batch, config.in_channels, frames, *config.latent_size)
        latents = sample_clips(model, context, SeededNoise(self.seed, shape)(0, 0))
        writer = VideoWriter(self.out, decoder, fps.limit_denominator(1001), batch)
        writer.write(latents)
        writer.close(True)
        paths = ", ".join(map(str, writer.paths))
        print(f"{paths}: {counted(frames, 'frame')} ({frames / video:.3g} s)")
        return 0

    def _chunks(self, chunk: int, fps: float, stride: int) -> int | None:
        from mla_study.rollout.record import latent_frames
        from mla_study.rollout.stream import whole_chunks

        if self.frames is not None and self.seconds is not None:
            raise UserError("give --frames or --seconds, not both")
        if self.seconds is not None and math.isinf(self.seconds) and self.seconds > 0:
            return None
        frames = self.frames or _DEFAULT_FRAMES if self.frames != 0 else 0
        if self.seconds is not None:
            frames = latent_frames(self.seconds, fps, stride)
        chunks = whole_chunks(frames, chunk)
        if chunks * chunk != frames:
            tell(
                f"{counted(frames, 'latent frame')} made into {chunks * chunk}, "
                f"{counted(chunks, 'whole chunk')} of {chunk}"
            )
        return chunks
