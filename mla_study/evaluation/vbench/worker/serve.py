"""The worker: load one scorer, then answer for one video after the other.

A request names the scorer; the driver's lines name videos. What cannot be scored at all ends the
worker with an ``error``; a video that cannot be scored is ``failed``, and the worker goes on.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import patches
from .channel import Channel, Line
from .scorers import Scorer, find

SCHEMA = 1
EXIT_USELESS = 2
LOST_GPU = ("CUDA error", "CUDNN_STATUS", "device-side assert")


def main(arguments: Sequence[str]) -> int:
    """Serve one request file; the exit code."""
    channel = Channel()
    started = time.perf_counter()
    try:
        (file,) = arguments
        request = json.loads(Path(file).read_text(encoding="utf-8"))
        versions = _check(request)
        score = _load(request)
    except Exception as error:
        _show(error)
        channel.say("error", reason=sentence(error))
        return EXIT_USELESS
    loaded = round(time.perf_counter() - started, 3)
    channel.say("ready", versions=versions, patches=patches.applied(), load_s=loaded)
    try:
        for line in channel.lines():
            channel.say(**answer(score, line))
    except LostDeviceError as error:
        channel.say("error", reason=str(error))
        return EXIT_USELESS
    except ValueError as error:
        channel.say("error", reason=sentence(error))
        return EXIT_USELESS
    return 0


class LostDeviceError(Exception):
    """The device no longer answers; no further video can be scored by this process."""


def sentence(error: BaseException) -> str:
    """An exception in one line: its own words where they are ours, with its name where not."""
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = f"{text[:400]} ..."
    if type(error) is ValueError and text:
        return text
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the import of {error.name} failed: {text}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check(request: Mapping[str, Any]) -> dict[str, str]:
    """Versions of what counts, after comparing them with those that are asked for."""
    if request.get("schema") != SCHEMA:
        raise ValueError(f"the request has schema {request.get('schema')}, this worker {SCHEMA}")
    expected: Mapping[str, str] = request.get("versions") or {}
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    wrong: list[str] = []
    for name in sorted({*expected, "vbench", "torch", "torchvision", "numpy"}):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"no {name}")
            continue
        want = expected.get(name)
        if want is not None and found[name].split("+")[0] != want:
            wrong.append(f"{name} {found[name]} where {want} is expected")
    if wrong:
        raise ValueError(f"the environment {sys.prefix} has {', '.join(wrong)}")
    return found


def _load(request: Mapping[str, Any]) -> Scorer:
    checkout = request.get("detectron2")
    if checkout:
        if not (Path(checkout) / "detectron2" / "__init__.py").is_file():
            raise ValueError(f"{checkout} is no checkout of detectron2")
        sys.path.insert(0, str(checkout))
    load = find(request["scorer"])
    # after the name is known to be right: importing torch takes seconds
    import cv2
    import torch

    device = torch.device(request["device"])
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device} is asked for, but torch sees no GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"there is no {device}: torch sees {torch.cuda.device_count()} GPUs")
        # VBench says "cuda" in places, which is then the same one
        torch.cuda.set_device(device.index or 0)
    threads = int(request["threads"])
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    torch.set_grad_enabled(False)
    return load(dict(request))


def answer(score: Scorer, line: Line) -> Line:
    """The event for one video. :raises LostDeviceError: see there."""
    started = time.perf_counter()
    try:
        found = score(line)
        value = float(found["value"])
        if not math.isfinite(value):
            raise ValueError(f"VBench's score of it is {value}")
        said = {"event": "score", "id": line["id"], "counted": True, "more": {}, **found}
        said["value"] = value
        json.dumps(said, allow_nan=False)
    except Exception as error:
        _show(error)
        reason = sentence(error)
        if any(mark in reason for mark in LOST_GPU):
            raise LostDeviceError(reason) from error
        _free_gpu()
        return {"event": "failed", "id": line["id"], "reason": reason}
    said["seconds"] = round(time.perf_counter() - started, 3)
    # the peak so far, in KiB on Linux
    said["rss_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return said


def _show(error: BaseException) -> None:
    """The traceback, for the log; a ValueError of one sentence has said it all."""
    if type(error) is not ValueError or os.environ.get("MLA_STUDY_TRACE"):
        import traceback

        traceback.print_exception(error, file=sys.stderr)


def _free_gpu() -> None:
    """Give back what a video that did not fit has left behind."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
