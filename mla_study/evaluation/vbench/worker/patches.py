"""Where VBench's code cannot be used as it is. None changes a score; each is named in ``ready``.

* ``human_action: model loaded once``: VBench reads 1.2 GB anew in every call.
* ``static_filter: device``: VBench writes "cuda" in the code, and loads no file on another device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

ONCE = "human_action: model loaded once"
DEVICE = "static_filter: device"
_applied: list[str] = []


def applied() -> list[str]:
    """Names of the patches that this process runs with."""
    return list(_applied)


class _Overlay:
    """A module with some names replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def human_action(umt_path: str, device: Any) -> Callable[[list[str]], Any]:
    """VBench's function of the same name, bound to a model that is loaded here.

    :raises ValueError: the file lacks parameters of the model; VBench would go on with random ones.
    """
    import torch
    import vbench.human_action as module

    state = torch.load(umt_path, map_location="cpu")
    kept: list[Any] = []
    create = module.create_model

    def created(*arguments: Any, **options: Any) -> Any:
        if not kept:
            kept.append(create(*arguments, **options))
            # computed, not learned: the published file goes without
            lacking(kept[0], state, umt_path, computed=("pos_embed",))
        return kept[0]

    def loaded(*_: Any, **__: Any) -> Any:
        # the second time there is nothing left to load
        return {} if kept else state

    module.create_model = created
    module.torch = _Overlay(torch, load=loaded)
    _applied.append(ONCE)
    with contextlib.suppress(ZeroDivisionError):
        # no video: everything up to the division by their number is done
        module.human_action(umt_path, [], device)
    state = {}
    return lambda paths: module.human_action(umt_path, paths, device)


def lacking(model: Any, state: Any, path: str, computed: Collection[str] = ()) -> None:
    """Compare a model's parameters with a file's; ``computed`` ones need not be there.

    :raises ValueError: names the first that the file lacks, or has in another shape.
    """
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, but parameters by name are wanted"
        )
    # one parameter may have several names; any of them in the file will do
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in computed:
            continue
        names.setdefault(id(parameter), []).append(name)
        shapes[id(parameter)] = tuple(parameter.shape)
    wrong = [
        mine[0]
        for key, mine in names.items()
        if not any(name in state and tuple(state[name].shape) == shapes[key] for name in mine)
    ]
    if wrong:
        raise ValueError(
            f"{path} is no file for this model: {len(wrong)} of {len(names)} parameters are "
            f"missing or have another shape, the first {wrong[0]}"
        )


def static_filter(arguments: Any, device: Any) -> Any:
    """VBench's StaticFilter on any device.

    :raises ValueError: the file lacks parameters.
    """
    import torch
    import vbench.cli.static_filter as module
    from vbench.third_party.RAFT.core.raft import RAFT

    state = torch.load(arguments.model, map_location="cpu")
    state = {name.replace("module.", ""): value for name, value in state.items()}
    model = RAFT(arguments)
    lacking(model, state, arguments.model)
    model.load_state_dict(state)
    module.DEVICE = device
    # its own __init__ would load the file by itself
    judge = object.__new__(module.StaticFilter)
    judge.args, judge.device, judge.model = arguments, device, model.to(device).eval()
    _applied.append(DEVICE)
    return judge
