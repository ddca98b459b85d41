"""Files of latents: read whatever holds them, know their scale, take them back from noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mla_study.commands.latents import LatentsDenoiseCheck, LatentsInfo
from mla_study.errors import UserError
from mla_study.rollout.latents import (
    WAN_MEAN,
    WAN_STD,
    channel_statistics,
    denoise_check,
    info_text,
    read_latents,
)


def smooth(frames: int = 16, channels: int = 16) -> torch.Tensor:
    """Latents [1, C, F, 4, 6] that change slowly in time, unit variance."""
    steps = torch.randn(1, channels, frames, 4, 6).cumsum(2)
    return (steps - steps.mean((0, 2, 3, 4), keepdim=True)) / steps.std(
        (0, 2, 3, 4), keepdim=True, correction=0
    )


def test_formats_and_orders(tmp_path: Path) -> None:
    x = smooth()
    save_file({"latents": x, "other": x[0, 0].clone()}, tmp_path / "a.safetensors")
    torch.save(x.bfloat16(), tmp_path / "a.pth")
    torch.save({"step": 3, "latents": x[0]}, tmp_path / "b.pt")
    torch.save(x.transpose(1, 2), tmp_path / "c.pt")
    torch.save(smooth(7).transpose(1, 2), tmp_path / "d.pt")
    assert torch.equal(read_latents(tmp_path / "a.safetensors").latents, x)
    assert read_latents(tmp_path / "a.pth").latents.dtype == torch.bfloat16
    assert read_latents(tmp_path / "b.pt").latents.shape == x.shape
    swapped = read_latents(tmp_path / "c.pt")
    assert torch.equal(swapped.latents, x) and swapped.order == "frames, channels"
    assert read_latents(tmp_path / "d.pt").latents.shape == (1, 16, 7, 4, 6)


def test_scale_is_recognised() -> None:
    x = smooth()
    std, mean = (torch.tensor(v).reshape(1, -1, 1, 1, 1) for v in (WAN_STD, WAN_MEAN))
    found = channel_statistics(x)
    assert found.scale == "normalised" and np.allclose(found.std, 1, atol=1e-5)
    raw = channel_statistics(x * std + mean)
    assert raw.scale == "raw" and np.allclose(raw.mean, WAN_MEAN, atol=1e-4)
    assert "8 channels" in channel_statistics(smooth(5, 8)).scale


@pytest.mark.parametrize("lookup", ["exact", "table"])
def test_true_flow_gives_the_latents_back(lookup: str) -> None:
    x = smooth()
    steps = denoise_check(x, lookup=lookup)  # type: ignore[arg-type]
    assert [s.timestep for s in steps] == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert max(s.error for s in steps) < 1e-6
    assert steps[0].snr_db == -np.inf
    assert steps[3].snr_db == pytest.approx(20 * np.log10(0.375 / 0.625), abs=1e-3)
    coarse = denoise_check(x.bfloat16())
    assert 1e-4 < max(s.stored_error for s in coarse) < 1e-2
    assert max(s.error for s in coarse) < 1e-6


def test_bad_files(tmp_path: Path) -> None:
    torch.save(torch.zeros(3, 3), tmp_path / "flat.pt")
    torch.save({"a": smooth(), "b": smooth()}, tmp_path / "two.pt")
    torch.save(smooth() * float("nan"), tmp_path / "nan.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in (
        "none.pt",
        "flat.pt",
        "two.pt",
        "nan.pt",
        "list.pt",
        "text.pth",
        "text.safetensors",
    ):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_latents(tmp_path / name)


def test_real_latents(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = assets / "latents" / "test_latents_wan.pth"
    file = read_latents(path)
    assert file.latents.shape == (1, 16, 16, 40, 64) and file.order == "channels, frames"
    assert channel_statistics(file.latents).scale == "normalised"
    assert "bfloat16" in info_text(file)
    assert LatentsInfo(path).run() == 0
    assert LatentsDenoiseCheck(path).run() == 0
    assert "good" in capsys.readouterr().out
