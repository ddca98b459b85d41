"""ONNX models: the initialisers as named weight matrices whose rows are outputs."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mla_study.checkpoints.formats.bytesource import LocalBytes
from mla_study.checkpoints.formats.container import TensorInfo, shown
from mla_study.checkpoints.formats.dtypes import DECODED, decode, stored_nbytes
from mla_study.checkpoints.formats.onnx_names import Graph, Use, walk
from mla_study.errors import UserError

# TensorProto.DataType -> our name, the field that may hold the values instead of raw_data, and
# the stored type of one value there (fp16 and narrower travel as bits in int32_data).
_TYPES: dict[int, tuple[str, str, str]] = {
    1: ("F32", "float_data", "<f4"),
    2: ("U8", "int32_data", "<u1"),
    3: ("I8", "int32_data", "<i1"),
    4: ("U16", "int32_data", "<u2"),
    5: ("I16", "int32_data", "<i2"),
    6: ("I32", "int32_data", "<i4"),
    7: ("I64", "int64_data", "<i8"),
    9: ("BOOL", "int32_data", "<u1"),
    10: ("F16", "int32_data", "<u2"),
    11: ("F64", "double_data", "<f8"),
    12: ("U32", "uint64_data", "<u4"),
    13: ("U64", "uint64_data", "<u8"),
    16: ("BF16", "int32_data", "<u2"),
    17: ("F8_E4M3", "int32_data", "<u1"),
    18: ("F8_E4M3FNUZ", "int32_data", "<u1"),
    19: ("F8_E5M2", "int32_data", "<u1"),
    20: ("F8_E5M2FNUZ", "int32_data", "<u1"),
    24: ("F8_E8M0", "int32_data", "<u1"),
}
_EXTERNAL = 1
_AGAIN = "it is damaged or truncated; download or export it again"
_MAX_ELEMENTS = 1 << 56


class OnnxFile:
    """An ONNX model file and its external data files.

    Names come from the initialisers, or from the scopes of the nodes that use them where an
    initialiser's own name says nothing (``onnx::MatMul_123``). Weights stored ``[in, out]`` for a
    MatMul or Gemm are shown transposed, so that rows are outputs; convolution weights keep their
    four axes. Integer weights that the graph dequantises by stored scales are dequantised.
    Raises UserError for anything that is not a readable model.
    """

    format = "onnx"

    def __init__(self, path: str, *, weights: str | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        source = LocalBytes(path)
        try:
            model = _parse(path, bytes(source.read(0, source.size)))
        finally:
            source.close()
        self.fingerprint = source.fingerprint()
        self.bytes_read = source.size
        self.metadata: Mapping[str, object] = {
            key: value
            for key in ("producer_name", "producer_version", "domain", "ir_version")
            if (value := getattr(model, key))
        }
        self._protos: dict[str, Any] = {}
        self._cached: tuple[str | None, memoryview] = (None, memoryview(b""))
        self._collect(model)
        if weights is not None:
            self.notes.append(f"{path}: there is one set of weights; '{weights}' is ignored.")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``[start, stop)`` of the first axis (of the outputs, where the weight is stored
        transposed) as float32, float64 for F64 and wide integers. Raises UserError."""
        stored, use, info = self._find(name)
        if use.integer and use.scale is None:
            raise UserError(
                f"{self.path}: the scale of the integer weight {shown(name)} is not in the file: "
                "export the model in float32 or float16"
            )
        values = self._values(stored, info)
        rows = slice(start, stop).indices(info.shape[0])[:2] if info.shape else (0, 1)
        selected = values
        if info.shape:
            first, last = rows[0], max(rows)
            selected = values[:, first:last] if use.transposed else values[first:last]
        self.bytes_read += info.nbytes * selected.size // max(1, values.size)
        if use.scale is not None:
            selected = self._dequantise(selected, use, values.shape, rows)
        return selected.T if use.transposed else selected

    def raw_sha256(self, name: str) -> str:
        """Hexadecimal sha256 of the values as stored (not transposed, not dequantised)."""
        stored, _, info = self._find(name)
        raw = self._raw(stored)
        self.bytes_read += info.nbytes
        return hashlib.sha256(raw).hexdigest()

    def close(self) -> None:
        self._protos = {}
        self._cached = (None, memoryview(b""))

    def _collect(self, model: Any) -> None:
        nodes: list[Any] = []
        inner = 0
        for graph in walk(model.graph):
            for node in graph.node:
                # The parser gives text that is no UTF-8 as bytes.
                texts = (node.name, node.op_type, node.domain, *node.input, *node.output)
                if not all(isinstance(text, str) for text in texts):
                    raise UserError(f"{self.path}: a node's name is no text: {_AGAIN}")
                nodes.append(node)
            found = list(graph.initializer)
            for node in graph.node:
                found += _constant(node)
            for proto in found:
                if not isinstance(proto.name, str):
                    raise UserError(f"{self.path}: an initialiser's name is no text: {_AGAIN}")
                if proto.data_type == 8:  # strings
                    continue
                if proto.name in self._protos:
                    # Two branches may use one name; the outer graph may not.
                    if inner == 0:
                        raise UserError(
                            f"{self.path}: initialiser {shown(proto.name)} is there twice: {_AGAIN}"
                        )
                    continue
                self._protos[proto.name] = proto
            inner += 1
        if not self._protos:
            raise UserError(f"{self.path} holds no initialisers: name an ONNX file with weights")
        if model.graph.sparse_initializer:
            self.notes.append(f"{self.path}: sparse initialisers are left out.")
        ranks = {name: len(proto.dims) for name, proto in self._protos.items()}
        self._uses = Graph(nodes, ranks).uses()
        self._stored = {use.name: name for name, use in self._uses.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            use.name: self._describe(name, use) for name, use in self._uses.items()
        }
        self._say_what_was_done()

    def _say_what_was_done(self) -> None:
        renamed = [(name, use.name) for name, use in self._uses.items() if use.name != name]
        if renamed:
            name, telling = next(
                (p for p in renamed if len(self._protos[p[0]].dims) > 1), renamed[0]
            )
            self.notes.append(
                f"{self.path}: {len(renamed)} initialisers are named after the nodes that use "
                f"them ({shown(name)} is {shown(telling)})."
            )
        transposed = [use.name for use in self._uses.values() if use.transposed]
        if transposed:
            self.notes.append(
                f"{self.path}: {len(transposed)} weights are stored [in, out] and read transposed, "
                f"so that rows are outputs ({shown(transposed[0])} is the first)."
            )
        scaled = sum(use.scale is not None for use in self._uses.values())
        if scaled:
            self.notes.append(f"{self.path}: {scaled} integer weights are dequantised.")

    def _describe(self, stored: str, use: Use) -> TensorInfo:
        proto = self._protos[stored]
        shape = tuple(int(n) for n in proto.dims)
        if any(n < 0 for n in shape) or math.prod(n for n in shape if n) > _MAX_ELEMENTS:
            raise UserError(
                f"{self.path}: tensor {shown(use.name)} claims the shape {shape}: {_AGAIN}"
            )
        dtype = _TYPES.get(proto.data_type, (f"ONNX type {proto.data_type}", "", ""))[0]
        nbytes = stored_nbytes(dtype, shape)
        if nbytes is None:
            nbytes = len(proto.raw_data)
        if use.transposed:
            shape = shape[::-1]
        return TensorInfo(use.name, shape, dtype, nbytes)

    def _find(self, name: str) -> tuple[str, Use, TensorInfo]:
        try:
            stored = self._stored[name]
            self._protos[stored]
        except KeyError:
            raise UserError(f"{self.path} has no tensor {shown(name)}: check its name") from None
        return stored, self._uses[stored], self.tensors[name]

    def _values(self, stored: str, info: TensorInfo) -> np.ndarray:
        """The whole tensor in its stored layout, kept for the next panel of the same tensor."""
        if info.dtype not in DECODED:
            raise UserError(
                f"{self.path}: tensor {shown(info.name)} has dtype {info.dtype}, which is not "
                "read here: export the model in float32, float16 or bfloat16"
            )
        shape = tuple(self._protos[stored].dims)
        return decode(self._raw(stored), info.dtype, shape)

    def _raw(self, stored: str) -> memoryview:
        if self._cached[0] == stored:
            return self._cached[1]
        proto = self._protos[stored]
        expected = self.tensors[self._uses[stored].name].nbytes
        if proto.data_location == _EXTERNAL:
            raw = self._external(proto, expected)
        else:
            # Each access to raw_data copies it.
            raw = memoryview(bytes(proto.raw_data) or _typed(proto))
        if len(raw) != expected:
            raise UserError(
                f"{self.path}: tensor {shown(stored)} has {len(raw)} bytes where its shape and "
                f"type need {expected}: {_AGAIN}"
            )
        self._cached = (stored, raw)
        return raw

    def _external(self, proto: Any, expected: int) -> memoryview:
        entries = {entry.key: str(entry.value) for entry in proto.external_data}
        location = entries.get("location", "")
        # By name only: a hub's cache keeps both files as links into another folder. A model may not
        # make us read whatever it likes.
        folder = Path(self.path).absolute().parent
        target = Path(os.path.normpath(folder / location))
        if not location or not target.is_relative_to(folder):
            raise UserError(
                f"{self.path}: tensor {shown(proto.name)} keeps its values in "
                f"{shown(location)}, which is outside the model's folder: {_AGAIN}"
            )
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or expected)
        except ValueError:
            offset, length = -1, 0
        try:
            source = LocalBytes(str(target))
        except UserError as error:
            raise UserError(
                f"{self.path}: tensor {shown(proto.name)} keeps its values in another file: {error}"
            ) from None
        try:
            if offset < 0 or length != expected or offset + length > source.size:
                raise UserError(
                    f"{self.path}: the values of tensor {shown(proto.name)} are not in "
                    f"{target.name} ({source.size} bytes): {_AGAIN}"
                )
            return memoryview(source.read(offset, offset + length)).toreadonly()
        finally:
            source.close()

    def _dequantise(
        self, values: np.ndarray, use: Use, shape: tuple[int, ...], rows: tuple[int, int]
    ) -> np.ndarray:
        """``(values - zero) * scale`` for the selected rows (columns, where transposed)."""
        axis = use.axis if -len(shape) <= use.axis < len(shape) else 0
        sliced = 1 if use.transposed else 0
        factors: list[np.ndarray] = []
        for name in (use.zero, use.scale):
            if name is None:
                factors.append(np.zeros(1, dtype=np.float32))
                continue
            if name not in self._protos:
                raise UserError(
                    f"{self.path}: {shown(name)}, by which {shown(use.name)} is dequantised, is "
                    "not stored in the file: export the model in float32 or float16"
                )
            cached = self._cached
            factor = self._values(name, self.tensors[self._uses[name].name])
            self._cached = cached
            if factor.size != 1:
                if factor.ndim != 1 or factor.size != shape[axis]:
                    raise UserError(
                        f"{self.path}: {shown(use.name)} is quantised by blocks, which is not "
                        "read here: export the model in float32 or float16"
                    )
                along = [1] * len(shape)
                along[axis] = -1
                factor = factor.reshape(along)
                if axis % len(shape) == sliced:
                    factor = np.take(factor, range(rows[0], max(rows)), axis=axis)
            factors.append(factor if factor.size != 1 else factor.reshape(1))
        with np.errstate(all="ignore"):
            return ((values - factors[0]) * factors[1]).astype(np.float32).reshape(values.shape)


