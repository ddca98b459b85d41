"""``mla-study vbench`` as at a prompt: what is wrong is one sentence and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation.vbench import vbench_places
from vbench_runs import launch_fake, write_clip

from mla_study.cli import main
from mla_study.commands import vbench as command
from mla_study.errors import UserError
from mla_study.evaluation.vbench.needs import environment
from mla_study.evaluation.vbench.runs import scoring
from mla_study.evaluation.vbench.runs.scoring import Request
from mla_study.evaluation.vbench.sampling.records import RECORD, TABLE, records_of
from mla_study.study.runs import file_sha256

FLICKER = ("--mode", "custom", "--dimensions", "temporal_flickering")
NIQE = ("--mode", "custom", "--dimensions", "imaging_quality[niqe]")


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["vbench", *map(str, words)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1, told
    return told[0]


def test_without_an_environment_it_says_how_to_make_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_clip(tmp_path / "a.mp4")
    out = tmp_path / "out"
    told = refused(
        capsys, "run", tmp_path, *FLICKER, "--out", out, "--environment", tmp_path / "none"
    )
    assert "make setup-vbench" in told and not out.exists()


def test_missing_weights_are_named_before_anything_is_scored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLA_STUDY_ASSETS", raising=False)
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.mp4")
    told = refused(
        capsys, "run", tmp_path / "clips", *NIQE, "--out", tmp_path / "out",
        "--weights", tmp_path / "weights", "--device", "cpu",
    )  # fmt: skip
    assert "niqe_image_params.mat" in told and "vbench doctor" in told
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "nowhere", "--out", "x", "--dimensions", "colour"), "did you mean 'color'"),
        (("run", "nowhere", "--out", "x", "--mode", "custom", "--dimensions", "scene"), "prompts"),
        (("compare", "one"), "at least two"),
        (("run", "x", "--out", "y", *FLICKER, "--shard", "3/3"), "give I/N"),
        (
            ("run", "x", "--out", "y", *FLICKER, "--static-filter"),
            "--static-filter says nothing in",
        ),
        (("run", "x", "--out", "y", *FLICKER, "--no-static-filter"), "--no-static-filter says"),
        (("run", "x", "--out", "y", *FLICKER, "--split-scenes"), "of long mode"),
        (("run", "x", "--out", "y", *FLICKER, "--detectron2", "d"), "of short and long mode"),
        (("run", "x", "--out", "y", "--upstream-exact"), "--upstream-exact says nothing in short"),
        (("run", "x", "--out", "y", "--no-clip-to-clip"), "--no-clip-to-clip says nothing in"),
        (("run", "x", "--out", "y", "--long-configs", "d"), "give --mode long"),
        (("run", "x", "--out", "y", "--static-filter", "--no-static-filter"), "contradict"),
        (
            ("run", "x", "--out", "y", "--static-filter", "--dimensions", "scene"),
            "is not among --dimensions",
        ),
        (
            ("run", "x", "--out", "y", *NIQE, "--device", "banana"),
            "--device is 'banana': give auto",
        ),
        (("run", "x", "--out", "y", *NIQE, "--device", "cuda:"), "give auto, cpu, cuda, or cuda:1"),
        (("run", "x", "--out", "y", *NIQE, "--device", "cuda:1"), "sees no GPU"),
    ],
)
def test_wrong_words_are_told(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert says in refused(capsys, *words)


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.Environment(Path(), Path("python"), {})
    monkeypatch.setattr(environment, "gpus", lambda _: 2)
    devices, _ = command._slots("cuda:1", 2, found)  # pyright: ignore[reportPrivateUsage]
    assert devices == ("cuda:1", "cuda:1")
    with pytest.raises(UserError, match=r"sees 2 GPUs, from cuda:0 on"):
        command._slots("cuda:2", None, found)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("out", [".", "scores", "../clips/scores/deep"])
def test_results_do_not_go_into_the_folder_of_videos(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, out: str
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "a.mp4")
    told = refused(capsys, "run", clips, *NIQE, "--out", clips / out, "--device", "cpu")
    assert "the videos' own folder" in told and [file.name for file in clips.iterdir()] == ["a.mp4"]


def test_processes_share_the_cores() -> None:
    devices, threads = command._slots("cpu", 2, None)  # pyright: ignore[reportPrivateUsage]
    assert devices == ("cpu", "cpu") and threads >= 1
    with pytest.raises(UserError, match="sees no GPU"):
        command._slots("cuda", None, None)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(UserError, match="at least 1"):
        command._slots("cpu", 0, None)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("words", "filtered", "exact", "dev"),
    [
        ((), None, None, None),
        (("--static-filter",), True, None, None),
        (("--no-static-filter",), False, None, None),
        (("--mode", "long"), None, True, True),
        (("--mode", "long", "--upstream-exact", "--clip-to-clip"), None, True, True),
        (("--mode", "long", "--no-upstream-exact"), None, False, True),
        (("--mode", "long", "--static-filter", "--no-clip-to-clip"), True, True, False),
    ],
)
def test_what_may_be_forbidden_may_be_demanded(
    words: tuple[str, ...], filtered: bool | None, exact: bool | None, dev: bool | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    asked: list[Request] = []

    def stopped(request: Request, *_: object) -> None:
        asked.append(request)
        raise UserError("far enough")

    monkeypatch.setattr("mla_study.evaluation.vbench.runs.run.run", stopped)
    monkeypatch.setenv("MLA_STUDY_VBENCH_ENV", str(vbench_places.environment(tmp_path / "env")))
    dimensions = ("--dimensions", "temporal_flickering", "imaging_quality[niqe]")
    told = refused(
        capsys, "run", tmp_path, "--out", tmp_path, "--device", "cpu", *dimensions, *words
    )
    assert "far enough" in told
    assert asked[0].static_filter is filtered
    long = asked[0].long
    assert (exact, dev) == (None, None) if long is None else (long.exact, long.dev) == (exact, dev)


def test_a_run_says_what_was_told_and_from_which_seeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    sha256 = file_sha256(write_clip(clips / "a cat-0.mp4"))
    beside = records_of(clips)
    beside.mkdir()
    rows = f"prompt,told,index,seed,file,sha256\na cat,a grey cat,0,77,a cat-0.mp4,{sha256}\n"
    (beside / TABLE).write_text(rows)
    identity = {"inputs": {"prompts": "a" * 64, "extended": "e" * 64}, "seed": 5}
    prompts = {"known_as": "unknown", "extended_by": "unknown"}
    (beside / RECORD).write_text(json.dumps({"identity": identity, "prompts": prompts}))
    monkeypatch.setattr(scoring, "launcher", launch_fake)
    monkeypatch.setenv("MLA_STUDY_VBENCH_ENV", str(vbench_places.environment(tmp_path / "env")))
    words = ["run", str(clips), *FLICKER, "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["vbench", *words]) == 0
    told = capsys.readouterr().err
    assert "told longer prompts (unknown, texts " in told
    assert "seeds of 1 video, 77, from base seed 5" in told
    short = tmp_path / "short.txt"
    short.write_text("a cat\n")
    assert "says that the model was told unknown" in refused(capsys, *words, "--extended", short)
