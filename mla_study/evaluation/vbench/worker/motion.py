"""What looks at change between frames: flicker, smoothness, degree of motion, the static filter.

VBench reads these videos by OpenCV, and decides about motion by counts that scale with the number
of frames. Where that count becomes 0 its answer no longer depends on the video: such a video is
refused.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from . import patches
from .media import Counted, need, under_its_name
from .scorers import Line, Loader, Scorer

AMT = "amt_model/amt-s.pth"
RAFT = "raft_model/models/raft-things.pth"
RAFT_SMALL = "substitutes/raft-small.pth"
SAMPLED_PER_S = 8
LEAST_SAMPLED = 3
"""Frames at 8/s that the degree of motion needs: with 2, round(4 * 2 / 16) moves are wanted."""
LEAST_STATIC = 5
"""Frames that the static filter needs: with 4, round(2 * 4 / 16) moves are allowed."""

LEAST_SIDE = 121
"""Pixels a side that RAFT needs.

It halves a map of an eighth of the size three times and divides by the last one's size less one: up
to 56 pixels it fails, up to 120 all flow is NaN, which VBench takes for no motion.
"""


def _flickering(request: Line) -> Scorer:
    module: Any = importlib.import_module("vbench.temporal_flickering")
    read = Counted(module, "get_frames", 2)

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            return {"value": module.cal_score(path), "terms": 1, "frames": read.frames}

    return score


def _smoothness(request: Line) -> Scorer:
    (file,) = need(request["weights"], AMT)
    import torch

    module: Any = importlib.import_module("vbench.motion_smoothness")
    configuration = Path(module.__file__).parent / "third_party/amt/cfgs/AMT-S.yaml"
    device = torch.device(request["device"])
    model = module.MotionSmoothness(str(configuration), file, device)
    read = Counted(model.fp, "get_frames", 3)

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            return {"value": model.motion_score(path), "terms": 1, "frames": read.frames}

    return score


def _degree(request: Line) -> Scorer:
    small = request["scorer"] != "dynamic_degree"
    (file,) = need(request["weights"], RAFT_SMALL if small else RAFT)
    import torch
    from vbench.dynamic_degree import DynamicDegree

    model = DynamicDegree(_raft(file, small), torch.device(request["device"]))

    # of fewer than this VBench says that they move, whatever they show
    what = f"frames at {SAMPLED_PER_S} a second"
    read = Counted(model, "get_frames", LEAST_SAMPLED, what, LEAST_SIDE)

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            moves = bool(model.infer(path))
        return {"value": int(moves), "terms": 1, "frames": read.frames}

    return score


def _static(request: Line) -> Scorer:
    small = bool((request.get("options") or {}).get("small"))
    (file,) = need(request["weights"], RAFT_SMALL if small else RAFT)
    import torch

    model = patches.static_filter(_raft(file, small), torch.device(request["device"]))
    read = Counted(model, "get_frames", LEAST_STATIC, side=LEAST_SIDE)

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            return {"value": int(bool(model.infer(path))), "terms": 1, "frames": read.frames}

    return score


def _raft(file: str, small: bool) -> Any:
    from easydict import EasyDict

    return EasyDict(model=file, small=small, mixed_precision=False, alternate_corr=False)


OPERATIONS: dict[str, Loader] = {
    "temporal_flickering": _flickering,
    "motion_smoothness": _smoothness,
    "dynamic_degree": _degree,
    "dynamic_degree[raft-small]": _degree,
    "static_filter": _static,
}
