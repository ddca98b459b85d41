"""The long mode against upstream's own code, on tables that are made up and on real pictures."""

from __future__ import annotations

import json
import os
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluation.vbench.long.yaml_files import write_yaml

from mla_study.evaluation.vbench.long.averages import (
    EXTRACTORS,
    clips_of,
    drift,
    load_configs,
    long_scores,
    mapped,
)

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve()
WORKER = HERE.parents[4] / "mla_study" / "evaluation" / "vbench" / "worker"
NTSC = Fraction(30000, 1001)
THIRTY, SIXTY = "a cat-0.mp4", "a_long cat-0.mp4"
CUT = 250
CONFIGS = load_configs()
# name of a video -> scores of each part's clips
PARTS = {
    "a cat-0.mp4": {"a cat-0": [0.91, 0.92, 0.93]},
    "a cat-1.mp4": {"a cat-1": [0.7]},
    "my_dog-0.mp4": {"my_dog-0": [0.8, 0.6]},
    "a cut-0.mp4": {"a cut-0-Scene-0": [0.99, 0.97], "a cut-0-Scene-1": [0.5]},
    "a dot.-0.mp4": {"a dot.-0": [0.55, 0.65, 0.75, 0.85]},
}
PAIRS = {"a cat-0": 0.815, "my_dog-0": 0.4, "a cut-0-Scene-0": 0.0, "a dot.-0": 0.9999}


