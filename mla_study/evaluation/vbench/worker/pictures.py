"""What looks at single frames: consistency of subject and background, quality, style.

Each loader does what the first lines of VBench's ``compute_...`` do, with files of the weights
folder; each score is VBench's own function on a list of one video.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .media import frames_by_decord, need, under_its_name
from .scorers import Line, Loader, Scorer

CLIP_B = "clip_model/ViT-B-32.pt"
CLIP_L = "clip_model/ViT-L-14.pt"
HEAD = "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"
SPAQ = "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth"
DINO_CODE = "torch/hub/facebookresearch_dino_main/hubconf.py"
DINO = "torch/hub/checkpoints/dino_vitbase16_pretrain.pth"


def _subject(request: Line) -> Scorer:
    code, _ = need(request["weights"], DINO_CODE, DINO)
    import torch
    from vbench.subject_consistency import subject_consistency

    device = torch.device(request["device"])
    torch.hub.set_dir(str(Path(request["weights"]) / "torch" / "hub"))
    model: Any = torch.hub.load(str(Path(code).parent), "dino_vitb16", source="local")
    model = model.to(device)

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            frames = frames_by_decord(path, 2)
            _, results = subject_consistency(model, [path], device, False)
        return {"value": _one(results), "terms": frames - 1, "frames": frames}

    return score


def _background(request: Line) -> Scorer:
    (file,) = need(request["weights"], CLIP_B)
    import clip
    import torch
    from vbench.background_consistency import background_consistency

    device = torch.device(request["device"])
    model, preprocess = clip.load(file, device=device)

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            frames = frames_by_decord(path, 2)
            _, results = background_consistency(model, preprocess, [path], device, False)
        return {"value": _one(results), "terms": results[0]["cnt_per_video"], "frames": frames}

    return score


def _aesthetic(request: Line) -> Scorer:
    file, head = need(request["weights"], CLIP_L, HEAD)
    import clip
    import torch
    from vbench.aesthetic_quality import get_aesthetic_model, laion_aesthetic

    device = torch.device(request["device"])
    model, _ = clip.load(file, device=device)
    on_top = get_aesthetic_model(str(Path(head).parent)).to(device)

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            frames = frames_by_decord(path)
            _, results = laion_aesthetic(on_top, model, [path], device)
        return {"value": _one(results), "terms": 1, "frames": frames}

    return score


def _imaging(request: Line) -> Scorer:
    (file,) = need(request["weights"], SPAQ)
    import torch
    from pyiqa.archs.musiq_arch import MUSIQ
    from vbench.imaging_quality import technical_quality

    device = torch.device(request["device"])
    model = MUSIQ(pretrained_model_path=file)
    model.to(device)
    model.training = False

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            frames = frames_by_decord(path)
            _, results = technical_quality(
                model, [path], device, imaging_quality_preprocessing_mode="longer"
            )
        return {"value": _one(results), "terms": 1, "frames": frames}

    return score


def _appearance(request: Line) -> Scorer:
    (file,) = need(request["weights"], CLIP_B)
    import clip
    import torch
    from vbench.appearance_style import appearance_style

    device = torch.device(request["device"])
    model, _ = clip.load(device=device, name=file)

    def score(line: Line) -> Line:
        info = told(line, "appearance_style")
        with under_its_name(line) as path:
            frames_by_decord(path)
            _, results = appearance_style(model, [{**info, "video_list": [path]}], device)
        frames = len(results[0]["frame_results"])
        return {"value": _one(results), "terms": frames, "frames": frames}

    return score


def told(line: Line, key: str | None = None) -> Line:
    """Prompt and auxiliary of a line, as VBench's functions want them.

    :raises ValueError: there is no prompt, or ``key`` is not in the auxiliary.
    """
    prompt, auxiliary = line.get("prompt"), line.get("auxiliary")
    if not prompt:
        raise ValueError("it has no prompt, with which its content would be compared")
    if key is None:
        return {"prompt": prompt}
    if not isinstance(auxiliary, dict) or key not in auxiliary:
        raise ValueError(f"nothing is told about its {key}, which VBench's own prompts have")
    return {"prompt": prompt, "auxiliary_info": auxiliary}


def _one(results: list[Line]) -> float:
    (result,) = results
    return float(result["video_results"])


OPERATIONS: dict[str, Loader] = {
    "subject_consistency": _subject,
    "background_consistency": _background,
    "aesthetic_quality": _aesthetic,
    "imaging_quality": _imaging,
    "appearance_style": _appearance,
}
