"""Training data by name: the world, a folder of videos, prompts alone, or an LMDB of trajectories.

Finite data are shuffled anew for each epoch, by the seed; sample n follows from (data, seed, n).

Shapes: T text tokens, E text channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.rollout.prompts import UMT5_WIDTH, Encoder
from mla_study.training.batch import Batch, Data
from mla_study.training.data.captions import Check, read_folder, read_prompts
from mla_study.training.data.ode_pairs import OdePairs
from mla_study.training.data.order import place
from mla_study.training.data.texts import Rows, Texts, fingerprint, ready
from mla_study.training.data.videos import CACHE, ClipEncoder, Shot, VideoFolder, kept_in
from mla_study.training.data.world_data import WorldData
from mla_study.world.codec import Codec


@dataclass(frozen=True)
class Prompts:
    """Captions without videos."""

    captions: Sequence[str]
    encode: Encoder
    seed: int = 0

    @property
    def null(self) -> Float[Tensor, "1 T E"]:
        """The empty prompt."""
        return self.encode([""]).float()

    def batch(self, samples: Sequence[int]) -> Batch:
        """The prompts with these numbers."""
        count = len(self.captions)
        told = tuple(self.captions[place(n, count, self.seed)] for n in samples)
        return Batch(self.encode(told).float(), None, told)

    def facts(self) -> dict[str, Any]:
        """Number and hash of the prompts."""
        digest = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()
        held = {"prompts": len(self.captions), "sha256": digest}
        return {"kind": "prompts", "seed": self.seed, **held}


def world_data(
    config: ModelConfig, seed: int, captions_only: bool = False, frames: int | None = None
) -> WorldData:
    """Clips of the world at a model's size, coded by the shipped codec where it fits.

    Args:
        frames: of a clip; None: as many as the world's.

    Raises:
        UserError: a model that does not read the world's captions or latents.
    """
    from mla_study.world.text import CaptionEncoder

    codec = _world_codec(config)
    world = codec.world if frames is None else replace(codec.world, frames=frames)
    return WorldData(world, codec, CaptionEncoder.of(config), seed, captions_only)


def _world_codec(config: ModelConfig) -> Codec:
    from mla_study.world.codec import PATCH
    from mla_study.world.shipped import world_codec

    height, width = config.latent_size
    if height != width or config.codec_stride != (1, PATCH, PATCH):
        raise UserError(
            f"model '{config.name}' has latents of {height} x {width} at stride "
            f"{config.codec_stride}, but the world is square and its codec's is (1, 4, 4): give "
            "--data a folder of videos"
        )
    return world_codec(width)


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
    captions_only: bool = False,
    fps: float | None = None,
    max_bad: float = 0.05,
    cache: Path | None = None,
) -> Data:
    """The data that a command line names.

    Args:
        name: ``world``, a folder of videos, a file of prompts, or a folder with an LMDB.
        frames: latent frames of a clip.
        encode: text encoder; None: the world's for models that read captions of the world, else
            the one in ``wan``.
        wan: folder of Wan with the VAE and the text encoder.
        captions_only: of the world, leave the clips out.
        fps: at which videos are sampled; None: the model's.
        max_bad: share of videos that may be of no use.
        cache: folder for latents and text embeddings; None: ``.mla_study`` beside the data.

    Raises:
        UserError: there is nothing of that name, or it does not fit.
    """
    if name == "world":
        return world_data(config, seed, captions_only, frames)
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"--data {name} is not there: give world, a folder of videos, a file of prompts, or a "
            "folder with an LMDB"
        )
    stride = config.codec_stride
    cache = cache or (path if path.is_dir() else path.parent) / CACHE
    told, check = (encode, None) if encode else _text_encoder(config, wan, device, cache, say)
    if path.is_file():
        prompts = read_prompts(path, check)
        return Prompts(prompts, ready(told, prompts), seed)
    if path.suffix == ".lmdb" or any(path.glob("**/data.mdb")):
        shape = (config.in_channels, frames, *config.latent_size)
        return OdePairs(path, told, shape, seed)
    clips = read_folder(path, check)
    height, width = config.latent_size
    shot = Shot(
        1 + (frames - 1) * stride[0], (height * stride[1], width * stride[2]), fps or config.fps
    )
    make, facts = _clip_encoder(config, wan, device)
    told = ready(told, [clip.caption for clip in clips])
    held = VideoFolder(clips, path, cache, told, shot, make, facts, seed, max_bad, say)
    held.prepare()
    return held


def _text_encoder(
    config: ModelConfig,
    wan: Path | None,
    device: str,
    cache: Path,
    say: Callable[[str], object],
) -> tuple[Encoder, Check | None]:
    """The encoder, and what refuses a caption that it cannot read."""
    from mla_study.world.shipped import is_world

    if is_world(config):
        from mla_study.world.grammar import parse_caption
        from mla_study.world.text import CaptionEncoder

        return CaptionEncoder.of(config), parse_caption
    if config.text_dim != UMT5_WIDTH:
        from mla_study.rollout.setup import ModelChoice, choose_encoder

        return choose_encoder(config, ModelChoice(device=device), wan, None, say), None
    if wan is None:
        raise UserError(
            "captions are embedded by Wan's text encoder: give --wan, a folder of Wan2.1 (11.4 GB)"
        )
    folder = wan

    def make() -> Rows:
        from mla_study.model.text import load_text_encoder

        encoder = load_text_encoder(folder, device=device, text_len=config.text_len)

        def rows(prompts: Sequence[str]) -> list[Tensor]:
            made = encoder.rows(prompts)
            while encoder.notes:
                say(encoder.notes.pop())
            return made

        return rows

    from mla_study.model.text import needs_ftfy
    from mla_study.model.wan_folder import TEXT_ENCODER, find

    facts = {
        "encoder": fingerprint(find(wan, TEXT_ENCODER)),
        "text_len": config.text_len,
        "ftfy": not needs_ftfy("é"),
    }
    return Texts(kept_in(cache, "texts", facts), config.text_len, make), None


def _clip_encoder(
    config: ModelConfig, wan: Path | None, device: str
) -> tuple[Callable[[], ClipEncoder], dict[str, Any]]:
    if config.codec_stride[0] == 1:
        codec = _world_codec(config)
        digest = hashlib.sha256(repr(codec.scale).encode())
        for tensor in (codec.basis, codec.mean):
            digest.update(tensor.numpy().tobytes())
        return lambda: codec.encode, {"codec": "world", "sha256": digest.hexdigest()}
    if wan is None:
        raise UserError("videos are encoded by Wan's VAE: give --wan, a folder of Wan2.1 (508 MB)")
    folder = wan

    def make() -> ClipEncoder:
        from mla_study.model.codecs import encode_video, load_vae

        vae = load_vae(folder, device=device)
        return lambda pixels: encode_video(vae, pixels)

    from mla_study.model.wan_folder import VAE, find

    return make, {"codec": "wan", "sha256": fingerprint(find(wan, VAE))}