def _parse(path: str, raw: bytes) -> Any:
    try:
        import onnx
    except ImportError:
        raise UserError(
            f"{path} is an ONNX file and the package onnx is not installed: "
            "pip install 'mla-study[formats]'"
        ) from None
    try:
        model = onnx.ModelProto.FromString(raw)
        known = model.ir_version > 0 and len(model.graph.node) + len(model.graph.initializer) > 0
    except Exception as error:
        raise UserError(f"{path} is no ONNX model ({_reason(error)}): {_AGAIN}") from None
    if not known:
        raise UserError(f"{path} is no ONNX model (no graph in it): {_AGAIN}")
    return model


def _constant(node: Any) -> list[Any]:
    """The matrix held by a Constant node, as an initialiser called like the node's output."""
    if node.op_type != "Constant" or not node.output:
        return []
    for attribute in node.attribute:
        if attribute.name == "value" and len(attribute.t.dims) >= 2:
            proto = type(attribute.t)()
            proto.CopyFrom(attribute.t)
            proto.name = node.output[0]
            return [proto]
    return []


def _typed(proto: Any) -> bytes:
    if proto.data_type not in _TYPES:
        return b""
    _, field, stored = _TYPES[proto.data_type]
    values = getattr(proto, field)
    if field == "int32_data":
        return np.array(values, dtype=np.int32).astype(stored).tobytes()
    return np.array(values, dtype=stored).tobytes()


def _reason(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (text or type(error).__name__)[:120]
