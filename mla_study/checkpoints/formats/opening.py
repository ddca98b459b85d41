"""Which class opens which weight file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from mla_study.checkpoints.formats.bytesource import is_remote
from mla_study.checkpoints.formats.container import (
    FORMATS,
    HEAD_BYTES,
    Container,
    refuse_kind,
    sniff,
)
from mla_study.checkpoints.formats.safetensors_file import SafetensorsFile
from mla_study.checkpoints.formats.sources import open_bytes
from mla_study.errors import UserError


def open_container(
    path_or_url: str,
    *,
    weights: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Container:
    """Open one weight file: a local path, an ``https://`` address or ``hf://org/name/file``.

    The format is found by magic bytes first, by suffix where there is none (ONNX). ``weights``
    chooses among the dictionaries of a PyTorch file (``generator``, ``generator_ema``, ...).
    ``on_bytes(n)`` is called after each piece read from a safetensors file. Remote files are
    safetensors only. Raises UserError for anything that is not a readable weight file.
    """
    if is_remote(path_or_url):
        return SafetensorsFile(path_or_url, weights=weights, on_bytes=on_bytes)

    source = open_bytes(path_or_url)
    try:
        head = bytes(source.read(0, min(HEAD_BYTES, source.size)))
    finally:
        source.close()
    kind = sniff(head)
    suffix = PurePath(path_or_url).suffix.lower()
    refuse_kind(kind, path_or_url)
    if suffix == ".onnx":
        from mla_study.checkpoints.formats.onnx_file import OnnxFile

        return OnnxFile(path_or_url, weights=weights)
    if kind == "gguf":
        from mla_study.checkpoints.formats.gguf_file import GgufFile

        return GgufFile(path_or_url, weights=weights)
    if kind in ("zip", "pickle"):
        from mla_study.checkpoints.formats.torch_file import TorchFile

        return TorchFile(path_or_url, weights=weights)
    if kind == "safetensors" or suffix == ".safetensors":
        return SafetensorsFile(path_or_url, weights=weights, on_bytes=on_bytes)
    what = "JSON, not weights" if kind == "json" else f"no format known here ({head[:8]!r}...)"
    raise UserError(f"{path_or_url} is {what}: name a file of {FORMATS}")
