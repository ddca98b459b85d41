"""A model, a text encoder and a decoder from what the command line names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mla_study.config import ModelConfig, preset
from mla_study.errors import UserError
from mla_study.model.storage import DTYPES
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.prompts import UMT5_WIDTH, Encoder, stand_in
from mla_study.rollout.stream import random_model
from mla_study.rollout.video import Decoder, PreviewDecoder, VaeDecoder

Variant = Literal["dense", "latent"]
Say = Callable[[str], object]


@dataclass(frozen=True)
class ModelChoice:
    """Which model: a checkpoint, or a preset with random weights."""

    checkpoint: str | None = None
    random_weights: bool = False
    preset: str | None = None
    variant: Variant | None = None
    weights: str | None = None
    lora: tuple[str, ...] = ()
    dtype: str | None = None
    device: str = "cpu"


def build_model(choice: ModelChoice, say: Say) -> WanTransformer:
    """The model, in eval mode.

    Raises:
        UserError: neither or both of a checkpoint and random weights, or a checkpoint of another
            variant than the one asked for.
    """
    if (choice.checkpoint is None) != choice.random_weights:
        raise UserError(
            "give --checkpoint PATH, or --random-weights with a --preset: one of the two"
        )
    device = usable_device(choice.device)
    dtype = None if choice.dtype is None else DTYPES[choice.dtype]
    if choice.checkpoint is None:
        latent = choice.variant != "dense"
        config = preset(choice.preset or "mini", latent)
        say(f"random weights: the video of this {config.name} model shows nothing but its noise")
        return random_model(config).to(device, dtype)
    from mla_study.checkpoints.wan.load import load_model

    config = None if choice.preset is None else preset(choice.preset, choice.variant == "latent")
    notes: list[str] = []
    model = load_model(
        choice.checkpoint, config, dtype, choice.weights, choice.lora, device, notes=notes
    )
    for note in notes:
        say(note)
    found: Variant = "dense" if model.config.latent is None else "latent"
    if choice.variant not in (None, found):
        raise UserError(
            f"{choice.checkpoint} holds a {found} model, but --variant {choice.variant} was given: "
            "leave it out, or convert the checkpoint by mla-study latentize"
        )
    return model


def usable_device(name: str) -> torch.device:
    """The device; UserError where torch does not know it or sees none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device '{name}': give cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device names a GPU, but torch sees none: use --device cpu")
    return device


def choose_encoder(
    config: ModelConfig, choice: ModelChoice, wan: Path | None, embeddings: Path | None, say: Say
) -> Encoder:
    """The file of embeddings, Wan's encoder for a model that reads its width, or the stand-in."""
    if embeddings is not None:
        from mla_study.model.embeddings import Embeddings

        return Embeddings(embeddings).batch
    if config.text_dim == UMT5_WIDTH and (wan is not None or not choice.random_weights):
        return _umt5(wan or Path(choice.checkpoint or "."), choice.device, say)
    say(
        "no text encoder is at hand: each word stands for a random vector of its own, so that "
        "prompts differ but mean nothing"
    )
    return stand_in(config)


def _umt5(folder: Path, device: str, say: Say) -> Encoder:
    from mla_study.model.text import load_text_encoder
    from mla_study.model.wan_folder import TEXT_ENCODER, find

    find(folder, TEXT_ENCODER)

    def encode(prompts: Sequence[str]) -> Tensor:
        # loaded for each call and let go: it is larger than the video model
        encoder = load_text_encoder(folder, device=device)
        made = encoder.encode_prompts(list(prompts)).cpu()
        for note in encoder.notes:
            say(note)
        return made

    return encode


def choose_decoder(
    config: ModelConfig,
    size: tuple[int, int],
    choice: ModelChoice,
    wan: Path | None,
    fps: float,
    pixels: bool,
    say: Say,
) -> tuple[Decoder, Fraction]:
    """Wan's VAE where a folder has one, else the preview; and the frames a second that it gives.

    Args:
        size: (height, width) of the latent.
        wan: folder that must hold the VAE; None looks beside the checkpoint.
        fps: of the true video; the preview has one frame a latent frame.
        pixels: False where only latents are written, and nothing is decoded.
    """
    from mla_study.model.codecs import load_vae
    from mla_study.model.wan_folder import VAE, find

    video, stride = Fraction(fps).limit_denominator(1001), config.codec_stride[0]
    if not pixels:
        return PreviewDecoder(config, size), video / stride
    if wan is not None:
        return VaeDecoder(load_vae(wan, device=choice.device)), video
    if choice.checkpoint is not None and Path(choice.checkpoint).is_dir():
        try:
            find(choice.checkpoint, VAE)
        except UserError:
            pass
        else:
            return VaeDecoder(load_vae(choice.checkpoint, device=choice.device)), video
    preview = PreviewDecoder(config, size)
    say(preview.note)
    return preview, video / stride


def parse_size(text: str) -> tuple[int, int]:
    """``HEIGHTxWIDTH`` of the latent."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--size {text}: give HEIGHTxWIDTH of the latent, such as 60x104") from None
    return height, width


def parse_switches(texts: Sequence[str]) -> dict[int, str]:
    """``CHUNK:PROMPT`` of each prompt switch."""
    switches: dict[int, str] = {}
    for text in texts:
        head, colon, prompt = text.partition(":")
        if not colon or not head.strip().isdigit():
            raise UserError(f"--prompt-at {text}: give CHUNK:PROMPT, such as 40:'a blue disc'")
        if int(head) in switches:
            raise UserError(f"--prompt-at names chunk {int(head)} twice")
        switches[int(head)] = prompt.strip()
    return switches
