"""The linear codec: the best of its kind, an exact pair, and a file that is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mla_study.config import mini
from mla_study.errors import UserError
from mla_study.world.codec import fit_codec, from_patches, load_codec, psnr_db, to_patches
from mla_study.world.render import render
from mla_study.world.scenes import World, sample_scenes

WORLD = World()


def test_patches_come_apart_and_together(seed: int) -> None:
    video = torch.rand((2, 3, 5, 8, 12), generator=torch.Generator().manual_seed(seed))
    patches = to_patches(video, 4)
    assert patches.shape == (2, 48, 5, 2, 3)
    assert torch.equal(from_patches(patches, 4), video)
    assert torch.equal(patches[1, :, 3, 1, 2], video[1, :, 3, 4:8, 8:12].flatten())


def test_latents_have_the_shape_that_the_miniature_reads(seed: int) -> None:
    latents = fit_codec(WORLD, clips=16).encode(render(sample_scenes(WORLD, 2, seed)))
    config = mini()
    assert latents.shape == (2, config.in_channels, 12, *config.latent_size)


def test_the_pair_is_exact_on_latents_and_near_on_clips(seed: int) -> None:
    codec = fit_codec(WORLD, clips=128, seed=seed)
    video = render(sample_scenes(WORLD, 32, seed, 1))
    latents = codec.encode(video)
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=3e-5, rtol=0)
    found = psnr_db(codec.decode(latents), video)
    assert found > 30 and abs(found - codec.psnr) < 1.0


def test_the_basis_is_that_of_numpys_svd(seed: int) -> None:
    codec = fit_codec(WORLD, clips=8, seed=seed)
    from mla_study.world.grammar import sample_captions

    scenes = sample_scenes(WORLD, 8, seed, 0, captions=sample_captions(8, seed))
    flat = to_patches(render(scenes), 4).transpose(0, 1).flatten(1).double().numpy()
    _, values, rows = np.linalg.svd((flat - flat.mean(1, keepdims=True)).T, full_matrices=False)
    told = codec.variance / codec.scale**2
    np.testing.assert_allclose(told, values[:16] ** 2 / flat.shape[1], rtol=1e-3)
    basis = codec.basis.double().numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(16), atol=1e-5)
    # the first four stand apart from each other: up to their sign they are the same
    np.testing.assert_allclose(abs((basis[:4] * rows[:4]).sum(1)), 1, atol=1e-3)


def test_latents_have_a_variance_of_one(seed: int) -> None:
    codec = fit_codec(WORLD, clips=128, seed=seed)
    latents = codec.encode(render(sample_scenes(WORLD, 128, seed, captions=None)))
    spread = latents.var(dim=(0, 2, 3, 4), correction=0)
    assert abs(float(codec.variance.mean()) - 1) < 1e-5
    assert abs(float(spread.mean()) - 1) < 0.1


def test_fitting_is_deterministic_and_follows_its_seed() -> None:
    one, two, other = (fit_codec(WORLD, clips=8, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.basis, two.basis) and not torch.equal(one.basis, other.basis)
    assert (one.basis.gather(1, one.basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_more_channels_lose_less() -> None:
    found = [fit_codec(WORLD, clips=8, channels=c).psnr for c in (4, 16, 47)]
    assert found == sorted(found)
    codec = fit_codec(WORLD, clips=8, channels=48)
    video = render(sample_scenes(WORLD, 1, 0))
    torch.testing.assert_close(codec.decode(codec.encode(video)), video, atol=1e-5, rtol=0)


def test_a_saved_codec_is_read_back(tmp_path: Path) -> None:
    codec = fit_codec(World(32, 6), clips=8, seed=5)
    codec.save(tmp_path / "codec.safetensors")
    held = load_codec(tmp_path / "codec.safetensors")
    assert (held.world, held.seed, held.psnr) == (codec.world, 5, codec.psnr)
    assert held.scale == codec.scale
    for name in ("basis", "mean", "variance"):
        assert torch.equal(getattr(held, name), getattr(codec, name))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    codec = fit_codec(WORLD, clips=2)
    with pytest.raises(UserError, match="8 channels do not fit a codec of 16"):
        codec.decode(torch.zeros(1, 8, 1, 6, 6))
    with pytest.raises(UserError, match="25 x 25 pixels do not split"):
        codec.encode(torch.zeros(1, 3, 1, 25, 25))
    with pytest.raises(UserError, match="49 channels"):
        fit_codec(WORLD, channels=49)
    with pytest.raises(UserError, match="0 clips"):
        fit_codec(WORLD, clips=0)
    with pytest.raises(UserError, match=r"none\.safetensors cannot be read"):
        load_codec(tmp_path / "none.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read as a codec"):
        load_codec(tmp_path / "junk")
    save_file({"basis": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is no codec of the world"):
        load_codec(tmp_path / "other.safetensors")
