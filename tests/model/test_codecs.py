"""Streaming decode and encode against the installed class's own, on tiny random VAEs."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mla_study.commands.vae import Vae, VaeDecode, VaeEncode
from mla_study.errors import UserError
from mla_study.model.codecs import (
    StreamingDecoder,
    StreamingEncoder,
    denormalised,
    encode_video,
    from_uint8,
    load_vae,
    normalised,
    original_vae_name,
    to_uint8,
)
from mla_study.rollout.clips import read_clip

diffusers = pytest.importorskip("diffusers")

WAN_2_2 = {
    "is_residual": True,
    "z_dim": 5,
    "latents_mean": [0.1, -0.2, 0.3, 0.0, 0.5],
    "latents_std": [1.1, 0.9, 1.3, 2.0, 0.7],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "decoder_base_dim": 4,
}


def tiny_vae(seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLWan(**{"base_dim": 3, **changes}).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return vae


@pytest.fixture(scope="module")
def vae() -> Any:
    return tiny_vae(0)


def split(latents: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Pieces of these sizes, and what is left."""
    cuts = [min(sum(sizes[:i]), latents.shape[2]) for i in range(len(sizes) + 1)]
    return [latents[:, :, a:b] for a, b in zip(cuts, [*cuts[1:], latents.shape[2]], strict=True)]


@settings(max_examples=6)
@given(
    sizes=st.lists(st.integers(0, 3), max_size=4),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 2),
)
def test_chunks_equal_one_whole_decode(vae: Any, sizes: list[int], seed: int, batch: int) -> None:
    torch.manual_seed(seed)
    latents = torch.randn(batch, 16, 5, 3, 5)
    whole = vae.decode(denormalised(vae, latents)).sample
    decoder = StreamingDecoder(vae)
    for _ in range(2):
        frames = torch.cat([decoder.decode(piece) for piece in split(latents, sizes)], dim=2)
        assert frames.shape == (batch, 3, 17, 24, 40)
        torch.testing.assert_close(frames, whole, atol=1e-5, rtol=0)
        decoder.reset()


def test_two_streams_share_a_vae(vae: Any, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(2, 1, 16, 4, 3, 3)
    whole = [vae.decode(denormalised(vae, x)).sample for x in (a, b)]
    first, second = StreamingDecoder(vae), StreamingDecoder(vae)
    made: list[list[torch.Tensor]] = [[], []]
    for index in range(4):
        made[0].append(first.decode(a[:, :, index : index + 1]))
        made[1].append(second.decode(b[:, :, index : index + 1]))
        vae.decode(torch.randn(1, 16, 2, 3, 3))
    for pieces, expected in zip(made, whole, strict=True):
        torch.testing.assert_close(torch.cat(pieces, dim=2), expected, atol=1e-5, rtol=0)


def test_the_state_does_not_grow(vae: Any) -> None:
    decoder = StreamingDecoder(vae)
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    for _ in range(12):
        for _frames in decoder.frames(torch.randn(1, 16, 2, 2, 3)):
            pass
        held = sum(x.untyped_storage().nbytes() for x in decoder._cache if x is not None)
        assert decoder.nbytes == held
        seen.append((held, tracemalloc.get_traced_memory()[0]))
    tracemalloc.stop()
    assert len({held for held, _ in seen[2:]}) == 1
    assert seen[-1][1] - seen[4][1] < 20_000


def test_decoding_resumes_from_the_frames_before(vae: Any, seed: int) -> None:
    torch.manual_seed(seed)
    decoder = StreamingDecoder(vae)
    reach = decoder.context_frames
    latents = torch.randn(1, 16, reach + 9, 1, 1)
    whole = decoder.decode(latents)
    decoder.warm_up(latents[:, :, 5 : 5 + reach])
    tail = decoder.decode(latents[:, :, 5 + reach :])
    torch.testing.assert_close(tail, whole[:, :, -tail.shape[2] :], atol=1e-6, rtol=0)
    decoder.warm_up(latents[:, :, :2])
    torch.testing.assert_close(
        decoder.decode(latents[:, :, 2:4]), whole[:, :, 5:13], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("changes", [{}, WAN_2_2], ids=["wan2.1", "wan2.2"])
def test_encoding_in_pieces_equals_the_whole(changes: dict[str, Any], seed: int) -> None:
    vae = tiny_vae(1, **changes)
    torch.manual_seed(seed)
    factor = vae.config.scale_factor_spatial
    frames = torch.rand(2, 3, 13, factor, 3 * factor) * 2 - 1
    whole = normalised(vae, vae.encode(frames).latent_dist.mode())
    torch.testing.assert_close(encode_video(vae, frames), whole, atol=1e-5, rtol=0)
    encoder = StreamingEncoder(vae)
    pieces = [encoder.encode(piece) for piece in split(frames, [0, 3, 1, 6])]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-5, rtol=0)
    assert encoder.waiting == 0
    decoded = StreamingDecoder(vae).decode(whole)
    assert decoded.shape == frames.shape
    expected = vae.decode(denormalised(vae, whole)).sample
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)


def test_bytes_and_pixels() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(1, 2, 4, 32, 1).expand(-1, -1, -1, -1, 3)
    assert torch.equal(to_uint8(from_uint8(bytes_)), bytes_)
    assert to_uint8(
        torch.tensor([-1.5, 0.0, 9.0])[None, :, None, None, None]
    ).flatten().tolist() == [
        0,
        128,
        255,
    ]


