"""Runs of unlike protocol are refused, like ones are tested by prompt."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from vbench_runs import run_fake, write_clips

from mla_study.errors import UserError
from mla_study.evaluation.vbench.runs.compare import compare, text

PROMPTS = {f"prompt {i}": 2 for i in range(6)}
SCORERS = ("temporal_flickering", "imaging_quality")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_study.evaluation.vbench.runs import plan

    monkeypatch.setattr(plan.weights, "require", lambda *_, **__: None)


def prompt_file(folder: Path, change: str = "") -> None:
    with (folder / "prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "prompt", "index"])
        for video in sorted(folder.glob("*.mp4")):
            prompt, _, index = video.stem.rpartition("-")
            writer.writerow([video.name, prompt + change, index])


def two_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, change: str = "", **more: object
) -> list[Path]:
    outs = []
    for number, name in enumerate(("dense", "latent")):
        clips = write_clips(tmp_path / f"{name} clips", PROMPTS, seed + 5000 * number)
        prompt_file(clips, change if number else "")
        told = more if number else {}
        run_fake(monkeypatch, clips, tmp_path / name, SCORERS, **{"model": name, **told})
        outs.append(tmp_path / name)
    return outs


def test_like_runs_stand_side_by_side_with_a_paired_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    found = compare(two_runs(monkeypatch, tmp_path, seed))
    assert found.names == ("dense", "latent") and not found.unlike
    row = found.table.set_index("scorer").loc["imaging_quality"]
    # a mean over prompts, each with the mean of its videos: not the score's own weights
    assert row["prompts_shared"] == 6 and 0 < row["p"] <= 1
    assert row["diff_low"] <= row["difference"] <= row["diff_high"]
    assert abs(row["difference"]) < 0.011  # imaging quality counts to a hundred
    assert "dense" in text(found) and "p " in text(found)


def test_other_prompt_files_are_refused_and_shown_only_with_that_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    outs = two_runs(monkeypatch, tmp_path, seed, change=", in the style of oil")
    with pytest.raises(UserError, match=r"unlike protocol: dense and latent: prompt file"):
        compare(outs)
    shown = text(compare(outs, anyway=True))
    assert shown.startswith("UNLIKE PROTOCOLS: dense and latent: prompt file")


def test_device_and_workers_are_no_reason_to_refuse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    outs = two_runs(monkeypatch, tmp_path, seed, devices=("cpu",) * 3, threads=2)
    assert not compare(outs).unlike


def test_longer_prompts_are_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    longer = tmp_path / "longer.txt"
    longer.write_text("a very long prompt\n")
    outs = two_runs(monkeypatch, tmp_path, seed, extended=longer)
    with pytest.raises(
        UserError, match=r"longer prompts by: nobody: short prompts against unknown"
    ):
        compare(outs)


def test_other_weights_matter_for_the_scorers_that_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    from mla_study.evaluation.vbench.runs import plan

    hashes = iter([{"a.pth": "0" * 64}, {}, {"a.pth": "1" * 64}, {}])
    monkeypatch.setattr(plan.weights, "fingerprint", lambda *_: next(hashes))
    outs = two_runs(monkeypatch, tmp_path, seed)
    with pytest.raises(UserError, match=r"weights of temporal_flickering, a.pth: 0000"):
        compare(outs)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two"):
        compare([tmp_path])
    with pytest.raises(UserError, match="cannot be read"):
        compare([tmp_path, tmp_path])
