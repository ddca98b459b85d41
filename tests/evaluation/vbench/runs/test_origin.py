"""What the models were told is part of the protocol, whichever file says it; seeds are recorded."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vbench_runs import run_fake, write_clip, write_clips

from mla_study.errors import UserError
from mla_study.evaluation.vbench.comparing.compare import compare
from mla_study.evaluation.vbench.long.configs import load_configs
from mla_study.evaluation.vbench.prompts import KNOWN, Entry
from mla_study.evaluation.vbench.runs import run as running
from mla_study.evaluation.vbench.runs import scoring
from mla_study.evaluation.vbench.runs.origin import seeds_text
from mla_study.evaluation.vbench.runs.scoring import LongOptions
from mla_study.evaluation.vbench.sampling.records import RECORD, TABLE, records_of
from mla_study.study.runs import file_sha256, read_result

PROMPTS = dict.fromkeys((f"prompt {i}" for i in range(3)), 2)
Write = Callable[[str], str]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_study.evaluation.vbench.runs import plan

    monkeypatch.setattr(plan.weights, "require", lambda *_, **__: None)


def longer(prompt: str) -> str:
    return f"{prompt}, in the rain, as seen by a bird"


def changed(prompt: str) -> str:
    return longer(prompt) if prompt != "prompt 2" else "quite another text"


def table(folder: Path, told: Write | None = longer) -> Path:
    """prompts.csv of a folder of clips."""
    path = folder / "prompts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "prompt", "index", *(["told"] if told else [])])
        for video in sorted(folder.glob("*.mp4")):
            prompt, _, index = video.stem.rpartition("-")
            writer.writerow([video.name, prompt, index, *([told(prompt)] if told else [])])
    return path


def records(folder: Path, told: Write = longer, extended: str | None = "e" * 64) -> Path:
    """What ``vbench sample`` would have left."""
    beside = records_of(folder)
    beside.mkdir()
    with (beside / TABLE).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "told", "index", "seed", "file", "sha256"])
        for number, video in enumerate(sorted(folder.glob("*.mp4"))):
            prompt, _, index = video.stem.rpartition("-")
            row = [prompt, told(prompt), index, 40 + number, video.name, file_sha256(video)]
            writer.writerow(row)
    inputs = {"prompts": "a" * 64} | ({} if extended is None else {"extended": extended})
    whose = "nobody: short prompts" if extended is None else KNOWN.get(extended, "unknown")
    record = {
        "identity": {"inputs": inputs, "seed": 3, "config": {}},
        "prompts": {"from": "file.txt", "known_as": "unknown", "extended_by": whose},
    }
    (beside / RECORD).write_text(json.dumps(record))
    return beside


@pytest.fixture
def clips(tmp_path: Path, seed: int) -> Path:
    return write_clips(tmp_path / "clips", PROMPTS, seed)


@pytest.fixture
def other(tmp_path: Path, seed: int) -> Path:
    return write_clips(tmp_path / "other", PROMPTS, seed + 5000)


@pytest.fixture
def protocol(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Run the fake worker over a folder; the run's folder and its protocol."""

    def scored(folder: Path, **more: Any) -> tuple[Path, dict[str, Any]]:
        out = tmp_path / f"run of {folder.name}"
        run_fake(monkeypatch, folder, out, model=folder.name, **more)
        return out, read_result(out).run["identity"]["config"]["protocol"]

    return scored


Scored = Callable[..., tuple[Path, dict[str, Any]]]


def test_the_column_told_is_part_of_the_protocol(
    clips: Path, other: Path, protocol: Scored
) -> None:
    table(clips)
    table(other, None)
    one, held = protocol(clips)
    assert held["extended"] is None
    assert held["extended_by"] == "unknown: the column told of prompts.csv"
    expected = hashlib.sha256(longer("prompt 1").encode()).hexdigest()
    assert expected.startswith(held["told_texts"]["prompt 1"]) and len(held["told"]) == 64
    two, short = protocol(other)
    assert (short["told"], short["told_texts"]) == (None, {})
    assert short["extended_by"] == "nobody: short prompts"
    with pytest.raises(UserError, match=r"what the models were told \(sha256\): \w{12} against no"):
        compare([one, two])


def test_other_texts_for_the_same_prompts_are_refused_and_counted(
    clips: Path, other: Path, protocol: Scored
) -> None:
    # the files of prompts would differ too, so both runs are given no table but the records
    records(clips)
    records(other, changed)
    runs = [protocol(folder)[0] for folder in (clips, other)]
    with pytest.raises(UserError, match=r"other texts for 1 of 3 prompts, such as 'prompt 2'"):
        compare(runs)


