"""Names, seeds and shares of the videos that are to be sampled."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from mla_study.errors import UserError
from mla_study.evaluation.vbench import prompts as prompts_module
from mla_study.evaluation.vbench.sampling.plan import (
    LINES,
    PromptSet,
    file_name,
    parse_shard,
    prompt_set,
    samples,
    seed_of,
    shard_of,
)

GROUPS = (
    ["subject_consistency", "dynamic_degree", "motion_smoothness"],
    ["temporal_flickering"],
    ["scene", "background_consistency"],
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A list of VBench's form: 946 lines of three kinds, the last a repetition of the first."""
    rows = [{"prompt_en": f"a cat, no. {n}.", "dimension": GROUPS[n % 3]} for n in range(LINES - 1)]
    rows.append({"prompt_en": rows[0]["prompt_en"], "dimension": ["human_action"]})
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(rows))
    return tmp_path


def vbench(package: Path, extended: Path | None = None, count: int | None = None) -> PromptSet:
    name = "vbench" if extended is None else "vbench-extended"
    return prompt_set(name, extended, package, count, 0)


def test_five_of_a_prompt_and_twenty_five_of_flickerings(package: Path) -> None:
    prompts = vbench(package)
    wanted = samples(prompts)
    counts = Counter(sample.prompt for sample in wanted)
    assert len(prompts.lines) == LINES - 1 and len({s.file for s in wanted}) == len(wanted)
    assert counts["a cat, no. 0."] == 5 and counts["a cat, no. 1."] == 25
    assert wanted[0].file == "a cat, no. 0.-0.mp4" and wanted[0].told == "a cat, no. 0."
    assert prompts.lines[0].dimensions == {*GROUPS[0], "human_action"}
    text = "".join(f"a cat, no. {n}.\n" for n in [*range(LINES - 1), 0])
    assert prompts.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert prompts.extended_by == "nobody: short prompts"


def test_dimensions_choose_the_prompts(package: Path) -> None:
    prompts = vbench(package)
    for names, kinds in (
        (["scene"], {2}),
        (["motion_smoothness[rife]"], {0}),
        (["temporal_flickering", "background_consistency"], {1, 2}),
    ):
        chosen = {int(s.prompt.split()[-1][:-1]) % 3 for s in samples(prompts, names)}
        assert chosen == kinds
    assert {s.prompt for s in samples(prompts, ["human_action"])} == {"a cat, no. 0."}
    with pytest.raises(UserError, match="clip_t take any video"):
        samples(prompts, ["clip_t"])
    with pytest.raises(UserError, match="did you mean 'scene'"):
        samples(prompts, ["scenes"])
    with pytest.raises(UserError, match="chooses among VBench's prompts"):
        samples(prompt_set("mini", None, None, 2, 0), ["scene"])
    with pytest.raises(UserError, match="raise --count"):
        samples(vbench(package, count=2), ["scene"])


def test_longer_prompts_are_told_and_short_ones_name(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extended = tmp_path / "longer.txt"
    extended.write_text("\n".join(f"A very long cat, number {n}." for n in range(LINES)))
    sha256 = hashlib.sha256(extended.read_bytes()).hexdigest()
    monkeypatch.setitem(prompts_module.KNOWN, sha256, "a friend's")
    prompts = vbench(package, extended)
    wanted = samples(prompts)
    assert prompts.extended_sha256 == sha256 and prompts.extended_by == "a friend's"
    assert (wanted[5].told, wanted[5].file) == (
        "A very long cat, number 1.",
        "a cat, no. 1.-0.mp4",
    )
    # of a prompt that is listed twice, the first text
    assert wanted[0].told == "A very long cat, number 0."
    extended.write_text("\n".join(["one"] * (LINES - 1)) + "\n")
    with pytest.raises(UserError, match="has 945 prompts, but 946 are wanted"):
        vbench(package, extended)
    with pytest.raises(UserError, match="needs --extended FILE"):
        prompt_set("vbench-extended", None, package, None, 0)
    with pytest.raises(UserError, match="give vbench-extended"):
        prompt_set("vbench", extended, package, None, 0)


def test_a_list_of_another_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["scene"]}]))
    with pytest.raises(UserError, match="has 1 prompts in place of 946"):
        vbench(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as VBench's list"):
        vbench(tmp_path)


def test_files_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n  a dog \n\n")
    found = prompt_set(str(path), None, None, None, 0)
    assert [line.prompt for line in found.lines] == ["a cat", "a dog"]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(samples(found)) == 10
    path.write_text("a cat\n\na dog\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        prompt_set(str(path), None, None, None, 0)
    for text in ("", "\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="holds no prompt"):
            prompt_set(str(path), None, None, None, 0)
    with pytest.raises(UserError, match="cannot be read as a file of prompts"):
        prompt_set(str(tmp_path / "none"), None, None, None, 0)


def test_mini_draws_unlike_captions_and_keeps_them() -> None:
    few, many = (prompt_set("mini", None, None, count, 3) for count in (4, 300))
    texts = [line.prompt for line in many.lines]
    assert len(set(texts)) == 300 and texts[:4] == [line.prompt for line in few.lines]
    assert few.sha256 == many.sha256
    assert len(samples(prompt_set("mini", None, None, None, 0))) == 16
    with pytest.raises(UserError, match="the world has 5184"):
        prompt_set("mini", None, None, 6000, 0)
    for call in (
        lambda: prompt_set("mini", None, None, 0, 0),
        lambda: samples(few, each=0),
    ):
        with pytest.raises(UserError, match="at least 1"):
            call()


def test_seeds_depend_on_prompt_and_index_alone(package: Path) -> None:
    everything = {s.file: s.seed for s in samples(vbench(package))}
    some = samples(vbench(package), ["scene"], 2)
    assert all(everything[s.file] == s.seed for s in some)
    assert len(set(everything.values())) > 0.999 * len(everything)
    assert seed_of(0, "a", 1) != seed_of(1, "a", 1) != seed_of(1, "a", 0)
    assert 0 <= max(everything.values()) < 2**31


def test_shares_partition(package: Path) -> None:
    wanted = samples(vbench(package))
    shares = [shard_of(wanted, index, 7) for index in range(7)]
    assert sorted(s.file for share in shares for s in share) == sorted(s.file for s in wanted)
    prompts = [{s.prompt for s in share} for share in shares]
    assert sum(map(len, prompts)) == LINES - 1
    assert max(map(len, shares)) < 1.1 * min(map(len, shares))
    assert shard_of(wanted, 0, 1) == wanted


def test_what_names_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parse_shard(None) == (0, 1) and parse_shard("2/3") == (2, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_shard(None) == (1, 4) and parse_shard("0/1") == (0, 1)
    for text in ("3/3", "1", "a/2", "-1/2", "0/0"):
        with pytest.raises(UserError, match="give I/N"):
            parse_shard(text)


def test_prompts_that_no_file_can_be_named_by() -> None:
    assert file_name("a cat - and a dog.", 3, 7) == "a cat - and a dog.-3.mp4"
    for prompt in ("24/7 news", ".hidden", "é" * 121):
        assert file_name(prompt, 1, 7) == "prompt 0007-1.mp4"
    assert len(file_name("é" * 120, 24, 0).encode()) < 255
