"""int8 cache entries: error, scales that fit their data, and what cannot be kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla_study.model.quantize import Scheme, dequantize, quantize, scale_shape

SCHEMES: list[Scheme] = ["token", "channel"]


def back(values: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return dequantize(quantize(values, scheme), torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(
    frames=st.integers(1, 3),
    tokens=st.integers(1, 7),
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    power=st.integers(-30, 30),
    draw=st.integers(0, 2**31),
)
def test_error_is_half_a_step(
    scheme: Scheme, frames: int, tokens: int, channels: list[int], power: int, draw: int
) -> None:
    make = torch.Generator().manual_seed(draw)
    values = torch.randn(2, frames, tokens, *channels, generator=make) * 10.0**power
    packed = quantize(values, scheme)
    assert packed.data.dtype == torch.int8
    assert packed.scales.shape == scale_shape(tuple(values.shape), scheme)
    step = packed.scales.float()
    assert ((back(values, scheme) - values).abs() <= 0.5001 * step).all()
    axes = tuple(range(3, values.ndim)) if scheme == "token" else (2,)
    largest = values.abs().amax(axes, keepdim=True) / 127
    # no value is clipped, and no scale is more than a bfloat16 step too large
    assert (step >= largest).all() and (step <= largest * (1 + 2**-7)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_normal_entries(scheme: Scheme, seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(1, 2, 300, 192)
    error = (back(values, scheme) - values).norm() / values.norm()
    assert 0.004 < error < 0.009
    # a channel of its own size costs the per-token scheme, not the other
    values[..., 0] *= 50
    small = (back(values, scheme) - values)[..., 1:].norm() / values[..., 1:].norm()
    assert (small < 0.01) == (scheme == "channel")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_and_poison(scheme: Scheme) -> None:
    values = torch.randn(1, 1, 4, 3)
    values[0, 0, 1] = 0
    values[..., 2] = 0
    assert (back(values, scheme)[0, 0, 1] == 0).all() and (back(values, scheme)[..., 2] == 0).all()
    for poison in (torch.nan, torch.inf):
        bad = values.clone()
        bad[0, 0, 3, 0] = poison
        got = back(bad, scheme)
        assert got[0, 0, 3, 0].isnan()
        assert got[0, 0, 0, 1].isfinite()
    assert back(torch.zeros(1, 2, 3, 0), scheme).shape == (1, 2, 3, 0)
