"""``mla-study vbench`` as at a prompt: what is wrong is one sentence and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from vbench_runs import write_clip

from mla_study.cli import main
from mla_study.commands import vbench as command
from mla_study.errors import UserError

FLICKER = ("--mode", "custom", "--dimensions", "temporal_flickering")


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
    write_clip(tmp_path / "a.mp4")
    told = refused(
        capsys, "run", tmp_path, "--mode", "custom", "--dimensions", "imaging_quality[niqe]",
        "--out", tmp_path / "out", "--weights", tmp_path / "weights", "--device", "cpu",
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
    ],
)
def test_wrong_words_are_told(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert says in refused(capsys, *words)


def test_processes_share_the_cores() -> None:
    devices, threads = command._slots("cpu", 2, None)  # pyright: ignore[reportPrivateUsage]
    assert devices == ("cpu", "cpu") and threads >= 1
    with pytest.raises(UserError, match="sees no GPU"):
        command._slots("cuda", None, None)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(UserError, match="at least 1"):
        command._slots("cpu", 0, None)  # pyright: ignore[reportPrivateUsage]
