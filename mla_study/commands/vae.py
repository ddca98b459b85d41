"""``mla-study vae``: latents to video and back by Wan's VAE, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mla_study.errors import UserError, counted


@dataclass(frozen=True)
class VaeDecode:
    """Decode a file of normalised latents into a video, PNG frames or an animation.

    Example: mla-study vae decode latents.safetensors --wan Wan2.1-T2V-1.3B --out video.mp4
    """

    latents: tyro.conf.Positional[Path]
    """A .pt, .pth or .safetensors file with one tensor of latents."""
    wan: Path = Path("Wan2.1-T2V-1.3B")
    """Folder of Wan2.1 in its original layout or that of diffusers, or the VAE itself (508 MB)."""
    out: Path = Path("video.mp4")
    """What to write: .mp4, .png or a folder, .webp, .gif."""
    fps: float = 16.0
    """Frames a second of the video."""
    chunk: int = 3
    """Latent frames decoded between two writes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the VAE; Wan uses float32."""
    device: str = "cpu"
    """Where the VAE runs: cpu, cuda, cuda:1."""

    def run(self) -> int:
        """Decode chunk after chunk."""
        if self.chunk < 1 or not self.fps > 0:
            raise UserError(f"--chunk {self.chunk} and --fps {self.fps} must be positive")
        from fractions import Fraction

        import torch
        from tqdm import tqdm

        from mla_study.model.codecs import load_vae
        from mla_study.rollout.latents import read_latents
        from mla_study.rollout.setup import usable_device
        from mla_study.rollout.sinks import check_place, kind_of
        from mla_study.rollout.video import VaeDecoder, VideoWriter

        if kind_of(self.out) == "latents":
            raise UserError(f"--out {self.out} asks for latents: give it .mp4, .png, .webp or .gif")
        latents = read_latents(self.latents).latents
        check_place(self.out)
        vae = load_vae(self.wan, getattr(torch, self.dtype), usable_device(self.device))
        fps = Fraction(self.fps).limit_denominator(1001)
        writer = VideoWriter(self.out, VaeDecoder(vae), fps, latents.shape[0])
        frames = 0
        try:
            with tqdm(total=latents.shape[2], unit="latent frame", disable=None) as bar:
                for piece in latents.split(self.chunk, dim=2):
                    frames += writer.write(piece)
                    bar.update(piece.shape[2])
        finally:
            # After an interruption too: what is there plays.
            writer.close(True)
        length = counted(frames, "frame")
        print(f"{', '.join(map(str, writer.paths))}: {length} at {float(fps):g} a second")
        return 0


@dataclass(frozen=True)
class VaeEncode:
    """Encode a video into normalised latents, 1 + 4 k of its frames.

    Example: mla-study vae encode clip.mp4 --wan Wan2.1-T2V-1.3B --out latents.safetensors
    """

    video: tyro.conf.Positional[Path]
    """Any video or animation that PyAV opens."""
    wan: Path = Path("Wan2.1-T2V-1.3B")
    """Folder of Wan2.1 in its original layout or that of diffusers, or the VAE itself (508 MB)."""
    out: Path = Path("latents.safetensors")
    """Latents [1, 16, f, h, w], float32, safetensors."""
    size: str | None = None
    """HEIGHTxWIDTH to scale and crop the frames to, such as 480x832 (default: crop to 16s)."""
    frames: int | None = None
    """Frames to take (default: all); what does not fill a latent frame is left out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the VAE; Wan uses float32."""
    device: str = "cpu"
    """Where the VAE runs: cpu, cuda, cuda:1."""

    def run(self) -> int:
        """Encode piece after piece."""
        if self.out.suffix != ".safetensors":
            raise UserError(f"--out {self.out}: latents are written as .safetensors")
        if self.frames is not None and self.frames < 1:
            raise UserError(f"--frames is {self.frames}, but it must be at least 1")
        import shutil

        import torch
        from tqdm import tqdm

        from mla_study.model.codecs import StreamingEncoder, load_vae
        from mla_study.rollout.clips import fitted, parse_size, read_clip
        from mla_study.rollout.setup import usable_device
        from mla_study.rollout.sinks import LatentSink, check_place

        size = None if self.size is None else parse_size(self.size)
        check_place(self.out)
        vae = load_vae(self.wan, getattr(torch, self.dtype), usable_device(self.device))
        encoder = StreamingEncoder(vae)
        sink, taken = LatentSink(self.out, {"source": self.video.name}), 0
        try:
            with tqdm(total=self.frames, unit="frame", disable=None) as bar:
                for piece in read_clip(self.video, self.frames):
                    made = encoder.encode(fitted(piece, size))
                    if made.shape[2]:
                        sink.write(made)
                    taken += piece.shape[1]
                    bar.update(piece.shape[1])
        except BaseException:
            shutil.rmtree(sink.folder, ignore_errors=True)
            raise
        sink.close(True)
        left = f", {encoder.waiting} at the end left out" if encoder.waiting else ""
        length = counted(sink.mark.frames, "latent frame")
        print(f"{self.out}: {length} of {counted(taken, 'frame')}{left}")
        return 0


@dataclass(frozen=True)
class Vae:
    """Wan's VAE: decode latents to video, encode video to latents.

    Example: mla-study vae decode latents.safetensors --wan Wan2.1-T2V-1.3B --out video.mp4
    """

    command: (
        Annotated[VaeDecode, tyro.conf.subcommand("decode")]
        | Annotated[VaeEncode, tyro.conf.subcommand("encode")]
    )

    def run(self) -> int:
        """Run the chosen command."""
        return self.command.run()
