"""Wan's VAE (diffusers' ``AutoencoderKLWan``) with decoding and encoding that go on chunk by chunk.

Shapes: B batch, C latent channels, f latent frames, h x w latent size, T frames, H x W pixels
(H = 8 h, W = 8 w, T = 1 + 4 (f - 1) for Wan2.1). Latents are normalised: what the transformer sees.
Pixels are RGB in [-1, 1].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mla_study.errors import UserError
from mla_study.model.wan_folder import VAE, fill, find, open_weights, read_config

# diffusers' names -> those of Wan2.1_VAE.pth, applied in order.
_ORIGINAL_NAMES = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"(resnets\.\d+|down_blocks\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(resnets\.\d+|down_blocks\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(resnets\.\d+|down_blocks\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(resnets\.\d+|down_blocks\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
)
_RESNETS = 3  # residual blocks at each size of the decoder, before its upsampler
_VECTOR = 16


def original_vae_name(name: str) -> str:
    """The name in ``Wan2.1_VAE.pth`` of a parameter of diffusers' ``AutoencoderKLWan``."""
    for pattern, replacement in _ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)

    def upsample(match: re.Match[str]) -> str:
        block, kind, index = int(match[1]), match[2], int(match[3])
        index = index if kind == "resnets" else _RESNETS
        return f".upsamples.{block * (_RESNETS + 1) + index}."

    return re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", upsample, name)


def load_vae(
    wan: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """The VAE of a Wan folder in either layout, in evaluation mode and without gradients.

    Args:
        wan: the folder, or the VAE's own file or folder.
        dtype: of the weights; Wan runs its VAE in float32.
        device: where it goes.

    Returns:
        ``diffusers.AutoencoderKLWan``.

    Raises:
        UserError: diffusers or the weights are absent, or the weights do not fit.
    """
    path = find(wan, VAE)
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError:
        raise UserError(
            "decoding and encoding video needs the package diffusers: pip install diffusers"
        ) from None
    source = open_weights(path)
    try:
        renamed = "decoder.conv1.weight" in source.tensors
        if path.is_dir():
            config = read_config(path, VAE)
        else:
            config = _implied_config(source.tensors, renamed, path)
        try:
            with torch.device("meta"):
                vae: Any = AutoencoderKLWan.from_config(config)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"{path} has a config that makes no VAE ({error}): replace it"
            ) from None
        names = {name: original_vae_name(name) if renamed else name for name in vae.state_dict()}
        fill(vae, source, names, dtype, device)
    finally:
        source.close()
    return vae.requires_grad_(False).eval()


def _implied_config(tensors: Any, renamed: bool, path: Path) -> dict[str, Any]:
    """The sizes that a bare file tells by its shapes; the rest is Wan2.1's."""
    try:
        first = tensors["encoder.conv1.weight" if renamed else "encoder.conv_in.weight"].shape
        decoder = tensors["decoder.head.0.gamma" if renamed else "decoder.norm_out.gamma"].shape
        latent = tensors["conv2.weight" if renamed else "post_quant_conv.weight"].shape
    except KeyError as error:
        raise UserError(f"{path} is no VAE of Wan: it has no tensor {error}") from None
    if latent[0] != 16:
        raise UserError(
            f"{path} is a VAE of {latent[0]} latent channels, but Wan2.1's has 16: "
            "one of another kind is read from a folder with its config.json"
        )
    return {"base_dim": first[0], "decoder_base_dim": decoder[0]}


def denormalised(vae: Any, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B C f h w"]:
    """What the decoder takes: latents * std + mean of the VAE's config, in the VAE's dtype."""
    mean, std = _statistics(vae, latents.device)
    return (latents.float() * std + mean).to(vae.dtype)


def normalised(vae: Any, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B C f h w"]:
    """The inverse of :func:`denormalised`, in float32."""
    mean, std = _statistics(vae, latents.device)
    return (latents.float() - mean) / std


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=device)
    mean, std = values.float()[..., None, None, None]
    return mean, std


def to_uint8(frames: Float[Tensor, "B 3 T H W"]) -> UInt8[Tensor, "B T H W 3"]:
    """Pixels in [-1, 1] to bytes, rounded; channels last, as video writers want them."""
    return frames.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1)


