"""What compares a video with its prompt: actions, scenes, style, overall consistency."""

from __future__ import annotations

from . import patches
from .media import frames_by_decord, need, under_its_name
from .pictures import told
from .scorers import Line, Loader, Scorer

UMT = "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth"
TAG2TEXT = "caption_model/tag2text_swin_14m.pth"
BERT = "bert-base-uncased"
VICLIP = "ViCLIP/ViClip-InternVid-10M-FLT.pth"
VOCABULARY = "ViCLIP/bpe_simple_vocab_16e6.txt.gz"


def _action(request: Line) -> Scorer:
    (file,) = need(request["weights"], UMT)
    import torch
    from vbench.human_action import build_dict

    act = patches.human_action(file, torch.device(request["device"]))
    known = set(build_dict().values())

    def score(line: Line) -> Line:
        with under_its_name(line) as path:
            label = action_in(path)
            if label not in known:
                raise ValueError(
                    f"its name tells of {label!r}, which is none of the 400 actions that are "
                    "recognised: VBench wants 'A person is ACTION-0.mp4'"
                )
            frames = frames_by_decord(path)
            _, results = act([path])
        return {"value": int(results[0]["video_results"]), "terms": 1, "frames": frames}

    return score


def action_in(path: str) -> str:
    """The action that VBench reads off a file's name."""
    name = path.split("/")[-1].lower()
    return name.split("-")[0].split("person is ")[-1].split("_")[0]


def _scene(request: Line) -> Scorer:
    (file,) = need(request["weights"], TAG2TEXT)
    need_bert(request, "vocab.txt", "config.json", "pytorch_model.bin")
    import torch
    from vbench.scene import scene
    from vbench.third_party.tag2Text import tag2text

    device = torch.device(request["device"])
    model = tag2text.Tag2Text_Caption(image_size=384, vit="swin_b")
    # what tag2text_caption does, but that one keeps to itself what the file lacks
    model, report = tag2text.load_checkpoint_swinbase(model, file, {"image_size": 384})
    learned = {name for name, _ in model.named_parameters()}
    lost = [name for name in report.missing_keys if name in learned]
    if lost:
        raise ValueError(
            f"{file} is no file for Tag2Text: {len(lost)} of {len(learned)} parameters are "
            f"missing, the first {lost[0]}"
        )
    model.eval()
    model = model.to(device)

    def score(line: Line) -> Line:
        info = told(line, "scene")
        with under_its_name(line) as path:
            frames = frames_by_decord(path)
            _, (result,) = scene(model, [{**info, "video_list": [path]}], device)
        return {
            "value": result["video_results"],
            "terms": result["frame_count"],
            "frames": frames,
            "more": {"found": result["success_frame_count"]},
        }

    return score


def need_bert(request: Line, *files: str) -> None:
    """BERT's files beside the others; the current folder must be theirs, for transformers looks
    there.

    :raises ValueError: a file is missing, or the worker was started elsewhere.
    """
    import os
    from pathlib import Path

    need(request["weights"], *(f"{BERT}/{file}" for file in files))
    if Path.cwd() != Path(request["weights"]).resolve():
        os.chdir(request["weights"])


def _with_viclip(request: Line) -> Scorer:
    file, vocabulary = need(request["weights"], VICLIP, VOCABULARY)
    import importlib

    import torch
    from vbench.third_party.ViCLIP.simple_tokenizer import SimpleTokenizer
    from vbench.third_party.ViCLIP.viclip import ViCLIP

    dimension = request["scorer"]
    compare = getattr(importlib.import_module(f"vbench.{dimension}"), dimension)
    device = torch.device(request["device"])
    tokenizer = SimpleTokenizer(vocabulary)
    model = ViCLIP(tokenizer=tokenizer, pretrain=file).to(device)

    def score(line: Line) -> Line:
        info = told(line)
        with under_its_name(line) as path:
            frames = frames_by_decord(path)
            _, (result,) = compare(model, [{**info, "video_list": [path]}], tokenizer, device)
        return {"value": result["video_results"], "terms": 1, "frames": frames}

    return score


OPERATIONS: dict[str, Loader] = {
    "human_action": _action,
    "scene": _scene,
    "temporal_style": _with_viclip,
    "overall_consistency": _with_viclip,
}
