"""Every dimension whose code is at hand, from its weights file to a score, with random weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import vbench_weights
from vbench_worker import Worker, interpreter, shifted

pytestmark = pytest.mark.slow

CLIP_B = "clip_model/ViT-B-32.pt"
UMT = "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth"
VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")
BERT = tuple(f"bert-base-uncased/{f}" for f in ("vocab.txt", "config.json", "pytorch_model.bin"))
NEEDS = {
    "subject_consistency": (
        "torch/hub/facebookresearch_dino_main/hubconf.py",
        "torch/hub/checkpoints/dino_vitbase16_pretrain.pth",
    ),
    "background_consistency": (CLIP_B,),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": (
        "clip_model/ViT-L-14.pt",
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    ),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "appearance_style": (CLIP_B,),
    "static_filter": ("raft_model/models/raft-things.pth",),
    "human_action": (UMT,),
    "scene": (*BERT, "caption_model/tag2text_swin_14m.pth"),
    "temporal_style": VICLIP,
    "overall_consistency": VICLIP,
}
HEAVY = ("human_action", "scene", "temporal_style", "overall_consistency")
"""Half a minute to two minutes of CPU each."""
TERMS = {
    "subject_consistency": 4,
    "background_consistency": 4,
    "appearance_style": 5,
    "scene": 16,
}
PATCHES = {
    "human_action": ["human_action: model loaded once"],
    "static_filter": ["static_filter: device"],
}
DETECTRON2 = "MLA_STUDY_DETECTRON2"
MOST_MIB = 12_000
ACTION = f"A person is {vbench_weights.ACTION}-0.mp4"


@pytest.fixture(scope="session")
def open_worker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Worker]:
    """Starts a scorer on random weights, which are made once and kept for the session."""
    python, folder = interpreter(), tmp_path_factory.mktemp("vbench")

    def begin(scorer: str) -> Worker:
        root = folder / "weights"
        vbench_weights.make(python, root, NEEDS[scorer])
        listed = json.loads((root / vbench_weights.LIST).read_text())
        assert set(NEEDS[scorer]) <= set(listed)
        return Worker(python, root, scorer, folder / f"{scorer}.log")

    return begin


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "scorer",
    [pytest.param(name, marks=pytest.mark.heavy) if name in HEAVY else name for name in NEEDS],
)
def test_a_dimension_goes_from_its_weights_to_a_score(
    open_worker: Callable[[str], Worker], tmp_path: Path, scorer: str
) -> None:
    video = shifted(tmp_path / "4f2a.mp4", 5, (3, 5))
    auxiliary = {"scene": {"scene": "alley"}, "appearance_style": "Van Gogh style"}
    with open_worker(scorer) as worker:
        said = worker.ask(video, name=ACTION, prompt="a bike", auxiliary=auxiliary)
        if scorer == "human_action":
            unnamed = worker.ask(video)
            assert unnamed["event"] == "failed" and "tells of '4f2a.mp4'" in unnamed["reason"]
        assert worker.end() == 0
    assert said["event"] == "score", said
    assert math.isfinite(said["value"])
    assert said["frames"] == 5 and said["terms"] == TERMS.get(scorer, 1)
    assert said["counted"] and said["rss_mib"] < MOST_MIB
    # the random recogniser sees one action in everything, and the label is read off the name
    assert scorer != "human_action" or said["value"] == 1.0
    assert worker.said["patches"] == PATCHES.get(scorer, []) and worker.said["load_s"] > 0


@pytest.mark.timeout(1200)
def test_grit_runs_with_a_checkout_of_detectron2(tmp_path: Path) -> None:
    checkout = os.environ.get(DETECTRON2)
    if not checkout:
        pytest.skip(f"{DETECTRON2} names no checkout of detectron2")
    python, grit = interpreter(), "grit_model/grit_b_densecap_objectdet.pth"
    vbench_weights.make(python, tmp_path, (*BERT[:2], grit), checkout)
    video = shifted(tmp_path / "a-0.mp4", 5, (0, 0))
    with Worker(python, tmp_path, "color", tmp_path / "worker.log", detectron2=checkout) as worker:
        said = worker.ask(video, prompt="a red car", auxiliary={"color": "red"})
        assert worker.end() == 0
    # the random detector finds no car, which VBench does not count
    assert said["event"] == "score" and not said["counted"] and said["terms"] == 0


@pytest.mark.parametrize("scorer", ["human_action", "dynamic_degree"])
def test_a_file_of_another_model_is_refused(tmp_path: Path, scorer: str) -> None:
    python, wrong = interpreter(), "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"
    vbench_weights.make(python, tmp_path, [wrong])
    place = tmp_path / NEEDS[scorer][0]
    place.parent.mkdir(parents=True)
    (tmp_path / wrong).rename(place)
    with Worker(python, tmp_path, scorer, tmp_path / "worker.log") as worker:
        assert worker.said["event"] == "error"
        # upstream loads the recogniser with whatever names fit, and would score with random ones
        assert "missing or have another shape" in worker.said["reason"] or (
            scorer != "human_action" and "Missing key(s)" in worker.said["reason"]
        )
        assert worker.end() == 2