def ask(*requests: dict[str, Any]) -> list[Any]:
    """Answers of upstream's code, all in one process: its imports take ten seconds."""
    root = Path(os.environ.get("MLA_STUDY_VBENCH_ENV") or HERE.parents[4] / ".venv-vbench")
    if not (root / "bin" / "python").exists():
        pytest.skip(f"{root} holds no environment of VBench: make setup-vbench")
    script = HERE.with_name("ask_upstream.py")
    done = subprocess.run(
        [root / "bin" / "python", script, WORKER],
        input=json.dumps(requests), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_arithmetic(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    options = write_yaml(CONFIGS, tmp_path)
    rows, theirs = list[dict[str, Any]](), list[dict[str, Any]]()
    for video, parts in PARTS.items():
        for part, values in parts.items():
            for i, value in enumerate(values):
                clip = f"{part}_{i:03d}"
                terms = int(rng.integers(10, 40))
                rows.append(
                    {
                        "video": video,
                        "prompt": video[:-6],
                        "clip": clip,
                        "value": value,
                        "terms": terms,
                    }
                )
                path = f"/videos/split_clip/{part}/{clip}.mp4"
                theirs.append({"video_path": path, "video_results": value})
    found_pairs = [
        {"video_path": f"/videos/joined/{part}.mp4", "video_results": value}
        for part, value in PAIRS.items()
    ]
    singles = [row for row in rows if row["video"] == "a cat-1.mp4"]
    terms = [row["terms"] for row in rows]
    mean = float(np.average([row["value"] for row in rows], weights=terms))

    cases, ours = list[dict[str, Any]](), list[tuple[float, list[float]]]()

    def compare(
        dimension: str, clips: list[dict[str, Any]], paths: list[dict[str, Any]],
        pairs: list[dict[str, Any]], dev: bool, static: bool = False,
    ) -> None:  # fmt: skip
        table = pd.DataFrame(
            [
                {
                    "video": name,
                    "part": Path(item["video_path"]).stem,
                    "dimension": dimension,
                    "value": item["video_results"],
                    "extractor": EXTRACTORS.get(dimension, {}).get(dev, ""),
                }
                for item in pairs
                for name, parts in PARTS.items()
                if Path(item["video_path"]).stem in parts
            ]
        )
        frame = pd.DataFrame(clips).assign(dimension=dimension, static=True, index=0)
        found = long_scores(frame, table, CONFIGS, True, dev=dev, static=static)
        ours.append((found.overall.iloc[0]["value"], found.videos["value"].tolist()))
        fused = dimension in EXTRACTORS
        cases.append(
            {
                "dimension": dimension, "clips": paths, "fuse": fused, "vbench": mean,
                "pairs": pairs, "pairs_mean": 0.5 if pairs else None,
                "options": {**options, "dev_flag": dev, "w_inclip": 1.0, "w_clip2clip": 0.0},
            }
        )  # fmt: skip

    for dimension in EXTRACTORS:
        compare(dimension, rows, theirs, found_pairs, True)
        compare(dimension, rows, theirs, found_pairs, False)
    compare("motion_smoothness", rows, theirs, [], True)
    hundred = [{**row, "value": 100 * row["value"]} for row in rows]
    times = [{**item, "video_results": 100 * item["video_results"]} for item in theirs]
    compare("imaging_quality", hundred, times, [], True)
    kept = [row for row in rows if "_dog" not in row["video"] and "cut" not in row["video"]]
    kept_paths = [
        {
            "video_path": f"/x/filtered_videos/filtered_clips/{row['clip']}.mp4",
            "video_results": row["value"],
        }
        for row in kept
    ]
    compare("temporal_flickering", kept, kept_paths, [], True, static=True)
    # nothing to fuse: VBench's own mean, which weighs by terms
    mean = singles[0]["value"]
    compare("subject_consistency", singles, [theirs[3]], [], True)

    xs = [0.0, 0.005, 0.4, 0.815, 0.9999, 1.0]
    table = CONFIGS.tables["subject_consistency"]
    points = [[x, *[table[int(x * 100) + i][k] for k in (0, 1) for i in (0, 1)]] for x in xs[:5]]
    lengths = {
        "names": ["a cat-0.mp4", "a dog-3.mp4"],
        "info": [
            {"prompt_en": "a cat", "dimension": ["appearance_style"]},
            {"prompt_en": "a cat", "dimension": ["overall_consistency", "imaging_quality"]},
            {"prompt_en": "a dog", "dimension": ["scene", "background_consistency"]},
        ],
        "seconds": dict(CONFIGS.clip_seconds),
    }
    folder = tmp_path / "videos"
    for video, parts in PARTS.items():
        (folder / video).parent.mkdir(exist_ok=True)
        (folder / video).touch()
        for part, values in parts.items():
            (folder / "split_clip" / part).mkdir(parents=True)
            for i in range(len(values)):
                (folder / "split_clip" / part / f"{part}_{i:03d}.mp4").touch()
    (folder / "a cat-2.mp4").touch()
    (folder / "split_clip" / "a cat-2").mkdir()
    (folder / "split_clip" / "a cat-2" / "a cat-2_full.mp4").touch()
    info = tmp_path / "info.json"
    prompts = ["a cat", "my_dog", "a cut", "a dot."]
    info.write_text(
        json.dumps([{"prompt_en": p, "dimension": ["motion_smoothness"]} for p in prompts])
    )
    (tmp_path / "out").mkdir()

    answers, interpolated, seconds, found = ask(
        {"task": "averages", "cases": cases},
        {"task": "interpolated", "points": points},
        {"task": "lengths", **lengths},
        {
            "task": "found", "folder": str(folder), "info": str(info),
            "dimension": "motion_smoothness", "samples": 2,
        },
    )  # fmt: skip
    assert len(answers) == len(ours) == 8
    for case, answer, (overall, values) in zip(cases, answers, ours, strict=True):
        told = (case["dimension"], case["options"]["dev_flag"], seed)
        assert overall == pytest.approx(answer[0], abs=1e-12), told
        scale = 100 if case["dimension"] == "imaging_quality" else 1
        assert values == pytest.approx(answer[1], abs=1e-12 * scale), told
    assert [mapped(x, table) for x in xs[:5]] == pytest.approx(interpolated, abs=1e-12)

    members = ["appearance_style", "overall_consistency", "imaging_quality"]
    assert seconds == [
        CONFIGS.seconds("appearance_style", True, members),
        CONFIGS.seconds("scene", True, ["scene", "background_consistency"]),
    ]
    third = {**singles[0], "video": "a cat-2.mp4", "clip": "a cat-2_full"}
    frame = pd.DataFrame([*rows, third]).assign(dimension="motion_smoothness")
    standard = long_scores(frame, pd.DataFrame(), CONFIGS, True, standard=True, samples=2)
    assert sorted(standard.videos["clip"]) == found
    assert not any("my_dog" in clip or "Scene" in clip or "cat-2" in clip for clip in found)


def repeated(source: Path, count: int) -> list[Any]:
    """Frames of a clip, small, there and back as often as it takes: without a cut."""
    import av

    with av.open(str(source)) as container:
        frames = [f.reformat(96, 64, "yuv420p") for f in container.decode(video=0)][:81]
    order = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
    return [frames[order[i % len(order)]] for i in range(count)]


def write(path: Path, frames: list[Any], rate: Fraction) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def videos(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 s with a cut, and 60 s of 29.97 frames a second with underscores in the name."""
    folder = tmp_path_factory.mktemp("videos")
    cake, flower = "wan2.1_taew_decoded_cheesecake.mp4", "flower.mp4"
    first, second = (assets / "clips" / name for name in (cake, flower))
    write(folder / THIRTY, repeated(first, CUT) + repeated(second, 480 - CUT), Fraction(16))
    write(folder / SIXTY, repeated(first, 1798), NTSC)
    return folder


CASES = {
    "exact": (THIRTY, True, False),
    "corrected": (THIRTY, False, False),
    "exact, at the cut": (THIRTY, True, True),
    "corrected, at the cut": (THIRTY, False, True),
    "exact, 60 s": (SIXTY, True, False),
    "corrected, 60 s": (SIXTY, False, False),
}


def stand_in_weights(root: Path) -> Path:
    """A weights folder whose models are means of pictures; DreamSim's files are empty."""
    hub, dreamsim = root / "torch" / "hub", root / "dreamsim"
    (hub / "checkpoints").mkdir(parents=True)
    for kind, entry, file in (
        ("dino", "dino_vitb16", "dino_vitbase16_pretrain.pth"),
        ("dinov2", "dinov2_vitb14", "dinov2_vitb14_pretrain.pth"),
    ):
        (hub / f"facebookresearch_{kind}_main").mkdir()
        (hub / f"facebookresearch_{kind}_main" / "hubconf.py").write_text(
            "import torch\n"
            f"def {entry}(pretrained=True, **kwargs):\n"
            "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())\n"
        )
        (hub / "checkpoints" / file).touch()
    (dreamsim / "ensemble_lora").mkdir(parents=True)
    for name in (
        "dino_vitb16_pretrain.pth", "open_clip_vitb16_pretrain.pth.tar",
        "clip_vitb16_pretrain.pth.tar", "ensemble_lora/adapter_config.json",
    ):  # fmt: skip
        (dreamsim / name).touch()
    return root


@pytest.fixture(scope="module")
def told(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker answers: each case's clips, and what is made of the first frames of 30 s."""
    out = tmp_path_factory.mktemp("clips")
    weights = stand_in_weights(tmp_path_factory.mktemp("weights"))
    before = sorted(path.name for path in videos.iterdir())
    requests: dict[str, dict[str, Any]] = {
        case: {
            "task": "clips", "path": str(videos / name), "out": str(out / case), "seconds": 2.0,
            "exact": exact, "semantic": semantic, "threshold": 35.0,
        }
        for case, (name, exact, semantic) in CASES.items()
    }  # fmt: skip
    corrected = requests["corrected"]
    requests["again"] = dict(corrected)
    requests["another length"] = {**requests["exact"], "out": str(out / "two"), "seconds": 10.0}
    requests["then ours"] = {**corrected, "out": str(out / "two")}
    requests["foreign folder"] = {**corrected, "out": str(videos)}
    (out / "text.mp4").write_text("no video")
    requests["no video"] = {**corrected, "path": str(out / "text.mp4"), "out": str(out / "three")}
    requests["no frames"] = {**requests["exact"], "seconds": 0.5, "out": str(out / "four")}
    for name, case, exact in (("theirs", "exact", True), ("ours", "corrected", False)):
        part = out / case / "split_clip" / "a cat-0"
        clips = [str(part / f"a cat-0_{i:03d}.mp4") for i in range(15)]
        made = {"task": "joined", "fps": 16.0, "exact": exact, "clips": clips}
        requests[f"first frames, {name}"] = {**made, "out": str(out / name / "joined.mp4")}
    alike = {**made, "clips": clips[:1] * 2, "out": str(out / "alike" / "joined.mp4")}
    requests["first frames, alike"] = alike
    subject, background = EXTRACTORS
    for name, dimension, dev, path in (
        ("dinov2", subject, True, out / "ours" / "joined.mp4"),
        ("dino", subject, False, out / "ours" / "joined.mp4"),
        ("alike", subject, True, alike["out"]),
        ("dreamsim", background, True, out / "ours" / "joined.mp4"),
        ("clip", background, False, out / "ours" / "joined.mp4"),
    ):
        requests[name] = {
            "task": "compared", "dimension": dimension, "dev": dev, "path": str(path),
            "weights": str(weights), "stand_in": name == "dreamsim",
        }  # fmt: skip
    answers = ask(*requests.values())
    assert sorted(path.name for path in videos.iterdir()) == before
    return dict(zip(requests, answers, strict=True))


@pytest.mark.assets
@pytest.mark.parametrize("case", CASES)
def test_clips_lie_where_we_say(told: dict[str, Any], case: str) -> None:
    name, exact, semantic = CASES[case]
    answer, rate = told[case], Fraction(16) if name == THIRTY else NTSC
    frames = 480 if name == THIRTY else 1798
    assert answer["more"]["frames"] == frames
    assert Fraction(answer["more"]["fps"]) == rate
    parts = [(0, CUT), (CUT, frames)] if semantic else [(0, frames)]
    expected = [
        (begin + start, begin + stop)
        for begin, end in parts
        for start, stop in clips_of(end - begin, rate, 2.0, exact)
    ]
    clips = answer["more"]["clips"]
    found = [(round(c["start_s"] * rate), round(c["stop_s"] * rate)) for c in clips]
    assert found == expected
    assert answer["value"] == len(expected)
    assert len(expected) == {"exact, 60 s": 31, "corrected, 60 s": 30}.get(
        case, 16 if semantic else 15
    )
    stem = name.removesuffix(".mp4")
    assert clips[-1]["clip"] == (
        f"{stem}-Scene-1_007" if semantic else f"{stem}_{len(clips) - 1:03d}"
    )
    for clip in clips:
        assert clip["read"] == clip["frames"]
        assert clip["fps"] == pytest.approx(int(rate) if exact else float(rate), abs=1e-9)
        if exact:  # encoded anew, twice at a cut
            assert 0 < clip["mean_gap"] < 6
        else:
            assert clip["largest"] == 0


@pytest.mark.assets
def test_clips_that_are_there_are_taken_and_others_replaced(told: dict[str, Any]) -> None:
    assert told["again"] == told["corrected"]  # times of writing included
    assert [c["frames"] for c in told["another length"]["more"]["clips"]] == [160] * 3
    replaced = told["then ours"]["more"]["clips"]
    assert len(replaced) == 15 and all(c["largest"] == 0 for c in replaced)


@pytest.mark.assets
def test_what_cannot_be_split_is_told(told: dict[str, Any]) -> None:
    assert "is not empty and holds no clips of ours" in told["foreign folder"]["reason"]
    assert told["no video"]["reason"] == "text.mp4 cannot be read as a video"
    assert "clips of no frames" in told["no frames"]["reason"]


@pytest.mark.assets
def test_real_flicker_of_thirty_and_sixty_seconds(told: dict[str, Any]) -> None:
    rows = [
        {
            "video": CASES[case][0], "prompt": "", "index": 0, "clip": clip["clip"],
            "start_s": clip["start_s"], "stop_s": clip["stop_s"],
            "dimension": "temporal_flickering", "value": clip["score"], "terms": 1,
        }
        for case in ("corrected", "corrected, 60 s")
        for clip in told[case]["more"]["clips"]
    ]  # fmt: skip
    table, none = pd.DataFrame(rows), pd.DataFrame()
    by_video = table.groupby("video")["value"].mean()
    assert by_video.between(0.9, 1.0, inclusive="neither").all()
    ours = long_scores(table, none, CONFIGS, False).overall.iloc[0]
    theirs = long_scores(table, none, CONFIGS, True).overall.iloc[0]
    assert ours["value"] == pytest.approx(by_video.mean(), abs=1e-12)
    assert theirs["value"] == pytest.approx((15 * by_video[THIRTY] + 30 * by_video[SIXTY]) / 45)
    curve = drift(table)
    assert curve["seconds"].iloc[0] == pytest.approx((1 + 1.001) / 2)
    assert curve["seconds"].max() == pytest.approx((1738 + 1798) / 2 / float(NTSC), abs=1e-6)
    assert set(curve["videos"]) == {1, 2}


@pytest.mark.assets
def test_first_frames_of_clips(told: dict[str, Any]) -> None:
    theirs, ours = told["first frames, theirs"], told["first frames, ours"]
    assert theirs["from_upstream"] == 0 and theirs["from_clips"] > 0
    assert ours["from_clips"] == 0
    assert theirs["value"] == ours["value"] == 15
    assert told["first frames, alike"]["value"] == 2


@pytest.mark.assets
def test_features_between_clips(told: dict[str, Any]) -> None:
    for name in ("dinov2", "dino", "dreamsim"):
        assert told[name]["more"] == {"extractor": name}
        assert 0 < told[name]["value"] < 0.99999
        assert (told[name]["terms"], told[name]["frames"]) == (14, 15)
    assert told["alike"]["value"] == pytest.approx(1, abs=1e-6)
    assert told["dreamsim"]["devices"] == ["cpu"]
    reason = told["clip"]["reason"]
    assert reason.startswith("background_consistency between clips needs clip_model/ViT-B-32.pt in")
