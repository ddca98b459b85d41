"""Find the one dictionary of tensors inside what a training program saved around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mla_study.checkpoints.formats.container import shown
from mla_study.errors import UserError

# In order of preference: a live network before its running average, a generator before its critic.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "generator",
    "student",
    "net",
    "network",
    "params",
    "weights",
    "transformer",
    "generator_ema",
    "ema",
    "ema_model",
    "model_ema",
    "params_ema",
    "ema_state_dict",
    "state_dict_ema",
    "shadow_params",
    "teacher",
    "critic",
)

_TRAINING_STATE = ("optim", "scheduler", "scaler", "rng_state", "callbacks", "sampler_state")
_MAX_DEPTH = 32
_MAX_SHOWN = 12


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """Entries of a mapping or list by name; a pickle may have shadowed the instance's methods."""
    if isinstance(node, dict):
        for key, value in dict.items(node):
            yield str(key), value
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield str(index), value


def _is_training_state(name: str, node: Any) -> bool:
    name = name.lower()
    if name == "opt" or name.startswith("opt_") or name.endswith("_opt"):
        return True
    if any(part in name for part in _TRAINING_STATE):
        return True
    return isinstance(node, dict) and "param_groups" in node and "state" in node


class Peeler:
    """Chooses among the dictionaries of one loaded object; see :func:`peel`."""

    def __init__(self, where: str, tensor_type: type) -> None:
        self.where = where
        self.tensor_type = tensor_type
        self.notes: list[str] = []
        self.metadata: dict[str, object] = {}
        self._known: dict[int, bool] = {}

    def holds_tensors(self, node: Any, depth: int = 0) -> bool:
        if isinstance(node, self.tensor_type):
            return True
        if not isinstance(node, dict | list | tuple) or depth > _MAX_DEPTH:
            return False
        known = self._known.get(id(node))
        if known is None:
            self._known[id(node)] = False  # an object that contains itself adds nothing
            known = any(
                self.holds_tensors(value, depth + 1)
                for name, value in _children(node)
                if not _is_training_state(name, value)
            )
            self._known[id(node)] = known
        return known

    def branches(self, node: Any) -> dict[str, Any]:
        """The dictionaries directly inside ``node`` that hold tensors, the optimizer's apart."""
        return {
            name: value
            for name, value in _children(node)
            if isinstance(value, dict)
            and not _is_training_state(name, value)
            and self.holds_tensors(value)
        }

    def descend(self, node: Any) -> Any:
        """The dictionary that holds the weights, by :data:`WRAPPERS`; notes what was passed by."""
        for _ in range(_MAX_DEPTH):
            self._keep_scalars(node)
            branches = self.branches(node)
            if not branches or self._has_matrix(node):
                return node
            known = [name for name in WRAPPERS if name in branches]
            if known:
                chosen = known[0]
                others = [name for name in branches if name != chosen]
                if others:
                    listed = ", ".join(shown(name, 40) for name in others[:_MAX_SHOWN])
                    self.notes.append(
                        f"{self.where} holds several sets of weights: {chosen!r} is read; "
                        f"--weights NAME chooses another ({listed})."
                    )
            elif len(branches) == 1 and self._leads_to_wrapper(next(iter(branches.values()))):
                chosen = next(iter(branches))
            else:
                return node
            node = branches[chosen]
        return node

    def select(self, root: Any, weights: str) -> Any:
        """The dictionary called ``weights``: by dotted path, or by a last part that is unique."""
        paths: dict[str, Any] = {}
        queue: list[tuple[str, Any]] = [("", root)]
        seen: set[int] = set()
        while queue:
            path, node = queue.pop(0)
            if id(node) in seen:
                continue
            seen.add(id(node))
            for name, value in self.branches(node).items():
                paths[inner := f"{path}.{name}" if path else name] = value
                queue.append((inner, value))
        if weights in paths:
            return paths[weights]
        ends = [path for path in paths if path.endswith(f".{weights}")]
        if len(ends) == 1:
            return paths[ends[0]]
        listed = ", ".join(shown(path, 60) for path in (ends or list(paths))[:_MAX_SHOWN])
        if ends:
            raise UserError(
                f"{self.where} has several dictionaries of weights called {weights!r}: "
                f"give --weights one of {listed}"
            )
        raise UserError(
            f"{self.where} has no dictionary of weights called {weights!r}: "
            + (f"give --weights one of {listed}" if listed else "leave out --weights")
        )

    def flatten(self, node: Any) -> dict[str, Any]:
        """Every tensor under ``node``, nested names joined by dots."""
        found: dict[str, Any] = {}
        seen: set[int] = set()
        stack: list[tuple[str, Any, int]] = [("", node, 0)]
        while stack:
            path, value, depth = stack.pop()
            if isinstance(value, self.tensor_type):
                if path in found:
                    raise UserError(
                        f"{self.where}: two tensors are called {shown(path)}: save it anew"
                    )
                found[path] = value
            elif isinstance(value, dict | list | tuple) and depth <= _MAX_DEPTH:
                if id(value) in seen:
                    continue
                seen.add(id(value))
                inner = [
                    (f"{path}.{name}" if path else name, child, depth + 1)
                    for name, child in _children(value)
                    if not _is_training_state(name, child) or isinstance(child, self.tensor_type)
                ]
                stack.extend(reversed(inner))
        return found

    def _has_matrix(self, node: Any) -> bool:
        return any(
            isinstance(value, self.tensor_type) and value.ndim >= 2 for _, value in _children(node)
        )

    def _leads_to_wrapper(self, node: Any) -> bool:
        return not self._has_matrix(node) and any(name in WRAPPERS for name in self.branches(node))

    def _keep_scalars(self, node: Any) -> None:
        for name, value in _children(node):
            if isinstance(value, int | float) or (isinstance(value, str) and len(value) < 256):
                self.metadata.setdefault(name, value)


def peel(
    where: str, root: Any, tensor_type: type, weights: str | None
) -> tuple[dict[str, Any], list[str], Mapping[str, object]]:
    """``(tensors by name, notes, plain values found on the way)`` of a loaded object.

    ``weights`` names the dictionary to take instead of the preferred one. An optimizer's state is
    never taken. Raises UserError for an unknown name and for an object without tensors.
    """
    if isinstance(root, tensor_type):
        if weights is not None:
            raise UserError(f"{where} holds a single tensor: leave out --weights")
        return {"tensor": root}, [], {}
    peeler = Peeler(where, tensor_type)
    usable = {} if _is_training_state("", root) else root
    start = usable if weights is None else peeler.select(usable, weights)
    tensors = peeler.flatten(peeler.descend(start))
    if not tensors:
        keys = ", ".join(shown(name, 40) for name, _ in list(_children(root))[:_MAX_SHOWN])
        what = f"its keys: {keys}" if keys else f"it holds a {type(root).__name__}"
        raise UserError(
            f"{where} holds no weights, the state of training apart ({what}): "
            "name a file that holds the model's state_dict"
        )
    return tensors, peeler.notes, peeler.metadata
