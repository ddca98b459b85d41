"""The measure of steadiness tells steady from growing."""

from __future__ import annotations

import mmap
import time

import pytest
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mla_study.config import mini
from mla_study.errors import UserError
from mla_study.rollout.measure import resident_bytes, steadiness
from mla_study.rollout.stream import Chunk, Rollout, random_model


def test_a_rollout_is_steady() -> None:
    rollout = Rollout(random_model(mini(latent=True)), "a")
    found = steadiness(rollout, 60, 20, 20)
    assert rollout.next_chunk == 80
    assert found.first_seconds > 0 and found.last_seconds > 0
    assert found.rss_growth < 4 << 20
    assert found.cache_bytes == rollout.cache.nbytes


@pytest.mark.parametrize("latent", [False, True])
def test_a_chunk_costs_the_same_for_ever(latent: bool) -> None:
    """Counted, not timed: seconds are measured by the benchmark, on a quiet machine."""
    rollout = Rollout(random_model(mini(latent)), "a")
    chunks: list[list[tuple[int, ...]]] = []

    class Shapes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is F.scaled_dot_product_attention:
                chunks[-1] += [tuple(args[0].shape), tuple(args[1].shape)]
            return func(*args, **(kwargs or {}))

    for _ in range(30):
        chunks.append([])
        with Shapes():
            rollout.advance()
    full = -(-rollout.window.key_frames // rollout.window.chunk)
    assert chunks[0] != chunks[1] != chunks[full]
    assert all(chunk == chunks[full] for chunk in chunks[full:])


def test_growth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[mmap.mmap] = []  # pages of its own, where the heap may have free ones

    def slower(self: Rollout) -> Chunk | None:
        held.append(mmap.mmap(-1, 1 << 18))
        held[-1].write(b"x" * (1 << 18))
        until = time.process_time() + 1e-3 * (1 + len(held) / 20)
        while time.process_time() < until:
            pass
        return None

    monkeypatch.setattr(Rollout, "advance", slower)
    found = steadiness(Rollout(random_model(mini()), "a"), 40, 5, 10)
    assert found.ratio > 1.3
    assert found.rss_growth > 4 << 20
    assert resident_bytes() > 1 << 25
    with pytest.raises(UserError, match="two spans"):
        steadiness(Rollout(random_model(mini()), "a"), 19, 0, 10)
