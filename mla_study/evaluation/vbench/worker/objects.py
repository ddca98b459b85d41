"""What GRiT detects: objects, several at once, their colours and places. Needs detectron2."""

from __future__ import annotations

import importlib
from typing import Any

from .content import need_bert
from .media import frames_by_decord, need, under_its_name
from .pictures import told
from .scorers import Line, Loader, Scorer

GRIT = "grit_model/grit_b_densecap_objectdet.pth"
AUXILIARY = {
    "object_class": "object",
    "multiple_objects": "object",
    "color": "color",
    "spatial_relationship": "spatial_relationship",
}


class Watched:
    """A detector that remembers what went wrong: VBench takes every exception for "no object"."""

    def __init__(self, detector: Any) -> None:
        self.detector = detector
        self.error: Exception | None = None
        self.frames = 0

    def run_caption_tensor(self, frame: Any) -> Any:
        """As the detector's. What it raises is raised on, and kept."""
        self.frames += 1
        try:
            return self.detector.run_caption_tensor(frame)
        except Exception as error:
            self.error = self.error or error
            raise


def _with_grit(request: Line) -> Scorer:
    dimension = request["scorer"]
    # imports first: without detectron2 the weights are of no use
    module = importlib.import_module(f"vbench.{dimension}")
    (file,) = need(request["weights"], GRIT)
    need_bert(request, "vocab.txt")
    import torch
    from vbench.third_party.grit_model import DenseCaptioning

    device = torch.device(request["device"])
    detector = DenseCaptioning(device)
    set_up = detector.initialize_model if dimension == "color" else detector.initialize_model_det
    set_up(model_weight=file)
    compare = getattr(module, dimension)

    def score(line: Line) -> Line:
        info = told(line, AUXILIARY[dimension])
        with under_its_name(line) as path:
            frames = frames_by_decord(path)
            return judge(compare, detector, info, path, device, frames)

    return score


def judge(compare: Any, detector: Any, info: Line, path: str, device: Any, frames: int) -> Line:
    """One video by one of VBench's four functions; ``frames`` is the number that it has.

    :raises Exception: what the detector raised, whether VBench hid it or not.
    """
    watched = Watched(detector)
    try:
        _, results = compare(watched, [{**info, "video_list": [path]}], device)
    except ZeroDivisionError:
        # color counts only videos in which the object was found with a colour
        if watched.error is not None or "color" not in info["auxiliary_info"]:
            raise
        return {"value": 0.0, "terms": 0, "frames": frames, "counted": False}
    if watched.error is not None:
        raise watched.error
    (result,) = results
    color = "color" in info["auxiliary_info"]
    terms = 1 if color else watched.frames
    return {"value": float(result["video_results"]), "terms": terms, "frames": frames}


OPERATIONS: dict[str, Loader] = dict.fromkeys(AUXILIARY, _with_grit)
