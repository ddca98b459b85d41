"""The clip-to-clip branch of VBench's long mode, run by VBench's environment.

A part's first frames, joined to a video, are compared by upstream's own functions.
:data:`OPERATIONS` is as in long_ops.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

_DINO = (
    "torch/hub/facebookresearch_dino_main/hubconf.py",
    "torch/hub/checkpoints/dino_vitbase16_pretrain.pth",
)
LONG_WEIGHTS = {
    "dino": _DINO,
    "dinov2": (
        "torch/hub/facebookresearch_dinov2_main/hubconf.py",
        "torch/hub/checkpoints/dinov2_vitb14_pretrain.pth",
    ),
    "clip": ("clip_model/ViT-B-32.pt",),
    "dreamsim": (
        *_DINO,
        "dreamsim/dino_vitb16_pretrain.pth",
        "dreamsim/open_clip_vitb16_pretrain.pth.tar",
        "dreamsim/clip_vitb16_pretrain.pth.tar",
        "dreamsim/ensemble_lora/adapter_config.json",
    ),
}
"""What each kind of features needs below the weights folder."""
EXTRACTORS = {
    "subject_consistency": {True: "dinov2", False: "dino"},
    "background_consistency": {True: "dreamsim", False: "clip"},
}

Line = dict[str, Any]
Scorer = Callable[[Line], Line]


def clip_to_clip(
    dimension: str, dev: bool, device: str, weights: str | Path
) -> Callable[[str], tuple[float, int]]:
    """Load the features of the clip-to-clip branch: a function from a video to (value, frames).

    DINOv2 and DreamSim with ``dev``, DINO and CLIP without. All is read from the weights folder,
    and every model goes to ``device``, which upstream leaves at "cuda" for DreamSim.

    Raises:
        ValueError: a file of the weights is missing; the message names it.
    """
    import torch
    from decord import VideoReader

    kind, root = EXTRACTORS[dimension][dev], Path(weights).absolute()
    missing = [part for part in LONG_WEIGHTS[kind] if not (root / part).exists()]
    if missing:
        raise ValueError(f"{dimension} between clips needs {', '.join(missing)} in {root}")
    torch.set_grad_enabled(False)
    where = torch.device(device)
    torch.hub.set_dir(str(root / "torch" / "hub"))
    if kind in ("dino", "dinov2"):
        folder = root / "torch" / "hub" / f"facebookresearch_{kind}_main"
        entry = {"dino": "dino_vitb16", "dinov2": "dinov2_vitb14"}[kind]
        model: Any = torch.hub.load(str(folder), entry, source="local")
        if kind == "dino":
            from vbench.subject_consistency import subject_consistency as compare
        else:
            from vbench2_beta_long.subject_consistency import subject_consistency_dinov2 as compare

        models = (model.to(where),)
    elif kind == "clip":
        import clip
        from vbench.background_consistency import background_consistency as compare

        models = clip.load(str(root / "clip_model" / "ViT-B-32.pt"), device=where)
    else:
        from dreamsim import dreamsim
        from vbench2_beta_long.background_consistency import (
            background_consistency_dreamsim as compare,
        )

        with _hub_stays():
            models = dreamsim(pretrained=True, cache_dir=str(root / "dreamsim"), device=where)

    def score(path: str) -> tuple[float, int]:
        frames = len(VideoReader(path, num_threads=1))
        if frames < 2:
            raise ValueError(f"{Path(path).name} has {frames} frame: there is nothing to compare")
        _, (result,) = compare(*models, [path], where, False)
        return float(result["video_results"]), frames

    return score


@contextlib.contextmanager
def _hub_stays() -> Generator[None, None, None]:
    """DreamSim moves torch's hub into its own folder, away from the DINO that is there."""
    import torch

    move = torch.hub.set_dir
    torch.hub.set_dir = lambda _: None
    try:
        yield
    finally:
        torch.hub.set_dir = move


def _load_clip_to_clip(request: Line) -> Scorer:
    dimension, dev = request["scorer"].rpartition(".")[2], request["options"].get("dev", True)
    compare = clip_to_clip(dimension, dev, request["device"], request["weights"])

    def score(line: Line) -> Line:
        value, frames = compare(line["path"])
        more = {"extractor": EXTRACTORS[dimension][dev]}
        return {"value": value, "terms": frames - 1, "frames": frames, "more": more}

    return score


OPERATIONS: dict[str, Callable[[Line], Scorer]] = {
    f"long.clip2clip.{dimension}": _load_clip_to_clip for dimension in EXTRACTORS
}