def test_the_same_texts_are_alike_whichever_file_tells_them(
    clips: Path, other: Path, protocol: Scored
) -> None:
    (other / "prompt 1-1.mp4").unlink()
    (other / "prompt 1-0.mp4").unlink()
    records(clips)
    records(other)
    one, first = protocol(clips)
    two, second = protocol(other)
    assert first["told"] != second["told"]
    assert not compare([one, two]).unlike
    # the user's file alone, of the same hash, is as good
    assert set(first["told_texts"]) > set(second["told_texts"])


def test_long_videos_of_other_prompts_than_vbenchs_have_their_own_prompt_file(
    clips: Path, other: Path, protocol: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = {prompt: Entry(prompt, frozenset({"temporal_flickering"})) for prompt in PROMPTS}
    monkeypatch.setattr(running, "suite_of", lambda _: (suite, "f" * 64))
    options = LongOptions(load_configs(None), exact=False, dev=False)
    long: dict[str, Any] = {"mode": "long", "long": options}
    assert protocol(clips, **long)[1]["prompts"] == "f" * 64
    listed = table(other, None)
    listed.write_text(listed.read_text().replace("prompt 1", "a prompt of ours"))
    for video in sorted(other.glob("prompt 1-*")):
        video.rename(other / video.name.replace("prompt 1", "a prompt of ours"))
    assert protocol(other, **long)[1]["prompts"] == file_sha256(listed)


def test_told_as_the_prompt_itself_is_short(clips: Path, protocol: Scored) -> None:
    table(clips, str)
    _, held = protocol(clips)
    assert held["told"] is None and held["extended_by"] == "nobody: short prompts"


def test_what_sampling_recorded_needs_no_option(
    clips: Path, other: Path, protocol: Scored, tmp_path: Path
) -> None:
    file = tmp_path / "longer.txt"
    file.write_text("".join(f"{longer(prompt)}\n" for prompt in PROMPTS))
    records(clips, extended=file_sha256(file))
    one, held = protocol(clips)
    assert (held["extended"], held["extended_by"]) == (file_sha256(file), "unknown")
    assert held["sampled"] == "a" * 64 and held["told"]
    # clips of somebody else, of which only the file is known
    two, named = protocol(other, extended=file)
    assert named["told"] is None and not compare([one, two]).unlike
    assert protocol(clips, extended=file)[1] == held


def test_known_files_are_named(clips: Path, protocol: Scored) -> None:
    known = next(sha for sha, name in KNOWN.items() if name == "Self-Forcing's")
    records(clips, extended=known)
    assert protocol(clips)[1]["extended_by"] == "Self-Forcing's"


@pytest.mark.parametrize(
    ("extended", "says"), [("e" * 64, r"was told unknown \(eeee"), (None, "told the short prompts")]
)
def test_an_option_against_the_record_is_refused_before_anything_is_scored(
    clips: Path, protocol: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    extended: str | None, says: str,
) -> None:  # fmt: skip
    records(clips, extended=extended)
    file = tmp_path / "longer.txt"
    file.write_text("something else\n")
    monkeypatch.setattr(scoring, "drive", None)
    with pytest.raises(UserError, match=says):
        protocol(clips, extended=file)


def test_a_table_against_the_option_or_the_record_is_refused(
    clips: Path, protocol: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "drive", None)
    table(clips)
    file = tmp_path / "longer.txt"
    file.write_text("".join(f"{changed(prompt)}\n" for prompt in PROMPTS))
    with pytest.raises(UserError, match=r"told for prompt 2-0.mp4, which --extended .* not hold"):
        protocol(clips, extended=file)
    records(clips, changed)
    with pytest.raises(UserError, match=r"samples.csv that it was 'quite another text'"):
        protocol(clips)


def test_a_damaged_record_is_told(clips: Path, protocol: Scored) -> None:
    beside = records(clips)
    (beside / RECORD).write_text('{"identity": {}}')
    with pytest.raises(UserError, match=r"clips.sampling says how .* cannot be read \(KeyError"):
        protocol(clips)


def test_seeds_are_recorded_of_videos_that_are_as_sampled_and_are_no_reason_to_refuse(
    clips: Path, other: Path, protocol: Scored, seed: int
) -> None:
    for folder in (clips, other):
        records(folder, str, extended=None)
    write_clip(other / "prompt 1-0.mp4", seed=seed + 31)
    (one, first), (two, second) = protocol(clips), protocol(other)
    kept = read_result(one).run["observed"]["sampling"]
    assert kept["seeds"]["prompt 0-1.mp4"] == 41 and kept["seed"] == 3
    lost = read_result(two).run["observed"]["sampling"]
    assert "prompt 1-0.mp4" not in lost["seeds"] and lost["other_content"] == 1
    told = seeds_text(read_result(two).run["observed"])
    assert told.startswith("seeds of 5 videos, 40 to 45, from base seed 3; 1 were changed since")
    assert first["told"] is second["told"] is None
    assert not compare([one, two]).unlike
