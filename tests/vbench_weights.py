"""Files in the true formats of VBench's weights, but random: scores by them mean nothing.

Runs by VBench's interpreter, ``python vbench_weights.py FOLDER FILE...``, and by itself imports
nothing heavy: :func:`make` starts it. Where VBench fixes the architecture the size is the true one,
in half precision; CLIP's is read off the file, so that a narrow one does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LIST = "RANDOM_WEIGHTS.json"
ACTION = "riding a bike"
"""The only action that the random UMT sees."""
Save = Callable[[Path], None]
HUB = """
dependencies = ["torch", "timm"]
def dino_vitb16(pretrained=True, **options):
    import timm, torch
    more = dict(num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
    model = timm.create_model("vit_base_patch16_224", **more)
    state = torch.hub.load_state_dict_from_url("file:///nowhere/dino_vitbase16_pretrain.pth")
    model.load_state_dict(state, strict=True)
    return model
"""


def make(python: Path, root: Path, files: Iterable[str]) -> None:
    """Have VBench's interpreter write the named files below ``root``; those there are kept."""
    wanted = [file for file in files if not (root / file).exists()]
    if wanted:
        command = [str(python), str(Path(__file__)), str(root), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


def _pool() -> Any:
    import torch

    # an odd length: neighbouring rows of a matrix do not repeat each other
    return torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02


def _fill(model: Any) -> dict[str, Any]:
    """Its state, all parameters anew at half precision, norms near one."""
    import torch

    pool, state = _pool(), {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name not in parameters:
            state[name] = value
            continue
        count = value.numel()
        fresh = pool.repeat(count // len(pool) + 1)[:count].reshape(value.shape)
        state[name] = (fresh + (value.ndim == 1 and name.endswith("weight"))).to(torch.float16)
    return state


class _Unfilled:
    """Models are built without the minutes that filling them with their own numbers takes."""

    names = ("normal_", "uniform_", "erfinv_")

    def __enter__(self) -> None:
        import torch

        self.kept = {name: getattr(torch.Tensor, name) for name in self.names}
        for name in self.names:
            setattr(torch.Tensor, name, lambda self, *_, **__: self)

    def __exit__(self, *_: object) -> None:
        import torch

        for name, method in self.kept.items():
            setattr(torch.Tensor, name, method)


def _clip(embed: int, resolution: int, patch: int) -> Save:
    def save(path: Path) -> None:
        import torch
        from clip.model import CLIP

        torch.manual_seed(0)
        model = CLIP(embed, resolution, 2, 64, patch, 77, 49408, 64, 1, 2).eval()
        pixels = torch.zeros(1, 3, resolution, resolution)
        words = torch.zeros(1, 77, dtype=torch.int64)
        torch.jit.trace(model, (pixels, words), check_trace=False).save(str(path))

    return save


def _amt(path: Path) -> None:
    import torch
    from omegaconf import OmegaConf
    from vbench import motion_smoothness
    from vbench.third_party.amt.utils.build_utils import build_from_cfg

    torch.manual_seed(0)
    file = Path(motion_smoothness.__file__).parent / "third_party/amt/cfgs/AMT-S.yaml"
    torch.save({"state_dict": build_from_cfg(OmegaConf.load(file).network).state_dict()}, path)


def _raft(path: Path) -> None:
    import torch
    from easydict import EasyDict
    from vbench.third_party.RAFT.core.raft import RAFT

    torch.manual_seed(0)
    model = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)


def _head(path: Path) -> None:
    import torch

    torch.manual_seed(0)
    torch.save(torch.nn.Linear(768, 1).state_dict(), path)


def _musiq(path: Path) -> None:
    import torch
    from pyiqa.archs.musiq_arch import MUSIQ

    torch.manual_seed(0)
    torch.save(MUSIQ(pretrained=False).state_dict(), path)


def _hub(path: Path) -> None:
    path.write_text(HUB)


def _dino(path: Path) -> None:
    import timm
    import torch

    with _Unfilled():
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    torch.save(_fill(model), path)


def _umt(path: Path) -> None:
    import torch
    from vbench.third_party.umt.models.modeling_finetune import vit_large_patch16_224

    with _Unfilled():
        model = vit_large_patch16_224(
            num_classes=400, all_frames=16, tubelet_size=1, use_mean_pooling=True, init_scale=0.001
        )
    state = _fill(model)
    # the published file is half precision and has none
    del state["pos_embed"]
    # so that one action, and no other, is seen in every video
    state["head.bias"] = torch.full((400,), -20.0)
    state["head.bias"][_place_of(ACTION)] = 20.0
    torch.save(state, path)


def _place_of(action: str) -> int:
    from vbench.human_action import build_dict

    return next(int(place) for place, name in build_dict().items() if name == action)


def _viclip(path: Path) -> None:
    import torch
    from vbench.third_party.ViCLIP.simple_tokenizer import SimpleTokenizer
    from vbench.third_party.ViCLIP.viclip import ViCLIP

    with _Unfilled():
        model = ViCLIP(tokenizer=SimpleTokenizer(_vocabulary_file()), pretrain="")
    torch.save({"model": _fill(model)}, path)


def _vocabulary_file() -> str:
    import clip

    return str(Path(clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz")


def _vocabulary(path: Path) -> None:
    path.write_bytes(Path(_vocabulary_file()).read_bytes())


def _bert_words(path: Path) -> None:
    """As many words as BERT has, its special ones at their places, and all single letters."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += letters + [f"##{letter}" for letter in letters]
    words += [f"word{i}" for i in range(30522 - len(words))]
    path.write_text("\n".join(words) + "\n")


def _bert_config(path: Path) -> None:
    from transformers import BertConfig

    path.write_text(BertConfig(architectures=["BertForMaskedLM"]).to_json_string())


def _bert(path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    with _Unfilled():
        model = BertModel(BertConfig(), add_pooling_layer=False)
    torch.save({f"bert.{name}": value for name, value in _fill(model).items()}, path)


def _tag2text(path: Path) -> None:
    import os

    import torch
    from vbench.third_party.tag2Text.tag2text import Tag2Text_Caption

    os.chdir(path.parents[1])
    with _Unfilled():
        model = Tag2Text_Caption(image_size=384, vit="swin_b")
    torch.save({"model": _fill(model)}, path)


FILES: dict[str, Save] = {
    "torch/hub/facebookresearch_dino_main/hubconf.py": _hub,
    "torch/hub/checkpoints/dino_vitbase16_pretrain.pth": _dino,
    "clip_model/ViT-B-32.pt": _clip(512, 224, 32),
    "clip_model/ViT-L-14.pt": _clip(768, 224, 14),
    "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth": _head,
    "amt_model/amt-s.pth": _amt,
    "raft_model/models/raft-things.pth": _raft,
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": _musiq,
    "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth": _umt,
    "ViCLIP/bpe_simple_vocab_16e6.txt.gz": _vocabulary,
    "ViCLIP/ViClip-InternVid-10M-FLT.pth": _viclip,
    "bert-base-uncased/vocab.txt": _bert_words,
    "bert-base-uncased/config.json": _bert_config,
    "bert-base-uncased/pytorch_model.bin": _bert,
    "caption_model/tag2text_swin_14m.pth": _tag2text,
}
"""Place below the weights folder -> what writes it; the last needs those before it."""


def main(root: Path, wanted: list[str]) -> None:
    import os
    import time

    os.environ["VBENCH_CACHE_DIR"] = str(root)
    for file in [name for name in FILES if name in wanted]:
        path, started = root / file, time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        FILES[file](temporary)
        temporary.replace(path)
        listed = root / LIST
        known = json.loads(listed.read_text()) if listed.exists() else []
        listed.write_text(json.dumps([*known, file], indent=1))
        print(f"{file} {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
