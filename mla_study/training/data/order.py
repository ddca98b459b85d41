"""The order in which a run sees finite data."""

from __future__ import annotations

import functools

import numpy as np

from mla_study.rollout.prompts import philox


def place(sample: int, count: int, seed: int) -> int:
    """Which of ``count`` items sample ``sample`` of a run is: a permutation an epoch, by the seed.

    Epoch e holds the samples e * count to (e + 1) * count - 1, and each item once.
    """
    epoch, at = divmod(sample, count)
    return int(_order(count, seed, epoch)[at])


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return philox("order", seed, epoch).permutation(count)
