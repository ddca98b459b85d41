"""Turns, ratios and noise of interleaved timing, on calls whose cost is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mla_study.evaluation.timing import AGAIN, Spread, clock_of, interleaved, out_of_memory, threads


def busy(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_ratios_of_known_costs() -> None:
    times = interleaved({"one": lambda: busy(0.004), "three": lambda: busy(0.012)}, 9, 1)
    assert times.ratio("three", "one").median == pytest.approx(3, rel=0.3)
    assert times.noise.median == pytest.approx(1, rel=0.3)
    assert [len(s) for s in times.seconds.values()] == [9, 9, 9]
    assert not times.errors


def test_variants_take_turns() -> None:
    order: list[str] = []
    done: list[int] = []
    interleaved({n: (lambda n=n: order.append(n)) for n in "abc"}, 3, 2, "wall", done.append)
    turns = [order[4 * i : 4 * i + 4] for i in range(5)]
    assert all(sorted(turn) == list("aabc") for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 2  # nobody always follows the same one
    assert done == [1, 2, 3, 4, 5]


def test_out_of_memory_leaves_one_variant_out() -> None:
    calls = {"big": 0}

    def big() -> None:
        calls["big"] += 1
        if calls["big"] == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    times = interleaved({"small": lambda: None, "big": big}, 4, 1, "wall")
    assert times.errors == {"big": "OOM"}
    assert set(times.seconds) == {"small", "small" + AGAIN}
    assert calls["big"] == 3

    # where the first cannot run, or has no second run, there is no noise
    for fails in (lambda turn: True, lambda turn: turn % 2 == 1):
        turns = iter(range(9))

        def first(fails: Callable[[int], bool] = fails, turns: Iterator[int] = turns) -> None:
            if fails(next(turns)):
                raise MemoryError

        times = interleaved({"first": first, "other": lambda: None}, 2, 0, "wall")
        assert times.errors == {"first": "OOM"} and set(times.seconds) == {"other"}
        assert np.isnan(times.noise.median)
    assert np.isnan(interleaved({}, 2).noise.median)

    def wrong() -> None:
        raise RuntimeError("shapes do not fit")

    assert not out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        interleaved({"wrong": wrong}, 1)


def test_spread_is_the_quartiles(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=101)
    spread = Spread.of(values.tolist())
    assert spread.median == np.sort(values)[50]
    assert (spread.low, spread.high) == (np.sort(values)[25], np.sort(values)[75])
    turned = spread.scaled(-2.0)
    assert (turned.low, turned.high) == (-2 * spread.high, -2 * spread.low)


def test_threads_are_given_back() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert clock_of(torch.device("cpu")) == "cpu"
