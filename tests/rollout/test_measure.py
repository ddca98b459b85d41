"""The measure of steadiness tells steady from growing."""

from __future__ import annotations

import mmap
import time

import pytest

from mla_study.config import mini
from mla_study.errors import UserError
from mla_study.rollout.measure import resident_bytes, steadiness
from mla_study.rollout.stream import Chunk, Rollout, random_model


def test_a_rollout_is_steady() -> None:
    rollout = Rollout(random_model(mini(latent=True)), "a")
    found = steadiness(rollout, 60, 20, 20)
    assert rollout.next_chunk == 80
    assert found.ratio < 1.3
    assert found.rss_growth < 4 << 20
    assert found.cache_bytes == rollout.cache.nbytes


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
