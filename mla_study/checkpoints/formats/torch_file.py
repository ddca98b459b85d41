"""Weights saved by ``torch.save``: mapped, never executed."""

from __future__ import annotations

import hashlib
import io
import math
import pickletools
import re
import sys
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mla_study.checkpoints.formats.bytesource import LocalBytes
from mla_study.checkpoints.formats.container import MAX_HEADER_BYTES, TensorInfo, shown
from mla_study.checkpoints.formats.dtypes import DECODED, decode
from mla_study.checkpoints.formats.torch_wrappers import peel
from mla_study.errors import UserError

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
_PANEL_BYTES = 1 << 24
_MAX_ELEMENTS = 1 << 56

# Allowed by torch, and able to fill any amount of memory from a few bytes: an expanded view written
# out, a buffer of a given length.
_FILLING = ("torch._utils._rebuild_device_tensor_from_", "builtins.bytearray")
_REMEDY = (
    "save model.state_dict() or a safetensors file where it was made, "
    "or get the weights as safetensors"
)


class TorchFile:
    """A ``.pt``, ``.pth`` or ``.bin`` file, zip or legacy, plain or wrapped.

    Loaded with ``weights_only`` and, where the file is a zip, mapped: only the rows that are read
    are touched. Keys are those of the chosen dictionary, prefixes included. ``weights`` names
    another dictionary than the preferred one (:data:`torch_wrappers.WRAPPERS`). Raises UserError
    for anything else than readable weights; nothing in the file is executed.
    """

    format = "torch"

    def __init__(self, path: str, *, weights: str | None = None) -> None:
        source = LocalBytes(path)
        # torch decides by the same four bytes.
        is_zip = bytes(source.read(0, min(4, source.size))) == b"PK\x03\x04"
        source.close()
        self.path = path
        self.fingerprint = source.fingerprint()
        data, budget = _inspect_zip(path, source.size) if is_zip else (None, source.size)
        # The legacy format is a stream that has to be read whole.
        self.bytes_read = source.size if data is None else len(data)
        root, tensor_type, spans = _load(path, mmap=is_zip, data=data, budget=budget)
        self._tensors, self.notes, self.metadata = peel(path, root, tensor_type, weights)
        self.tensors: Mapping[str, TensorInfo] = {
            name: _info(path, name, tensor, spans) for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``[start, stop)`` as float32 (float64 for float64 and wide integers), read-only.

        Raises UserError for a tensor that is no plain dense one or claims more than is stored.
        """
        tensor = self._dense(name)
        dtype = self.tensors[name].dtype
        if dtype not in DECODED:
            raise UserError(
                f"{self.path}: tensor {shown(name)} has dtype {dtype}, which is not read here: "
                "save it as float32, float16, bfloat16 or fp8"
            )
        if tensor.ndim:
            first, last, _ = slice(start, stop).indices(tensor.shape[0])
            tensor = tensor[first : max(first, last)]
        raw = self._raw(name, tensor)
        self.bytes_read += len(raw)
        return decode(raw, dtype, tuple(tensor.shape))

    def raw_sha256(self, name: str) -> str:
        """Hexadecimal sha256 of the tensor's values in row-major order, as stored."""
        digest = hashlib.sha256()
        for piece in self.raw(name):
            digest.update(piece)
        return digest.hexdigest()

    def raw(self, name: str) -> Iterator[memoryview]:
        """The tensor's values in row-major order, as stored, in pieces of whole rows."""
        tensor = self._dense(name)
        rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
        row_bytes = max(1, rows[:1].numel() * rows.element_size())
        step = max(1, _PANEL_BYTES // row_bytes)
        for start in range(0, rows.shape[0], step):
            piece = self._raw(name, rows[start : start + step])
            self.bytes_read += len(piece)
            yield piece

    def tensor(self, name: str) -> Any:
        """The ``torch.Tensor`` itself, mapped where the file is a zip. Raises as :meth:`read`."""
        return self._dense(name).detach()

    def close(self) -> None:
        """Drop the mapping; arrays already read stay valid."""
        self._tensors = {}

    def _dense(self, name: str) -> Any:
        import torch

        try:
            tensor = self._tensors[name]
        except KeyError:
            raise UserError(f"{self.path} has no tensor {shown(name)}: check its name") from None
        where = f"{self.path}: tensor {shown(name)}"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UserError(
                f"{where} is a {type(tensor).__name__}: gather sharded tensors, or convert it "
                "to a plain tensor, and save the file again"
            )
        kind = _oddity(tensor)
        if kind == "meta":
            raise _meta_error(self.path, name)
        if kind is not None:
            raise UserError(f"{where} is {kind}: save it as a dense floating-point tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{where} has shape {tuple(tensor.shape)}, more than the "
                f"{tensor.untyped_storage().nbytes()} bytes stored for it: it is an expanded view; "
                "save it with .contiguous()"
            )
        return tensor

    def _raw(self, name: str, rows: Any) -> memoryview:
        import torch

        try:
            flat = rows.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            return memoryview(flat.view(torch.uint8).numpy()).toreadonly()
        except Exception as error:
            raise UserError(
                f"{self.path}: tensor {shown(name)} cannot be read ({_first_line(error)}): "
                "save it as a plain dense tensor"
            ) from None


def _inspect_zip(path: str, size: int) -> tuple[bytes, int]:
    """``(the pickle, the bytes of all tensor records)``, once every record is known to fit."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            pickles = [entry for entry in entries if entry.filename.partition("/")[2] == "data.pkl"]
            if any(name.endswith("/constants.pkl") for name in names):
                raise UserError(f"{path} is a TorchScript archive, a program: {_REMEDY}")
            if len(pickles) != 1:
                raise UserError(
                    f"{path} is a zip archive without PyTorch weights: unpack it and name the "
                    "weight file inside"
                )
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise UserError(
                        f"{path}: record {shown(entry.filename)} is compressed, which torch.save "
                        "never does: unpack it, or save the weights anew"
                    )
                if entry.header_offset + entry.file_size > size:
                    raise UserError(
                        f"{path}: record {shown(entry.filename)} points past the end of the file: "
                        "it is truncated; download or save it again"
                    )
            if pickles[0].file_size > MAX_HEADER_BYTES:
                raise UserError(f"{path}: its pickle is over {MAX_HEADER_BYTES} bytes: {_REMEDY}")
            budget = sum(entry.file_size for entry in entries if "/data/" in entry.filename)
            return archive.read(pickles[0]), budget
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is a damaged or truncated zip file ({_first_line(error)}): "
            "download or save it again"
        ) from None


def _load(
    path: str, *, mmap: bool, data: bytes | None, budget: int
) -> tuple[Any, type, list[tuple[int, int]]]:
    """``(the loaded object, torch.Tensor, where in memory the file's storages lie)``."""
    names = _globals(path, data)
    for name in names:
        if name.startswith(("torch.distributed.", *_FILLING)):
            raise _refusal(path, name)
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch file and the package torch is not installed: "
            "pip install 'mla-study[torch]'"
        ) from None

    total = 0
    spans: list[tuple[int, int]] = []

    def keep_on_cpu(storage: Any, _location: str) -> Any:
        nonlocal total
        total += storage.nbytes()
        spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        if total > budget:
            raise UserError(
                f"{path}: its tensors claim more than the {budget} bytes stored: "
                "it is truncated or damaged; download or save it again"
            )
        return storage

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = torch.load(path, map_location=keep_on_cpu, weights_only=True, mmap=mmap)
            return root, torch.Tensor, sorted(spans)
    except UserError:
        raise
    except Exception as error:
        refused = _refused_global(str(error), names)
        if refused is not None:
            raise _refusal(path, refused) from None
        raise UserError(
            f"{path} is damaged, truncated or no PyTorch file ({_first_line(error)}): "
            f"download it again, or {_REMEDY}"
        ) from None


def _globals(path: str, data: bytes | None) -> list[str]:
    """Python objects that the pickle names, in order, as far as it can be parsed."""
    found: list[str] = []
    strings: list[str] = []
    try:
        with io.BytesIO(data) if data is not None else Path(path).open("rb") as stream:
            # Legacy: magic number, version, system information, the object. A zip holds one.
            for _ in range(1 if data is not None else 4):
                for opcode, argument, _position in pickletools.genops(stream):
                    if opcode.name == "GLOBAL":
                        found.append(str(argument).replace(" ", "."))
                    elif opcode.name == "STACK_GLOBAL":
                        found.append(".".join(strings[-2:]))
                    elif opcode.name in ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE"):
                        strings = [*strings[-1:], str(argument)]
    except Exception:  # whatever is wrong with it, loading says so
        pass
    # Python 2's names of the same modules.
    return [name.replace("__builtin__.", "builtins.", 1) for name in found]


def _refused_global(message: str, names: list[str]) -> str | None:
    """The object that torch refused, from its message or from the pickle itself."""
    match = re.search(r"GLOBAL (\S+) (?:was not|whose module)", message)
    # A name cut short by the end of the file is damage; torch drops "builtins.".
    if match is not None and {match[1], f"builtins.{match[1]}"} & set(names):
        return match[1]
    known = ("torch.", "collections.OrderedDict", "_codecs.encode", "builtins.set")
    return next((name for name in names if not name.startswith(known)), None)


def _refusal(path: str, name: str) -> UserError:
    name = shown(name)[1:-1]
    if name.startswith("torch.distributed."):
        return UserError(
            f"{path} holds sharded tensors ({name}): gather them into one full state_dict and "
            "save that (torch.distributed.checkpoint.format_utils has a converter)"
        )
    if name.startswith("torch.nn.modules."):
        return UserError(f"{path} holds a whole model ({name}), not only its weights: {_REMEDY}")
    return UserError(
        f"{path} is refused: its pickle asks for {name}, where a weight file holds tensors and "
        f"plain values only; nothing in it was executed: {_REMEDY}"
    )


def _oddity(tensor: Any) -> str | None:
    """What makes a tensor other than dense numbers in memory: 'meta', a phrase, or None."""
    import torch

    if tensor.is_meta:
        return "meta"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    return None if tensor.device.type == "cpu" else f"on device {tensor.device}"


def _meta_error(path: str, name: str) -> UserError:
    return UserError(
        f"{path}: tensor {shown(name)} is a meta tensor, a shape without values: "
        "load the weights into the model before saving it"
    )


def _info(path: str, name: str, tensor: Any, spans: list[tuple[int, int]]) -> TensorInfo:
    try:
        kind = _oddity(tensor)
        if kind is None and tensor.numel():
            storage = tensor.untyped_storage()
            at = bisect_right(spans, (storage.data_ptr(), sys.maxsize)) - 1
            if at < 0 or storage.data_ptr() + storage.nbytes() > spans[at][1]:
                raise ValueError("its values are not in the file")
        if kind != "meta":
            shape = () if kind == "nested" else tuple(int(n) for n in tensor.shape)
            if math.prod(n for n in shape if n) > _MAX_ELEMENTS:
                raise ValueError(f"its shape is {shape}")
            stored = str(tensor.dtype).removeprefix("torch.")
            nbytes = tensor.numel() * tensor.element_size()
            return TensorInfo(name, shape, _NAMES.get(stored, stored), nbytes)
    except Exception as error:
        raise UserError(
            f"{path}: tensor {shown(name)} cannot be described ({_first_line(error)}): "
            "save it as a plain dense tensor"
        ) from None
    raise _meta_error(path, name)


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (text or type(error).__name__)[:160]
