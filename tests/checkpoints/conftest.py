"""Servers on loopback, without the waiting."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from checkpoints.range_server import Site, Start, serve


@pytest.fixture(scope="module", autouse=True)
def _files_closed() -> Iterator[None]:
    """Files that a test left open are closed here, not in the middle of somebody else's test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once, and no proxy of the environment comes between."""
    from mla_study.checkpoints.formats import ranges

    monkeypatch.setattr(ranges, "BACKOFF_S", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def start(no_waiting: None) -> Iterator[Start]:
    """Start a server from the fields of a :class:`Site`; all stop with the test."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(serve(Site(**kwargs), *args))


@pytest.fixture
def body(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(300_007)
