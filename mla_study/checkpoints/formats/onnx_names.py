"""What an ONNX graph says about its initialisers: a telling name, and which axis is the output.

An exporter folds the transposition of a linear layer's weight into the stored values and drops
the parameter's name with it; the node that multiplies by the weight still carries the scope.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ANONYMOUS = re.compile(r"onnx::.*|.*_output_\d+|[A-Za-z_]*\d+")
_FOLDED = re.compile(r"_(quantized|transposed)$")
_SCOPES = "pkg.torch.onnx.name_scopes"
_MAX_HOPS = 6

# op -> (index of the weight, of its scale, of its zero point); the product's other side is x.
_PRODUCTS: dict[str, tuple[int, int | None, int | None]] = {
    "MatMul": (1, None, None),
    "FusedMatMul": (1, None, None),
    "Gemm": (1, None, None),
    "Attention": (1, None, None),
    "MatMulInteger": (1, None, 3),
    "QLinearMatMul": (3, 4, 5),
}
_PARAMETERS: dict[str, dict[int, str]] = {
    "Gemm": {2: "bias"},
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "GroupNormalization": {1: "weight", 2: "bias"},
    "Attention": {2: "bias"},
}


@dataclass(frozen=True)
class Use:
    """How one initialiser is used.

    ``name`` to show it by; ``transposed``: stored ``[in, out]``; ``scale``, ``zero``: names of
    the initialisers that dequantise it, along ``axis`` of the stored shape where they are vectors;
    ``integer``: it is an integer weight, of no meaning without a scale.
    """

    name: str
    transposed: bool = False
    scale: str | None = None
    zero: str | None = None
    axis: int = 1
    integer: bool = False


@dataclass(frozen=True)
class _End:
    """Where a stored value ends up: the node, the input, and what happened on the way."""

    node: Any
    index: int
    flips: int
    scale: str | None
    zero: str | None
    axis: int


class Graph:
    """Initialisers by name with their ranks, and the nodes that use them in graph order."""

    def __init__(self, nodes: Sequence[Any], ranks: Mapping[str, int]) -> None:
        self.ranks = ranks
        self.consumers: dict[str, list[tuple[Any, int]]] = {}
        for node in nodes:
            for index, value in enumerate(node.input):
                if value:
                    self.consumers.setdefault(value, []).append((node, index))

    def uses(self) -> dict[str, Use]:
        """For each initialiser its :class:`Use`; shown names are unique."""
        ends = {name: self._end(name) for name in self.ranks}
        telling = {name: self._telling(name, end) for name, end in ends.items()}
        taken = {name for name, shown in telling.items() if not shown}
        uses: dict[str, Use] = {}
        for name, end in ends.items():
            shown = next((choice for choice in telling[name] if choice not in taken), name)
            taken.add(shown)
            uses[name] = Use(shown) if end is None else self._use(name, shown, end)
        return uses

    def _use(self, name: str, shown: str, end: _End) -> Use:
        flips, scale, zero = end.flips, end.scale, end.zero
        op = end.node.op_type
        integer = False
        if _is_weight(end):
            _, scale_at, zero_at = _PRODUCTS[op]
            transposed = bool(_attribute(end.node, "transB", 0)) and op in ("Gemm", "FusedMatMul")
            flips += 0 if transposed else 1
            if zero_at is not None:
                integer = True
                zero = _input(end.node, zero_at)
                # onnxruntime multiplies by the scale two nodes later, under the same stem.
                stem = name.removesuffix("_quantized")
                scale = _input(end.node, scale_at) if scale_at is not None else f"{stem}_scale"
                if scale not in self.ranks:
                    scale = None
        transposed = flips % 2 == 1 and self.ranks[name] == 2
        return Use(shown, transposed, scale, zero, end.axis, integer)

    def _end(self, name: str) -> _End | None:
        """The first product that the initialiser enters, else the first use of any kind."""
        first: _End | None = None
        pending = [(name, 0, None, None, 1)]
        seen: set[str] = set()
        for _ in range(_MAX_HOPS):
            following: list[Any] = []
            for value, flips, scale, zero, axis in pending:
                if value in seen:
                    continue
                seen.add(value)
                for node, index in self.consumers.get(value, ()):
                    end = _End(node, index, flips, scale, zero, axis)
                    if _is_weight(end):
                        return end
                    if node.op_type in ("Identity", "Cast") and node.output:
                        following.append((node.output[0], flips, scale, zero, axis))
                    elif node.op_type == "Transpose" and self._swaps(node, name) and node.output:
                        following.append((node.output[0], flips + 1, scale, zero, axis))
                    elif node.op_type == "DequantizeLinear" and index == 0 and node.output:
                        along = int(_attribute(node, "axis", 1))
                        inner = (node.output[0], flips, _input(node, 1), _input(node, 2), along)
                        following.append(inner)
                        first = first or _End(node, index, flips, *inner[2:])
                    else:
                        first = first or end
            pending = following
            if not pending:
                break
        return first

    def _swaps(self, node: Any, name: str) -> bool:
        permutation = _attribute(node, "perm", None)
        return self.ranks[name] == 2 and (permutation is None or list(permutation) == [1, 0])

    def _telling(self, name: str, end: _End | None) -> list[str]:
        """Better names than the initialiser's own, best first; none where its own says enough."""
        stem = _FOLDED.sub("", name)
        if end is None:
            return []
        if not _ANONYMOUS.fullmatch(stem):
            return [stem] if stem != name else []
        node, op = end.node, end.node.op_type
        if _is_weight(end):
            suffix = "weight"
        elif op in ("Add", "Mul") and self.ranks[name] == 1:
            suffix = "bias" if op == "Add" else "weight"
        else:
            suffix = _PARAMETERS.get(op, {}).get(end.index, "")
        if not suffix:
            return []
        choices: list[str] = []
        bias = self._bias(node) if suffix == "weight" else None
        if bias is not None:
            choices.append(bias.removesuffix("bias") + suffix)
        scope, last = _scope(node)
        if scope:
            choices += [f"{scope}.{suffix}", f"{scope}.{last}.{suffix}"]
        return choices

    def _bias(self, node: Any) -> str | None:
        """The named bias that is added to this node's product, if there is one."""
        names = [value for value in node.input if self._is_bias(value)]
        value = node.output[0] if node.output else ""
        for _ in range(3):
            if names:
                return names[0]
            following = self.consumers.get(value, ())
            if len(following) != 1 or following[0][0].op_type not in ("Add", "Cast", "Mul"):
                return None
            after = following[0][0]
            if after.op_type == "Add":
                names = [other for other in after.input if self._is_bias(other)]
                return names[0] if names else None
            value = after.output[0] if after.output else ""
        return None

    def _is_bias(self, value: str) -> bool:
        return value.endswith(".bias") and self.ranks.get(value) == 1


