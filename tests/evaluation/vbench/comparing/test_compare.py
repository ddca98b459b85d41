"""Runs of unlike protocol are refused, like ones are tested by prompt."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from vbench_runs import run_fake, write_clips

from mla_study.cli import main
from mla_study.errors import UserError
from mla_study.evaluation.vbench.comparing.compare import compare
from mla_study.evaluation.vbench.comparing.quoted import quoted_rows
from mla_study.evaluation.vbench.comparing.text import text
from mla_study.evaluation.vbench.prompts import Entry
from mla_study.evaluation.vbench.runs import run as running
from mla_study.study.runs import read_result, write_result

PROMPTS = {f"prompt {i}": 2 for i in range(6)}
QUOTED = Path(__file__).resolve().parents[4] / "results" / "paper"
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


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """What the command prints as JSON, and nothing but that."""
    assert main(["vbench", "compare", *map(str, words), "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


def one_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, prompts: dict[str, int], seed: int,
    **more: Any,
) -> Path:  # fmt: skip
    clips = write_clips(tmp_path / f"{name} clips", prompts, seed)
    run_fake(monkeypatch, clips, tmp_path / name, SCORERS, model=name, **more)
    return tmp_path / name


def test_other_prompt_files_are_refused_and_shown_only_with_that_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = two_runs(monkeypatch, tmp_path, seed, change=", in the style of oil")
    with pytest.raises(UserError, match=r"unlike protocol: dense and latent: prompt file"):
        compare(outs)
    shown = text(compare(outs, anyway=True))
    assert shown.startswith("UNLIKE PROTOCOLS: dense and latent: prompt file")
    told = printed(capsys, *outs, "--anyway")
    assert told["unlike"][0].startswith("dense and latent: prompt file")


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


def test_a_score_stands_with_its_videos_validity_and_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = {name: Entry(name, frozenset(SCORERS)) for name in ("a", "b")}
    monkeypatch.setattr(running, "suite_of", lambda _: (suite, "f" * 64))
    more: dict[str, Any] = {"mode": "short", "static_filter": False}
    both = one_run(monkeypatch, tmp_path, "dense", {"a": 1, "b": 1}, seed, **more)
    one = one_run(monkeypatch, tmp_path, "latent", {"a": 1}, seed + 50, **more)
    found = compare([both, one])
    shown = text(found)
    [warning] = found.warnings
    assert shown.startswith(warning) and warning == (
        "OTHER PROMPTS: the scores are means over different prompts or clips (dense 2, latent 1); "
        "1 of them is in all runs, and the difference is that of these"
    )
    row = next(line for line in shown.splitlines() if line.startswith("imaging quality"))
    assert " 2 of 10 partial " in row and " 1 of 10 partial " in row and row.endswith(", 1")
    assert (
        "dense: measured, partial; 2 prompts of file ffffffffffff; told the short prompts, as far"
        in shown
    )
    assert "not that of the two scores" in shown
    told = printed(capsys, both, one)
    score = next(entry for entry in told["scores"] if entry["scorer"] == "imaging_quality")
    assert score["runs"]["latent"]["videos"] == 1 and score["runs"]["latent"]["wanted"] == 10
    assert score["runs"]["dense"]["validity"] == "partial"
    videos = read_result(both).tables["videos"].set_index(["scorer", "prompt"])["value"]
    other = read_result(one).tables["videos"].set_index(["scorer", "prompt"])["value"]
    gap = 0.01 * float(videos["imaging_quality", "a"] - other["imaging_quality", "a"])
    assert score["paired"]["difference"] == pytest.approx(gap)
    assert score["paired"]["prompts"] == 1 and score["paired"]["low"] is None
    assert told["warnings"] == [warning] and told["beside"] == []
    assert [run["prompt_file_sha256"] for run in told["runs"]] == ["f" * 64] * 2


def test_clips_that_have_nothing_in_common_are_said_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    runs = [one_run(monkeypatch, tmp_path, name, {name: 2}, seed) for name in ("here", "there")]
    shown = text(compare(runs))
    assert "(here 1, there 1); none of them is in all runs, so that no difference can be" in shown
    assert (
        "1 clip of no known file of prompts" in shown and ", p " not in shown.split("prompts\n")[1]
    )


def test_scores_by_random_weights_are_called_invalid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from mla_study.evaluation.vbench.runs import plan

    monkeypatch.setattr(plan.weights, "is_random", lambda *_: True)
    runs = [one_run(monkeypatch, tmp_path, name, {"a": 2}, seed) for name in ("dense", "latent")]
    shown = text(compare(runs)).splitlines()
    assert shown[0] == (
        "INVALID: dense is null-model. Metric weights are random: these scores say nothing of the "
        "videos."
    )
    assert next(line for line in shown if line.startswith("imaging quality")).count("invalid") == 2
    assert printed(capsys, *runs)["runs"][0]["validity"] == "invalid"


def test_seeds_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int) -> None:
    from mla_study.evaluation.vbench.runs import origin

    facts = {"seed": 0, "seeds": {"a-0.mp4": 12}, "other_content": 0}
    monkeypatch.setattr(origin, "sampling_facts", lambda *_: facts)
    one = one_run(monkeypatch, tmp_path, "dense", {"a": 1}, seed)
    monkeypatch.setattr(origin, "sampling_facts", lambda *_: None)
    two = one_run(monkeypatch, tmp_path, "latent", {"a": 1}, seed)
    shown = text(compare([one, two]))
    assert (
        "; seeds of 1 video, 12, from base seed 0; run " in shown and "; seeds not known" in shown
    )


def test_published_rows_stand_below_without_a_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [one_run(monkeypatch, tmp_path, name, {"a": 2}, seed) for name in ("dense", "latent")]
    capsys.readouterr()
    shown = text(compare(runs, beside=["quoted"]))
    alone = text(compare(runs))
    assert shown.startswith(alone)
    below = shown.removeprefix(alone)
    assert "paper-quoted, from vbench_leaderboard.csv: shown beside, never tested" in below
    assert "Gen-2 (2023-12)" in below and "0.9956" in below and " p " not in below
    assert "table2" not in below  # of long videos
    long = QUOTED / "table2_long_horizon.csv"
    told = printed(capsys, *runs, "--beside", long)["beside"]
    assert told[0] == {
        "provenance": "paper-quoted", "source": long.name, "name": "Self-Forcing, 30 s",
        "values": {"imaging_quality": 0.577},
    }  # fmt: skip
    assert len(told) == 20
    # one run is enough beside them
    assert "VideoMLA, 60 s" in text(compare(runs[:1], beside=[str(long)]))


def test_what_is_called_total_is_told_by_its_arithmetic() -> None:
    scorers = ("quality", "semantic", "total", "total_mean", "overall_6", "clip_t", "hpsv3")
    rows = {row.name: row.values for row in quoted_rows(["quoted"], scorers, "short")}
    assert rows["Pika (2023-09)"]["total"] == pytest.approx(0.804)
    assert rows["d_c 64"]["total_mean"] == pytest.approx(0.783) and "total" not in rows["d_c 64"]
    assert rows["d_nope 112, d_rope 16"]["quality"] == pytest.approx(0.7831)
    assert rows["NOVA"] == {"clip_t": 0.2764, "hpsv3": 2.95}
    long = {row.name: row.values for row in quoted_rows(["quoted"], scorers, "long")}
    assert long["VideoMLA, 30 s"] == {"overall_6": 0.859}


def test_what_cannot_stand_beside_is_told(tmp_path: Path) -> None:
    for what, says in (
        ("nowhere.csv", "nowhere.csv cannot be read"),
        (str(QUOTED / "table1_costs.csv"), "no column of a score"),
        (str(QUOTED / "table2_long_horizon.csv"), "none of the scores that are compared"),
    ):
        with pytest.raises(UserError, match=says):
            quoted_rows([what], ("human_action",), "short")
    table = pd.DataFrame({"model": ["theirs"], "scorer": ["scene"], "value": [0.5]})
    for provenance in ("measured", "paper-quoted"):
        write_result(
            tmp_path / provenance, {"table": table}, config={}, inputs={}, seed=None, modules=(),
            provenance=provenance, validity="full",
        )  # fmt: skip
    with pytest.raises(UserError, match="is measured: give it as a run"):
        quoted_rows([str(tmp_path / "measured")], ("scene",), "short")
    [row] = quoted_rows([str(tmp_path / "paper-quoted")], ("scene",), "short")
    assert (row.name, row.values) == ("theirs", {"scene": 0.5})
    with pytest.raises(UserError, match="never tested against, so give it by --beside"):
        compare([tmp_path / "paper-quoted"] * 2)
