"""Interleaved timing: variants take turns in one process, and ratios are taken turn by turn.

What slows a turn slows all its variants, so that the median of the ratios is steadier than the
ratio of medians. The first variant runs a second time in every turn: its ratio to itself is the
noise below which a difference says nothing. Seconds are CPU seconds of this process on the CPU
(other processes do not count) and device events on a GPU.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch

Clock = Literal["cpu", "wall", "cuda"]
AGAIN = " (again)"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in the unit of those."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, mid, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
        return cls(float(mid), float(low), float(high))

    def scaled(self, factor: float) -> Spread:
        """All three times ``factor``."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Spread(self.median * factor, low, high)


@dataclass(frozen=True)
class Times:
    """Seconds of every variant, a number a turn; ``errors`` names variants that could not run."""

    seconds: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, str]

    def spread(self, name: str) -> Spread:
        """Seconds of one variant."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """Seconds of ``name`` over those of ``base`` in the same turn."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread.of([a / b for a, b in pairs])

    @property
    def noise(self) -> Spread:
        """The first variant over itself: what no difference means; NaN where it could not run."""
        twin = next((name for name in self.seconds if name.endswith(AGAIN)), None)
        if twin is None:
            return Spread(float("nan"), float("nan"), float("nan"))
        return self.ratio(twin, twin.removesuffix(AGAIN))


def clock_of(device: torch.device) -> Clock:
    """Device events on a GPU, CPU seconds elsewhere."""
    return "cuda" if device.type == "cuda" else "cpu"


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    warm_up: int = 3,
    clock: Clock = "cpu",
    on_turn: Callable[[int], object] = lambda done: None,
) -> Times:
    """Run every variant once a turn, ``repeats`` turns after ``warm_up`` that do not count.

    The order within a turn is shuffled, the same way in every run.

    A variant that runs out of memory is left out with the sentence that says so; the others go on.

    Args:
        variants: name -> call. Give each its own rotation of inputs where caches must be cold.
        on_turn: called with the number of turns done, the warm-up's among them.
    """
    calls = dict(variants)
    if calls:
        first = next(iter(calls))
        calls[first + AGAIN] = calls[first]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    shuffle = random.Random(0)
    for turn in range(-warm_up, repeats):
        # a call feels what ran just before it, so that every turn has an order of its own
        for again, call in shuffle.sample(list(calls.items()), len(calls)):
            name = again.removesuffix(AGAIN)
            if name in errors:
                continue
            try:
                spent = timed(call, clock)
            except MemoryError as error:
                errors[name] = f"OOM ({error})" if str(error) else "OOM"
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                errors[name] = "OOM"
                free_device_memory()
            else:
                if turn >= 0:
                    seconds[again].append(spent)
        on_turn(turn + warm_up + 1)
    kept = {n: tuple(s) for n, s in seconds.items() if n.removesuffix(AGAIN) not in errors}
    return Times(kept, errors)


def timed(call: Callable[[], object], clock: Clock) -> float:
    """Seconds of one call."""
    if clock == "cuda":
        import torch

        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    now = time.process_time if clock == "cpu" else time.perf_counter
    begun = now()
    call()
    return now() - begun


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the CPU."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def free_device_memory() -> None:
    """Let go of what a failed variant held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def threads(count: int) -> Generator[None]:
    """torch on ``count`` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