def _is_weight(end: _End) -> bool:
    product = _PRODUCTS.get(end.node.op_type)
    # The Attention of onnxruntime takes packed weights; ONNX's own has none.
    microsoft = end.node.op_type != "Attention" or end.node.domain == "com.microsoft"
    return product is not None and end.index == product[0] and microsoft


def _scope(node: Any) -> tuple[str, str]:
    """``(module path, the node's own part)`` from what torch's exporters leave in a node."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES and len(entry.value) < 8192:
            try:
                scopes = [str(part) for part in ast.literal_eval(entry.value)]
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                break
            if len(scopes) >= 2 and scopes[-2]:
                return scopes[-2], scopes[-1]
    *parts, last = node.name.strip("/").split("/")
    # A called Sequential repeats itself: /net/net.0/MatMul is net.0.
    kept = [
        part
        for at, part in enumerate(parts)
        if at + 1 == len(parts) or not parts[at + 1].startswith(f"{part}.")
    ]
    return ".".join(kept), last


def _attribute(node: Any, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) if attribute.ints else attribute.i
    return default


def _input(node: Any, index: int) -> str | None:
    return (node.input[index] or None) if index < len(node.input) else None


def walk(graph: Any, max_graphs: int = 10_000) -> Iterable[Any]:
    """The graph and those inside its nodes (branches, loop bodies), outermost first."""
    pending = [graph]
    for _ in range(max_graphs):
        if not pending:
            return
        current = pending.pop(0)
        yield current
        for node in current.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)