def test_bad_input_is_told(vae: Any) -> None:
    decoder = StreamingDecoder(vae)
    with pytest.raises(UserError, match="takes \\[batch, 16"):
        decoder.decode(torch.zeros(1, 4, 1, 2, 2))
    decoder.decode(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(UserError, match="reset the decoder"):
        decoder.decode(torch.zeros(1, 16, 1, 2, 3))
    with pytest.raises(UserError, match="crop them to 16 x 8"):
        encode_video(vae, torch.zeros(1, 3, 1, 17, 8))
    with pytest.raises(UserError, match=r"7 frames.*such as 5"):
        encode_video(vae, torch.zeros(1, 3, 7, 8, 8))


def test_original_names_are_those_of_the_installed_converter() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        names = list(diffusers.AutoencoderKLWan().state_dict())
    original = {original_vae_name(name): name for name in names}
    assert len(original) == len(names) == 194
    assert convert_wan_vae_to_diffusers(dict(original)) == {name: name for name in names}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_both_layouts_load(vae: Any, layout: str, tmp_path: Path) -> None:
    state = vae.state_dict()
    if layout == "original":
        place = tmp_path / "Wan2.1_VAE.pth"
        torch.save({original_vae_name(k): v for k, v in state.items()}, place)
    else:
        vae.save_pretrained(tmp_path / "vae")
        place = tmp_path / "vae"
    for wan in (tmp_path, place):
        loaded = load_vae(wan)
        assert not loaded.training
        assert loaded.config.base_dim == 3
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    assert load_vae(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_weights_that_do_not_fit_are_told(vae: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Wan2\.1_VAE\.pth \(508 MB.*Wan-AI/Wan2\.1-T2V-1\.3B"):
        load_vae(tmp_path)
    state = {original_vae_name(k): v for k, v in vae.state_dict().items()}
    place = tmp_path / "Wan2.1_VAE.pth"
    for change, sentence in (
        ({"decoder.middle.0.residual.2.bias": None, "stray": torch.zeros(1)}, "missing.*'stray'"),
        ({"decoder.middle.0.residual.2.bias": torch.zeros(5)}, "config and weights disagree"),
        ({"conv2.bias": torch.full((16,), float("nan"))}, "'conv2.bias' holds NaN"),
        ({"encoder.conv1.weight": None}, "no VAE of Wan"),
        ({"conv2.weight": torch.zeros(48, 48, 1, 1, 1)}, "48 latent channels"),
    ):
        wrong = {k: v for k, v in (state | change).items() if v is not None}
        torch.save(wrong, place)
        with pytest.raises(UserError, match=sentence):
            load_vae(tmp_path)
    place.unlink()
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="holds no Wan VAE"):
        load_vae(tmp_path)
    torch.save(state, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="describes a AutoencoderKL, but"):
        load_vae(tmp_path)


@pytest.mark.assets
def test_real_latents_are_normalised(vae: Any, assets: Path) -> None:
    latents = torch.load(
        assets / "latents/test_latents_wan.pth", map_location="cpu", weights_only=True
    )
    assert latents.shape == (1, 16, 16, 40, 64)
    spread = latents.float().std(dim=(0, 2, 3, 4))
    assert spread.min() > 0.3 and spread.max() < 3
    assert abs(latents.float().mean()) < 0.2
    raw = denormalised(vae, latents)
    torch.testing.assert_close(normalised(vae, raw), latents.float(), atol=1e-5, rtol=1e-5)
    frames = StreamingDecoder(vae).decode(latents[:, :, :2, :4, :5])
    assert frames.shape == (1, 3, 5, 32, 40)


def test_the_commands_go_there_and_back(
    vae: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    vae.save_pretrained(tmp_path / "vae")
    torch.manual_seed(0)
    save_file({"latents": torch.randn(2, 16, 4, 2, 4)}, tmp_path / "a.safetensors")
    out = tmp_path / "v.mp4"
    assert Vae(VaeDecode(tmp_path / "a.safetensors", tmp_path, out)).run() == 0
    assert "13 frames at 16 a second" in capsys.readouterr().out
    back = tmp_path / "b.safetensors"
    clip = tmp_path / "v-1.mp4"
    assert Vae(VaeEncode(clip, tmp_path, back, frames=12)).run() == 0
    assert "3 latent frames of 12 frames, 3 at the end left out" in capsys.readouterr().out
    frames = from_uint8(next(read_clip(clip, 9)))
    expected = encode_video(vae, frames)
    torch.testing.assert_close(load_file(back)["latents"], expected, atol=1e-5, rtol=0)
    assert VaeEncode(clip, tmp_path, back, size="32x16", frames=1).run() == 0
    assert load_file(back)["latents"].shape == (1, 16, 1, 4, 2)
    for wrong, sentence in (
        (VaeDecode(tmp_path / "a.safetensors", tmp_path, back), "asks for latents"),
        (VaeDecode(tmp_path / "a.safetensors", tmp_path / "none", out), "holds no Wan VAE"),
        (VaeEncode(tmp_path / "a.safetensors", tmp_path, back), "cannot be read as a video"),
        (VaeEncode(clip, tmp_path, back, size="31x16"), "multiples of 16"),
    ):
        with pytest.raises(UserError, match=sentence):
            wrong.run()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
