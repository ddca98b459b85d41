"""Rotary embedding: interleaved pairs, uneven splits, band choice, positions of any size."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from mla_study.errors import UserError
from mla_study.model.rope import RotaryEmbedding, axis_pairs, inverse_frequencies


def by_hand(
    x: torch.Tensor, frames: list[int], height: int, width: int, rope: RotaryEmbedding
) -> torch.Tensor:
    """Pair by pair in complex Python numbers."""
    out = x.clone()
    full = axis_pairs(rope.head_dim)
    places = [(f, r, c) for f in frames for r in range(height) for c in range(width)]
    for token, place in enumerate(places):
        pair = 0
        for axis, count in enumerate(rope.pairs):
            for i in range(count):
                turn = cmath.exp(1j * place[axis] * rope.base ** (-i / full[axis]))
                for b in range(x.shape[0]):
                    for h in range(x.shape[2]):
                        z = complex(*x[b, token, h, 2 * pair : 2 * pair + 2].tolist()) * turn
                        out[b, token, h, 2 * pair] = z.real
                        out[b, token, h, 2 * pair + 1] = z.imag
                pair += 1
    return out


@pytest.mark.parametrize(
    ("head_dim", "kept", "base"),
    [
        (128, (6, 5, 5), 10000.0),
        (128, (1, 4, 2), 10000.0),
        (128, (0, 3, 0), 100.0),
        (32, None, 100.0),
        (22, None, 10000.0),
        (32, (2, 1, 1), 100.0),
    ],
)
def test_against_complex_numbers(
    head_dim: int, kept: tuple[int, int, int] | None, base: float, seed: int
) -> None:
    torch.manual_seed(seed)
    rope = RotaryEmbedding(head_dim, base, kept)
    frames = [4, 0, 9]
    x = torch.randn(2, 3 * 2 * 3, 2, 2 * sum(rope.pairs), dtype=torch.float64)
    mine = rope.table(frames, 2, 3, torch.float64).apply(x)
    assert (mine - by_hand(x, frames, 2, 3, rope)).abs().max() < 1e-12


def test_splits() -> None:
    assert axis_pairs(128) == (22, 21, 21)
    assert axis_pairs(32) == (6, 5, 5)
    assert axis_pairs(6) == (1, 1, 1)
    for size in (4, 7):
        with pytest.raises(UserError):
            axis_pairs(size)


def test_the_kept_pairs_are_the_first_of_each_axis() -> None:
    """A fresh embedding of 2k channels has other frequencies: an axis divides by its own count."""
    whole, part = RotaryEmbedding(128), RotaryEmbedding(128, kept=(6, 5, 5))
    frames = [0, 5, 17]
    wide, narrow = whole.angles(frames, 3, 4), part.angles(frames, 3, 4)
    columns = [*range(6), *range(22, 27), *range(43, 48)]
    assert torch.equal(narrow, wide[:, columns])
    fresh = RotaryEmbedding(32).angles(frames, 3, 4)
    assert (fresh - narrow).abs().max() > 0.1
    with pytest.raises(UserError):
        RotaryEmbedding(32, kept=(7, 5, 5))


def test_frequencies_fall_from_one() -> None:
    speeds = inverse_frequencies(22, 10000.0)
    assert speeds.dtype == torch.float64 and speeds[0] == 1
    assert speeds[-1].item() == pytest.approx(10000.0 ** (-21 / 22), rel=1e-14)


def test_far_frames_keep_their_angles() -> None:
    """Upstream's table ends at 1024 frames; float32 angles would be off by 0.06 at a million."""
    rope = RotaryEmbedding(128)
    table = rope.table([10**6 + 3], 1, 1)
    exact = [cmath.exp(1j * (10**6 + 3) * 10000.0 ** (-i / 22)) for i in range(22)]
    mine = table.cis[0, :22]
    assert max(abs(complex(a) - b) for a, b in zip(mine.tolist(), exact, strict=True)) < 1e-6


def test_scores_depend_on_the_distance_only(seed: int) -> None:
    torch.manual_seed(seed)
    rope = RotaryEmbedding(32)
    q, k = torch.randn(1, 6, 2, 32), torch.randn(1, 6, 2, 32)

    def scores(offset: int) -> torch.Tensor:
        turn = rope.table([offset, offset + 2], 1, 3, torch.float64)
        return torch.einsum("bqhd,bkhd->bhqk", turn.apply(q.double()), turn.apply(k.double()))

    assert (scores(0) - scores(123456)).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept_and_the_rotation_is_not_rounded(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    table = RotaryEmbedding(32).table(range(700, 703), 2, 2)
    x = torch.randn(1, 12, 1, 32).to(dtype)
    mine = table.apply(x)
    assert mine.dtype == dtype
    truth = RotaryEmbedding(32).table(range(700, 703), 2, 2, torch.float64).apply(x.double())
    assert (mine.double() - truth).abs().max() <= 8 * max(torch.finfo(dtype).eps, 1e-7)


def test_odd_strides_padding_and_gradient(seed: int) -> None:
    torch.manual_seed(seed)
    table = RotaryEmbedding(6).table([1, 2], 1, 1, torch.float64)
    wide = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    odd = wide[..., 1:]
    assert torch.equal(table.apply(odd), table.apply(odd.contiguous()))
    padded = torch.randn(1, 5, 1, 6, dtype=torch.float64)
    out = table.apply(padded)
    assert torch.equal(out[:, 2:], padded[:, 2:]) and not torch.equal(out[:, :2], padded[:, :2])
    leaf = torch.randn(1, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(table.apply, leaf)
    assert math.isclose(out[:, :2].norm().item(), padded[:, :2].norm().item())


def test_no_rotary_channels() -> None:
    table = RotaryEmbedding(32, kept=(0, 0, 0)).table(range(2), 2, 2)
    assert table.apply(torch.zeros(1, 8, 1, 0)).shape == (1, 8, 1, 0)
