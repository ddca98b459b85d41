"""The workers' protocol: one scorer a process, one JSON object a line.

REQUEST.json: ``schema`` (1), ``scorer``, ``device``, ``threads``, ``weights`` (their folder) and
``options`` (the scorer's own). Lines in: ``id``, ``path``, ``name``, ``prompt``. Lines out:
``ready`` once; then ``score`` or ``failed`` a video; ``error`` where nothing can be scored, with
exit code 2. The end of the input ends the process.

What a library prints goes to stderr: the protocol keeps the first standard output to itself.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import mla_study
from mla_study.errors import EXIT_BAD_INPUT, UserError
from mla_study.evaluation.vbench.native.scoring import Job, Scorer

SCHEMA = 1
Say = Callable[[Mapping[str, Any]], None]


def build(scorer: str, job: Job) -> Scorer:
    """The scorer of that name, its model loaded.

    Raises:
        UserError: no such scorer here, or something that it needs is missing.
    """
    if scorer == "imaging_quality[niqe]":
        from mla_study.evaluation.vbench.native.niqe import Niqe

        return Niqe(job)
    if scorer == "motion_smoothness[rife]":
        from mla_study.evaluation.vbench.native.smoothness import Smoothness

        return Smoothness(job)
    if scorer in ("clip_t", "clip_f"):
        from mla_study.evaluation.vbench.native.clip_scores import ClipFrames, ClipPrompt

        return ClipPrompt(job) if scorer == "clip_t" else ClipFrames(job)
    if scorer == "hpsv3":
        from mla_study.evaluation.vbench.native.hpsv3 import Hpsv3

        return Hpsv3(job)
    raise UserError(f"'{scorer}' does not run in this environment: it is VBench's own")


def main(argv: Sequence[str]) -> int:
    """Serve one request; returns the exit code."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")

    def say(event: Mapping[str, Any]) -> None:
        out.write(json.dumps(event, allow_nan=False) + "\n")
        out.flush()

    start = time.perf_counter()
    try:
        request = _request(argv)
        if request["scorer"] == "hpsv3":
            _move(argv)
        os.dup2(2, 1)
        threads, scorer = request["threads"], request["scorer"]
        loaded = _load(scorer, threads, request)
    except UserError as error:
        say({"event": "error", "reason": str(error)})
        return EXIT_BAD_INPUT
    except Exception as error:
        # whatever a library makes of damaged weights: the driver must hear of it in words
        say({"event": "error", "reason": f"{argv[0]} cannot be served: {_line(error)}"})
        return EXIT_BAD_INPUT
    load = time.perf_counter() - start
    say({"event": "ready", "versions": _versions(loaded), "patches": [], "load_s": load})
    return _serve(loaded, sys.stdin, say)


def _move(argv: Sequence[str]) -> None:
    """Go on in HPSv3's own interpreter where one is named, in this very process."""
    from mla_study.evaluation.vbench.native.hpsv3 import other_interpreter

    other = other_interpreter()
    if other is not None:
        root = str(Path(mla_study.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        module = "mla_study.evaluation.vbench.native"
        os.execve(other, [other, "-m", module, *argv], environment)


def _request(argv: Sequence[str]) -> dict[str, Any]:
    if len(argv) != 1:
        raise UserError("give one argument: the path of REQUEST.json")
    try:
        held = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        if held["schema"] != SCHEMA:
            raise UserError(f"{argv[0]} is of schema {held['schema']}, this worker reads {SCHEMA}")
        return {
            "scorer": str(held["scorer"]),
            "device": str(held.get("device", "cpu")),
            "threads": max(1, int(held.get("threads", 1))),
            "weights": Path(held["weights"]),
            "options": dict(held.get("options") or {}),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{argv[0]} is no request of a worker ({_line(error)})") from None


def _load(scorer: str, threads: int, request: Mapping[str, Any]) -> Scorer:
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)
    try:
        device = torch.device(request["device"])
    except RuntimeError:
        raise UserError(f"there is no device '{request['device']}': give cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("a GPU is asked for, but torch sees none: use cpu")
    return build(scorer, Job(request["weights"], request["device"], request["options"]))


def _serve(scorer: Scorer, lines: TextIO, say: Say) -> int:
    for line in lines:
        if not line.strip():
            continue
        try:
            asked = json.loads(line)
            name, path, prompt = asked["id"], Path(asked["path"]), asked.get("prompt") or ""
        except (ValueError, KeyError, TypeError) as error:
            say({"event": "error", "reason": f"a line is no request for a video: {_line(error)}"})
            return EXIT_BAD_INPUT
        say(_scored(scorer, name, path, prompt))
    return 0


def _scored(scorer: Scorer, name: str, path: Path, prompt: str) -> dict[str, Any]:
    """The answer for one video: a score, or in one sentence why there is none."""
    import torch

    start = time.perf_counter()
    try:
        with torch.no_grad():
            made = scorer.score(path, prompt)
    except UserError as error:
        return {"event": "failed", "id": name, "reason": str(error)}
    except Exception as error:
        # one broken video must not end a night's run
        return {"event": "failed", "id": name, "reason": _line(error)}
    if not math.isfinite(made.value):
        return {"event": "failed", "id": name, "reason": f"the score is not finite: {made.value}"}
    return {
        "event": "score",
        "id": name,
        "value": float(made.value),
        "terms": 1,
        "frames": made.frames,
        "counted": True,
        "seconds": time.perf_counter() - start,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "more": dict(made.more),
    }


def _versions(scorer: Scorer) -> dict[str, str]:
    import platform

    import av
    import numpy as np
    import torch

    return {
        "python": platform.python_version(),
        "mla_study": mla_study.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "av": av.__version__,
        **scorer.versions,
    }


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
