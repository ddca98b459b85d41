"""A stand-in for a CUDA graph on the CPU: it replays operations, not Python.

Like a graph it freezes every number, slice and address of the recorded call, so that whatever
varies from call to call and is not copied into fixed tensors comes out as it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.operations:
                given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                for new, old in zip(
                    tree_leaves(func(*args, **kwargs)), tree_leaves(made), strict=True
                ):
                    # a view or a tensor written in place is up to date already
                    if isinstance(old, Tensor) and storage(old) not in given:
                        old.copy_(new)


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def capture(call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    tape = Tape()
    with tape:
        out = call()
    return tape.replay, out
