"""Whether a long rollout keeps its pace and its memory."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mla_study.errors import UserError
from mla_study.rollout.stream import Rollout


@dataclass(frozen=True)
class Steadiness:
    """Of ``chunks`` chunks after ``warm_up``: medians of the first and last ``span``."""

    chunks: int
    warm_up: int
    span: int
    first_seconds: float
    last_seconds: float
    rss_growth: int
    cache_bytes: int

    @property
    def ratio(self) -> float:
        """Median seconds a chunk at the end over those at the start."""
        return self.last_seconds / self.first_seconds


def steadiness(
    rollout: Rollout,
    chunks: int = 2000,
    warm_up: int = 100,
    span: int = 100,
    on_chunk: Callable[[int], object] = lambda done: None,
) -> Steadiness:
    """Run a rollout and compare its end with its start.

    Seconds are this process's CPU time on the CPU and wall time on a GPU; memory is the resident
    set of this process in bytes, from the end of the warm-up to the end.

    Args:
        rollout: at its start; its latents are dropped.
        chunks: chunks measured, after ``warm_up`` that are not.
        on_chunk: called with the number of chunks done.

    Raises:
        UserError: fewer chunks than two spans.
    """
    if span < 1 or warm_up < 0 or chunks < 2 * span:
        raise UserError(f"{chunks} chunks do not hold two spans of {span}: measure more")
    on_gpu = rollout.cache.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    seconds = np.zeros(chunks)
    before = 0
    for index in range(-warm_up, chunks):
        if index == 0:
            gc.collect()
            before = resident_bytes()
        start = clock()
        rollout.advance()  # ends by looking at its output, so nothing is left in flight
        if index >= 0:
            seconds[index] = clock() - start
        on_chunk(index + warm_up + 1)
    gc.collect()
    growth = resident_bytes() - before
    first, last = seconds[:span], seconds[-span:]
    return Steadiness(
        chunks,
        warm_up,
        span,
        float(np.median(first)),
        float(np.median(last)),
        growth,
        rollout.cache.nbytes,
    )


def resident_bytes() -> int:
    """Resident set of this process; its peak where the system does not tell the present one."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()
