"""Calibration files: the measured rates of a device, one JSON a device, committed where measured.

A file holds one entry a dtype and number of threads. It names its device, and is refused on
another: rates do not travel.
"""

from __future__ import annotations

import functools
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mla_study.config import from_dict
from mla_study.errors import UserError
from mla_study.kernels.latent_attention.cost import DERIVED, Calibration

FOLDER = Path(__file__).parent / "calibrations"
KIND = "mla-study calibration"


@functools.cache
def device_key(device: str = "cpu") -> str:
    """The device's name: processor model and what it can multiply, or the GPU's name."""
    if device.partition(":")[0] == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    facts = _cpuinfo()
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    flags = facts.get("flags", "").split()
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return ", ".join([name.strip(), *numbers, *units])


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def fast_bf16(device: str = "cpu") -> bool:
    """Whether the device multiplies bf16 faster than fp32."""
    if device.partition(":")[0] == "cuda":
        return True
    return any(unit in device_key() for unit in ("avx512_bf16", "amx_bf16"))


def file_name(device: str) -> str:
    """Where a device's calibration lies in :data:`FOLDER`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def to_text(entries: Iterable[Calibration]) -> str:
    """A calibration file."""
    held = [asdict(entry) for entry in entries]
    return json.dumps({"kind": KIND, "entries": held}, indent=1, allow_nan=False) + "\n"


def read(path: Path, device: str | None = None) -> list[Calibration]:
    """Entries of a file.

    Args:
        device: the :func:`device_key` that it must be of; None takes any.

    Raises:
        UserError: no calibration file, or one of another device.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if data["kind"] != KIND:
            raise ValueError(f"its kind is {data['kind']!r}")
        entries = [from_dict(entry, Calibration, str(path)) for entry in data["entries"]]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): mla-study calibrate makes one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no calibration file ({error}): mla-study calibrate makes one"
        ) from None
    for entry in entries:
        if device is not None and entry.device != device:
            raise UserError(
                f"{path} was measured on '{entry.device}', but this device is '{device}': "
                "run mla-study calibrate here"
            )
    return entries


@functools.lru_cache
def find(
    dtype: str, device: str = "cpu", threads: int | None = None, path: Path | None = None
) -> Calibration:
    """The calibration of this machine's device; FLOPs alone where there is none.

    Among entries of the dtype the one with the nearest number of threads is taken.

    Args:
        path: a file in place of the committed ones; it must be of this device.

    Raises:
        UserError: the file is none, of another device, or lacks the dtype.
    """
    if device.partition(":")[0] not in ("cpu", "cuda"):
        return DERIVED
    name = device_key(device)
    place = FOLDER / file_name(name) if path is None else path
    if path is None and not place.exists():
        return DERIVED
    entries = [entry for entry in read(place, name) if entry.dtype == dtype]
    if not entries:
        if path is not None:
            raise UserError(f"{path} holds no rates of {dtype}: run mla-study calibrate with it")
        return DERIVED
    return min(entries, key=lambda entry: abs(entry.threads - (threads or 1)))
