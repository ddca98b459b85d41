"""A linear codec for the miniature: 4 x 4 patches of a frame to 16 channels, by PCA in closed form.

It stands where a VAE would: latents [B, 16, F, H/4, W/4] of clips [B, 3, F, H, W] in [-1, 1].
Channels are ordered by variance and not whitened; all share one scale, which makes their mean
variance 1.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.world.grammar import sample_captions
from mla_study.world.render import render
from mla_study.world.scenes import World, sample_scenes

PATCH = 4
CHANNELS = 16
_KIND = "mla_study world codec"
_PIECE = 64


@dataclass(frozen=True)
class Codec:
    """Orthonormal rows ``basis`` over the values of a patch (colour, row, column) about ``mean``.

    Latents are the components times ``scale``.
    ``variance`` is that of each latent channel over the clips it was fitted to; ``psnr`` is the
    reconstruction's on those, in dB, with a range of 2 between the darkest and lightest pixel.
    """

    basis: Float[Tensor, "C values"]
    mean: Float[Tensor, " values"]
    variance: Float[Tensor, " C"]
    psnr: float
    world: World
    seed: int
    scale: float = 1.0

    @property
    def patch(self) -> int:
        """Rows and columns of a patch."""
        return int((self.mean.shape[0] // 3) ** 0.5)

    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C F h w"]:
        """Latents of clips in [-1, 1].

        Raises:
            UserError: a frame whose sides are no multiples of the patch.
        """
        patches = to_patches(video, self.patch)
        basis, mean = self.basis.to(video), self.mean.to(video)
        centred = patches - mean[None, :, None, None, None]
        return torch.einsum("bvfhw,cv->bcfhw", centred, self.scale * basis)

    def decode(self, latents: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Clips of latents; pixels are not clamped, so that ``encode(decode(z))`` is z."""
        if latents.shape[1] != len(self.basis):
            raise UserError(
                f"latents of {latents.shape[1]} channels do not fit a codec of {len(self.basis)}"
            )
        basis, mean = self.basis.to(latents), self.mean.to(latents)
        patches = torch.einsum("bcfhw,cv->bvfhw", latents, basis / self.scale)
        return from_patches(patches + mean[None, :, None, None, None], self.patch)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, complete or not at all.

        Raises:
            UserError: it cannot be written.
        """
        from safetensors.torch import save_file

        from mla_study.study.runs import atomic_write

        facts = {
            "kind": _KIND,
            "world": json.dumps(asdict(self.world)),
            "psnr": repr(self.psnr),
            "seed": str(self.seed),
            "scale": repr(self.scale),
        }
        held = {"basis": self.basis, "mean": self.mean, "variance": self.variance}
        plain = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
        atomic_write(path, lambda to: save_file(plain, to, facts))


def load_codec(path: Path | str) -> Codec:
    """Read what :meth:`Codec.save` wrote.

    Raises:
        UserError: the file cannot be read or is no codec of the world.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("kind") != _KIND:
                raise UserError(f"{path} is no codec of the world: fit one and save it")
            basis, mean, variance = (
                file.get_tensor(name) for name in ("basis", "mean", "variance")
            )
        world = World(**json.loads(facts["world"]))
        psnr, seed = float(facts["psnr"]), int(facts["seed"])
        scale = float(facts["scale"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a codec ({error}): fit one and save it"
        ) from None
    shapes = basis.ndim, mean.ndim, variance.ndim
    if shapes != (2, 1, 1) or basis.shape != (len(variance), len(mean)):
        raise UserError(f"{path} holds tensors that do not fit together: fit a codec anew")
    return Codec(basis, mean, variance, psnr, world, seed, scale)


def fit_codec(
    world: World | None = None, clips: int = 512, seed: int = 0, channels: int = CHANNELS
) -> Codec:
    """The best linear codec of the world's clips: principal components of their patches.

    Args:
        clips: drawn by ``seed``, of all captions alike.
        channels: of the latents, at most 48.

    Raises:
        UserError: a size that is no multiple of 4, too few clips, or too many channels.
    """
    world = world or World()
    values = 3 * PATCH**2
    if not 1 <= channels <= values:
        raise UserError(f"a codec of {channels} channels is none: give 1 to {values}")
    if clips < 1:
        raise UserError(f"a codec cannot be fitted to {clips} clips: give at least 1")
    captions = sample_captions(clips, seed)
    total = torch.zeros(values, dtype=torch.float64)
    square = torch.zeros(values, values, dtype=torch.float64)
    count = 0
    for first in range(0, clips, _PIECE):
        told = captions[first : first + _PIECE]
        video = render(sample_scenes(world, len(told), seed, first, captions=told))
        flat = to_patches(video, PATCH).transpose(0, 1).flatten(1).double()
        total += flat.sum(1)
        square += flat @ flat.T
        count += flat.shape[1]
    mean = total / count
    variances, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
    basis = vectors.flip(1)[:, :channels].T
    # an eigenvector's sign is arbitrary: its largest entry is made positive
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis = basis * largest.sign()
    kept = variances.flip(0)
    lost = float(kept[channels:].clamp_min(0).sum() / values)
    psnr = 10 * torch.log10(torch.tensor(4 / max(lost, 1e-12), dtype=torch.float64)).item()
    power = float(kept[:channels].mean())
    return Codec(
        basis.float().contiguous(),
        mean.float(),
        (kept[:channels] / power).float().contiguous(),
        psnr,
        world,
        seed,
        power**-0.5,
    )


def psnr_db(made: Float[Tensor, "*any"], true: Float[Tensor, "*any"]) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    error = (made - true).double().square().mean().clamp_min(1e-12)
    return float(10 * torch.log10(4 / error))


def to_patches(video: Float[Tensor, "B 3 F H W"], patch: int) -> Float[Tensor, "B values F h w"]:
    """Values of each patch as channels, in the order colour, row, column.

    Raises:
        UserError: a frame whose sides are no multiples of the patch.
    """
    height, width = video.shape[3:]
    if height % patch or width % patch:
        raise UserError(
            f"frames of {height} x {width} pixels do not split into patches of {patch}: "
            f"give a world whose size is a multiple of {patch}"
        )
    split = video.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return split.permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)


def from_patches(
    patches: Float[Tensor, "B values F h w"], patch: int
) -> Float[Tensor, "B 3 F H W"]:
    """What :func:`to_patches` took apart."""
    split = patches.unflatten(1, (3, patch, patch)).permute(0, 1, 4, 5, 2, 6, 3)
    return split.flatten(5, 6).flatten(3, 4)
