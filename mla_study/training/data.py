"""Training data by name: the miniature world, a folder of videos, or prompts alone.

Finite data are shuffled anew for each epoch, by the seed; sample n follows from (data, seed, n).

Shapes: C latent channels, F latent frames, h x w latent, T text tokens, E text channels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.rollout.clips import fitted, read_clip
from mla_study.rollout.prompts import Encoder, philox
from mla_study.study.runs import atomic_write, file_sha256
from mla_study.training.batch import Batch, Data
from mla_study.training.captions import Captioned, read_folder, read_prompts
from mla_study.training.world_data import WorldData

CACHE = ".mla_study"
"""Folder inside a folder of videos that holds their latents."""


ClipEncoder = Callable[[Tensor], Tensor]
"""A clip [1, 3, n, H, W] in [-1, 1] to latents [1, C, F, h, w]."""


def place(sample: int, count: int, seed: int) -> int:
    """Which of ``count`` items a sample is: a permutation an epoch."""
    epoch, at = divmod(sample, count)
    return int(_order(count, seed, epoch)[at])


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return philox("order", seed, epoch).permutation(count)


@dataclass(frozen=True)
class Prompts:
    """Captions without videos."""

    captions: Sequence[str]
    encode: Encoder
    seed: int = 0

    @property
    def null(self) -> Float[Tensor, "1 T E"]:
        """The empty prompt."""
        return self.encode([""])

    def batch(self, samples: Sequence[int]) -> Batch:
        """The prompts with these numbers."""
        count = len(self.captions)
        told = tuple(self.captions[place(n, count, self.seed)] for n in samples)
        return Batch(self.encode(told), None, told)

    def facts(self) -> dict[str, Any]:
        """Number and hash of the prompts."""
        digest = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()
        held = {"prompts": len(self.captions), "sha256": digest}
        return {"kind": "prompts", "seed": self.seed, **held}


@dataclass
class VideoFolder:
    """Videos with captions; latents are made once and kept inside the folder.

    Attributes:
        frames: video frames of a clip, its first ones.
        size: (height, width) in pixels.
        make: encoder of clips, asked for only where latents are missing.
        made_by: plain values that identify the encoder.
        max_bad: share of videos that may fail to decode (one always may).
        bad: reasons of those that did, by file name.
    """

    clips: Sequence[Captioned]
    folder: Path
    encode: Encoder
    frames: int
    size: tuple[int, int]
    make: Callable[[], ClipEncoder]
    made_by: dict[str, Any]
    seed: int = 0
    max_bad: float = 0.05
    say: Callable[[str], object] = print
    bad: dict[str, str] = field(default_factory=dict)
    _kept: list[tuple[Path, str]] = field(default_factory=list)

    def prepare(self, progress: bool = True) -> None:
        """Make what latents are missing; the same call goes on after an interruption.

        Raises:
            UserError: too many videos that do not decode, or are too short (the first is named).
        """
        from tqdm import tqdm

        self._kept.clear()
        encoder: ClipEncoder | None = None
        for clip in tqdm(self.clips, desc="latents", unit="video", disable=not progress):
            target = self._place(clip)
            if not target.exists():
                try:
                    pixels = self._read(clip.video)
                except UserError as error:
                    self._fail(clip, error)
                    continue
                encoder = encoder or self.make()
                latents = encoder(pixels)
                self._write(target, latents)
            self._kept.append((target, clip.caption))
        if self.bad:
            names = ", ".join(list(self.bad)[:8])
            self.say(f"{len(self.bad)} of {len(self.clips)} videos were skipped: {names}")
        if not self._kept:
            raise UserError(
                f"{self.folder}: no video could be used: {next(iter(self.bad.values()))}"
            )

    def _fail(self, clip: Captioned, error: UserError) -> None:
        self.bad[clip.video.name] = str(error)
        if len(self.bad) > max(1, int(self.max_bad * len(self.clips))):
            raise UserError(
                f"{len(self.bad)} of {len(self.clips)} videos cannot be used, more than "
                f"{self.max_bad:.0%}: {error} (and {', '.join(list(self.bad)[:6])})"
            ) from None

    def _read(self, video: Path) -> Float[Tensor, "1 3 n H W"]:
        pieces = [fitted(piece, self.size) for piece in read_clip(video, self.frames)]
        pixels = torch.cat(pieces, dim=2)
        if pixels.shape[2] < self.frames:
            raise UserError(
                f"{video.name} has {pixels.shape[2]} frames, but a clip needs {self.frames}"
            )
        return pixels

    def _place(self, clip: Captioned) -> Path:
        facts = [self.frames, list(self.size), sorted(self.made_by.items())]
        kind = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        return self.folder / CACHE / kind / f"{file_sha256(clip.video)}.safetensors"

    def _write(self, target: Path, latents: Tensor) -> None:
        from safetensors.torch import save_file

        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, lambda path: save_file({"latents": latents[0].contiguous()}, path))

    @property
    def null(self) -> Float[Tensor, "1 T E"]:
        """The empty prompt."""
        return self.encode([""])

    def batch(self, samples: Sequence[int]) -> Batch:
        """The clips with these numbers; :meth:`prepare` first."""
        from safetensors.torch import load_file

        chosen = [self._kept[place(n, len(self._kept), self.seed)] for n in samples]
        latents = torch.stack([load_file(path)["latents"].float() for path, _ in chosen])
        told = tuple(caption for _, caption in chosen)
        return Batch(self.encode(told), latents, told)

    def facts(self) -> dict[str, Any]:
        """Hash over the clips and captions that are used, and how they were encoded."""
        held = "\n".join(f"{path.stem} {caption}" for path, caption in self._kept)
        digest = hashlib.sha256(held.encode()).hexdigest()
        size = list(self.size)
        facts = {"clips": len(self._kept), "sha256": digest, "frames": self.frames, "size": size}
        return {"kind": "videos", "seed": self.seed, **facts, "encoder": dict(self.made_by)}


def world_data(
    config: ModelConfig, seed: int, frames: int | None = None, captions_only: bool = False
) -> WorldData:
    """Clips of the world at a model's size, coded by the shipped codec where it fits.

    Args:
        frames: of a clip; None: as the world has them.

    Raises:
        UserError: a model that does not read the world's captions or latents.
    """
    from mla_study.world.codec import PATCH
    from mla_study.world.shipped import world_codec
    from mla_study.world.text import CaptionEncoder

    height, width = config.latent_size
    if height != width or config.codec_stride != (1, PATCH, PATCH):
        raise UserError(
            f"model '{config.name}' has latents of {height} x {width} at stride "
            f"{config.codec_stride}, but the world is square and its codec's is (1, 4, 4): give "
            "--data a folder of videos"
        )
    codec = world_codec(width)
    world = codec.world if frames is None else replace(codec.world, frames=frames)
    return WorldData(world, codec, CaptionEncoder.of(config), seed, captions_only)


def open_data(
    name: str,
    config: ModelConfig,
    seed: int,
    *,
    frames: int,
    encode: Encoder | None = None,
    wan: Path | None = None,
    device: str = "cpu",
    say: Callable[[str], object] = print,
) -> Data:
    """The data that a command line names: ``world``, a folder of videos, or a file of prompts.

    Args:
        frames: latent frames of a clip.
        encode: text encoder; None: the world's for models that read captions of the world, else
            the one in ``wan``.
        wan: folder of Wan with the VAE and the text encoder.

    Raises:
        UserError: there is nothing of that name, or it does not fit.
    """
    if name == "world":
        return world_data(config, seed, frames)
    path = Path(name)
    if not path.exists():
        raise UserError(f"--data {name}: give world, a folder of videos, or a file of prompts")
    if (path.is_dir() and path.suffix == ".lmdb") or (path / "data.mdb").exists():
        raise UserError(
            f"{name} is an LMDB of ODE pairs, which no objective here reads: give videos, or a "
            "file of its prompts for distribution_matching"
        )
    told = encode or _text_encoder(config, wan, device, say)
    if path.is_file():
        return Prompts(read_prompts(path), told, seed)
    stride = config.codec_stride
    pixels = 1 + (frames - 1) * stride[0]
    size = (config.latent_size[0] * stride[1], config.latent_size[1] * stride[2])
    make, facts = _clip_encoder(config, wan, device)
    held = VideoFolder(read_folder(path), path, told, pixels, size, make, facts, seed, say=say)
    held.prepare()
    return held


def _text_encoder(
    config: ModelConfig, wan: Path | None, device: str, say: Callable[[str], object]
) -> Encoder:
    from mla_study.rollout.setup import ModelChoice, choose_encoder

    return choose_encoder(config, ModelChoice(device=device), wan, None, say)


def _clip_encoder(
    config: ModelConfig, wan: Path | None, device: str
) -> tuple[Callable[[], ClipEncoder], dict[str, Any]]:
    if config.codec_stride[0] == 1:
        data = world_data(config, 0)
        return lambda: data.codec.encode, {"codec": "world", "seed": data.codec.seed}
    if wan is None:
        raise UserError("videos are encoded by Wan's VAE: give --wan, a folder of Wan2.1 (508 MB)")
    folder = wan

    def make() -> ClipEncoder:
        from mla_study.model.codecs import encode_video, load_vae

        vae = load_vae(folder, device=device)
        return lambda pixels: encode_video(vae, pixels).cpu()

    return make, {"codec": "wan"}