def from_uint8(frames: UInt8[Tensor, "B T H W 3"]) -> Float[Tensor, "B 3 T H W"]:
    """Bytes to pixels in [-1, 1], float32."""
    return frames.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)


class StreamingDecoder:
    """Latents in, chunk after chunk; the frames of one whole decode out.

    The causal convolutions' last inputs are kept between calls, so memory does not grow with the
    length: 3.8 GB at 480 x 832 in float32, half of it in bfloat16. The state is this object's own:
    several may share one VAE.

    Example::

        decoder = StreamingDecoder(load_vae("Wan2.1-T2V-1.3B"))
        for chunk in stream(model, prompts):
            video.write(to_uint8(decoder.decode(chunk.latents)))
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._convs = _causal_convolutions(vae.decoder)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next latent frame is the first of a video."""
        self._cache: list[Any] = [None] * len(self._convs)
        self._shape: tuple[int, ...] | None = None
        self.latent_frames = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the state that is kept between calls."""
        return sum(x.nbytes for x in self._cache if isinstance(x, Tensor))

    @property
    def context_frames(self) -> int:
        """Latent frames after which nothing earlier shows any more: enough for :meth:`warm_up`."""
        reach, rate = 0.0, 1
        for conv in self._convs:
            reach += (conv.kernel_size[0] - 1) / rate
            # A time convolution makes two frames of one, by twice the channels.
            rate *= 2 if conv.kernel_size == (3, 1, 1) else 1
        return math.ceil(reach) + 1

    def decode(self, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B 3 T H W"]:
        """The frames of the next ``f`` latent frames; 1 for the first of all, 4 for each other.

        Args:
            latents: normalised; f may be any number.

        Returns:
            RGB in [-1, 1], in the VAE's dtype.

        Raises:
            UserError: channels that are not the VAE's, or a size or batch that changes midway.
        """
        made = list(self.frames(latents))
        if made:
            return torch.cat(made, dim=2)
        factor = self.vae.config.scale_factor_spatial
        height, width = (factor * size for size in latents.shape[3:])
        empty = (latents.shape[0], 3, 0, height, width)
        return torch.zeros(empty, dtype=self.vae.dtype, device=self.vae.device)

    def frames(self, latents: Float[Tensor, "B C f h w"]) -> Iterator[Float[Tensor, "B 3 T H W"]]:
        """As :meth:`decode`, a latent frame at a time: no more than its pixels are held."""
        self._check(latents)
        for index in range(latents.shape[2]):
            yield self._frame(latents[:, :, index : index + 1])

    def warm_up(self, latents: Float[Tensor, "B C f h w"]) -> None:
        """Start in the midst of a video: take the frames before, without giving their pixels.

        With the last :attr:`context_frames` latent frames, or all there were if they are fewer,
        what follows equals the undisturbed decode.
        """
        self.reset()
        for _ in self.frames(latents):
            pass

    @torch.no_grad()
    def _frame(self, latent: Tensor) -> Tensor:
        vae = self.vae
        z = denormalised(vae, latent.to(vae.device))
        # A pointwise convolution on fewer positions than a vector holds rounds otherwise than the
        # whole decode's, and tiny latents would show it.
        copies = -(-_VECTOR // (z.shape[3] * z.shape[4]))
        z = vae.post_quant_conv(z.expand(-1, -1, copies, -1, -1))[:, :, :1]
        first = self.latent_frames == 0
        out = vae.decoder(z, feat_cache=self._cache, feat_idx=[0], first_chunk=first)
        self.latent_frames += 1
        patch = vae.config.patch_size
        if patch is not None:
            out = _unpatched(out, patch)
        return out.clamp(-1.0, 1.0)

    def _check(self, latents: Tensor) -> None:
        channels = self.vae.config.z_dim
        if latents.shape[1] != channels:
            raise UserError(
                f"latents of shape {list(latents.shape)} do not fit the VAE, which takes "
                f"[batch, {channels}, frames, height, width]"
            )
        shape = (latents.shape[0], *latents.shape[3:])
        if self._shape not in (None, shape):
            raise UserError(
                f"the stream has latents of [batch, height, width] {list(self._shape or ())}, and "
                f"now {list(shape)} come: reset the decoder first"
            )
        self._shape = shape


class StreamingEncoder:
    """Frames in, in pieces of any length; normalised latents (the posterior's mode) out."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._convs = len(_causal_convolutions(vae.encoder))
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next frame is the first of a video."""
        self._cache: list[Any] = [None] * self._convs
        self._rest: Tensor | None = None
        self._shape: tuple[int, ...] | None = None
        self._started = False

    @property
    def waiting(self) -> int:
        """Frames taken that do not fill a latent frame yet."""
        return 0 if self._rest is None else self._rest.shape[2]

    def encode(self, frames: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B C f h w"]:
        """Latents, in float32, of the latent frames that are now complete (f may be 0).

        The first frame makes one latent frame, then each four make one.

        Raises:
            UserError: height or width that the VAE does not divide, or that changes midway.
        """
        self._check(frames)
        if self._rest is not None:
            frames = torch.cat([self._rest, frames], dim=2)
        group = self.vae.config.scale_factor_temporal
        made: list[Tensor] = []
        start = 0
        while frames.shape[2] - start >= (group if self._started else 1):
            stop = start + (group if self._started else 1)
            made.append(self._group(frames[:, :, start:stop]))
            start, self._started = stop, True
        # A copy: a view would hold the whole piece.
        self._rest = frames[:, :, start:].clone()
        if made:
            return normalised(self.vae, torch.cat(made, dim=2))
        factor, channels = self.vae.config.scale_factor_spatial, self.vae.config.z_dim
        size = (frames.shape[3] // factor, frames.shape[4] // factor)
        return frames.new_zeros(frames.shape[0], channels, 0, *size, dtype=torch.float32)

    @torch.no_grad()
    def _group(self, frames: Tensor) -> Tensor:
        vae = self.vae
        x = frames.to(vae.device, vae.dtype)
        if vae.config.patch_size is not None:
            x = _patched(x, vae.config.patch_size)
        moments = vae.quant_conv(vae.encoder(x, feat_cache=self._cache, feat_idx=[0]))
        return moments[:, : vae.config.z_dim]

    def _check(self, frames: Tensor) -> None:
        factor = self.vae.config.scale_factor_spatial
        height, width = frames.shape[3:]
        if height % factor or width % factor:
            raise UserError(
                f"frames of {height} x {width} do not divide by the VAE's {factor}: crop them to "
                f"{height // factor * factor} x {width // factor * factor}"
            )
        shape = (frames.shape[0], height, width)
        if self._shape not in (None, shape):
            raise UserError(
                f"the stream has frames of [batch, height, width] {list(self._shape or ())}, and "
                f"now {list(shape)} come: reset the encoder first"
            )
        self._shape = shape


def encode_video(vae: Any, frames: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B C f h w"]:
    """Normalised latents of a whole clip of 1 + 4 k frames.

    Raises:
        UserError: another number of frames, or a size that the VAE does not divide.
    """
    encoder = StreamingEncoder(vae)
    latents = encoder.encode(frames)
    if encoder.waiting or not latents.shape[2]:
        group = vae.config.scale_factor_temporal
        raise UserError(
            f"a clip of {frames.shape[2]} frames does not fill latent frames: give 1 + {group} k "
            f"of them, such as {max(1, frames.shape[2] - encoder.waiting)}"
        )
    return latents


def _causal_convolutions(module: Any) -> list[Any]:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [m for m in module.modules() if isinstance(m, WanCausalConv3d)]


def _patched(x: Tensor, size: int) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    return patchify(x, patch_size=size)


def _unpatched(x: Tensor, size: int) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    return unpatchify(x, patch_size=size)
