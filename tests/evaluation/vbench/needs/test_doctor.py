"""The doctor tells the truth of empty, right, wrong and unreadable places."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from evaluation.vbench import vbench_places as places

from mla_study.commands.vbench_weights import Doctor
from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, SCORERS
from mla_study.evaluation.vbench.needs import weights
from mla_study.evaluation.vbench.needs.doctor import Report, examine
from mla_study.evaluation.vbench.needs.doctor_text import text
from mla_study.evaluation.vbench.needs.environment import (
    find_environment,
    require_versions,
    variables,
)
from mla_study.evaluation.vbench.needs.fetch import plan
from mla_study.evaluation.vbench.needs.items import CLIP_T_KEYS, ITEMS, NEEDS, needed_by
from mla_study.evaluation.vbench.runs.videos import find


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLA_STUDY_VBENCH_ENV", str(places.environment(tmp_path / "env")))
    monkeypatch.delenv("MLA_STUDY_ASSETS", raising=False)
    monkeypatch.delenv("VBENCH_CACHE_DIR", raising=False)
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def ready(report: Report) -> set[str]:
    return {row.name for row in report.rows if row.ready}


def test_every_scorer_and_every_item_is_in_the_tables() -> None:
    assert set(SCORERS) <= set(NEEDS)
    for name in NEEDS:
        assert all(key in ITEMS for key in needed_by(name, "long"))
    used = {key for name in NEEDS for key in needed_by(name)} | {weights.DETECTRON2, *CLIP_T_KEYS}
    assert used == set(ITEMS)
    for item in ITEMS.values():
        assert not Path(item.place).is_absolute() and ".." not in Path(item.place).parts
        assert item.by_hand or item.url.startswith("https://"), item.key
        assert bool(item.sha256) == bool(item.hash_from), item.key
        assert item.sha256 is None or len(item.sha256) == (8 if item.hash_from == "name" else 64)
    assert len({item.place for item in ITEMS.values()}) == len(ITEMS)


def test_an_empty_folder_makes_only_flickering_ready(home: Path) -> None:
    report = examine(weights=home)
    assert [row.name for row in report.rows][:16] == list(DIMENSIONS)
    assert ready(report) == {"temporal_flickering"}
    assert not report.ready
    assert "detectron2" in next(r for r in report.rows if r.name == "color").lacks
    shown = text(report)
    assert shown.splitlines()[1].startswith("subject_consistency")
    assert "1 of 16 asked for are ready" in shown
    lines = shown.splitlines()
    for key in set(ITEMS) - set(CLIP_T_KEYS):
        assert sum(line.startswith(f"  {key}: ") for line in lines) == 1, key
        assert str(home / ITEMS[key].place) in shown
        assert ITEMS[key].url in shown


def test_a_file_changes_its_dimension_by_its_size_and_hash(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = places.small(monkeypatch, "clip_b32", b"weights")
    path = places.put(home, "clip_b32", b"weights")
    found = weights.look("clip_b32", home)
    assert (found.name, found.sentence) == ("ready", "")
    assert ready(examine(weights=home)) >= {"background_consistency", "appearance_style"}

    path.write_bytes(b"WEIGHTS")
    found = weights.look("clip_b32", home)
    assert found.name == "damaged"
    assert "sha256" in found.sentence and str(path) in found.sentence
    path.write_bytes(b"weight")
    found = weights.look("clip_b32", home)
    assert found.name == "damaged" and "6 bytes instead of 7" in found.sentence
    path.write_bytes(b"<html>no")
    assert "a web page" in weights.look("clip_b32", home).sentence
    report = examine(weights=home, dimensions=("background_consistency",), trust=True)
    assert not report.ready, "the user's word does not mend a published hash"
    assert item.sha256 is not None and item.sha256 in text(report)


def test_eight_digits_of_a_name_are_enough_and_none_needs_the_users_word(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = places.small(monkeypatch, "musiq_spaq", b"musiq").sha256
    assert full is not None
    places.small(monkeypatch, "musiq_spaq", b"musiq", sha256=full[:8])
    places.put(home, "musiq_spaq", b"musiq")
    assert weights.look("musiq_spaq", home).name == "ready"
    assert weights.look("musiq_spaq", home).sha256 == full

    places.small(monkeypatch, "hpsv3", b"hps", sha256=None)
    places.put(home, "hpsv3", b"hps")
    found = weights.look("hpsv3", home)
    assert found.name == "unknown" and "--trust-weights" in found.sentence
    assert found.usable(trust=True) and not found.usable()


def test_a_hash_that_was_only_recorded_can_be_overruled(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places.small(monkeypatch, "amt_s", b"amt")
    places.put(home, "amt_s", b"AMT")
    found = weights.look("amt_s", home)
    assert found.name == "unknown" and "that others had" in found.sentence
    assert "motion_smoothness" in ready(examine(weights=home, trust=True))


def test_a_run_is_refused_in_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.require(["temporal_flickering"], home)
    with pytest.raises(UserError, match=r"ViT-L-14\.pt is missing.*; 1 more: .*doctor"):
        weights.require(["aesthetic_quality"], home)
    places.small(monkeypatch, "dino_vitb16", b"dino", sha256=None)
    places.put(home, "dino_vitb16", b"dino")
    with pytest.raises(UserError, match="--trust-weights uses it on your word"):
        weights.require(["subject_consistency"], home, without=["dino_hub"])
    weights.require(["subject_consistency"], home, without=["dino_hub"], trust=True)


def test_hashes_are_kept_by_size_and_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places.small(monkeypatch, "amt_s", b"amt")
    path = places.put(home, "amt_s", b"amt")
    place = ITEMS["amt_s"].place
    first = weights.fingerprint("motion_smoothness", home)
    assert first == {place: ITEMS["amt_s"].sha256}
    assert place in json.loads((home / ".sha256.json").read_text())
    monkeypatch.setattr(weights, "file_sha256", lambda path: pytest.fail("read again"))
    assert weights.fingerprint("motion_smoothness", home) == first
    monkeypatch.undo()
    path.write_bytes(b"AMT")
    os.utime(path, ns=(1, 1))
    assert weights.fingerprint("motion_smoothness", home) != first


def test_clip_t_reads_its_own_folder_where_there_is_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("clip_b32", "clip_vocabulary"):
        places.small(monkeypatch, key, b"clip")
        places.put(home, key, b"clip")
    assert {"clip_t", "clip_f"} <= ready(examine(weights=home))
    (home / "clip_t").mkdir()
    assert not {"clip_t", "clip_f"} & ready(examine(weights=home))
    with pytest.raises(UserError, match=r"clip_t/pytorch_model\.bin is missing"):
        weights.require(["clip_t"], home)


def test_random_weights_say_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places.small(monkeypatch, "clip_b32", b"weights")
    places.put(home, "clip_b32", b"noise")
    (home / "RANDOM_WEIGHTS.json").write_text(json.dumps([ITEMS["clip_b32"].place]))
    found = weights.look("clip_b32", home)
    assert found.name == "unknown" and "random numbers" in found.sentence
    assert weights.is_random(home, ["clip_b32"]) and not weights.is_random(home, ["clip_l14"])


def test_code_of_another_revision_needs_the_users_word(home: Path) -> None:
    hub = home / ITEMS["dino_hub"].place
    hub.mkdir(parents=True)
    assert weights.look("dino_hub", home).name == "damaged"
    (hub / "hubconf.py").write_text("import os\n")
    found = weights.look("dino_hub", home)
    assert found.name == "unknown" and "revision 7c446df5" in found.sentence


def test_detectron2_may_be_a_checkout_installed_or_below_the_weights(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no checkout of detectron2"):
        examine(weights=home, detectron2=tmp_path)
    checkout = tmp_path / "d2"
    (checkout / "detectron2").mkdir(parents=True)
    (checkout / "detectron2" / "__init__.py").write_text("")
    report = examine(weights=home, detectron2=checkout)
    assert str(checkout) in report.detectron2 and "detectron2" not in report.missing()
    assert weights.find_detectron2(checkout, home) == checkout
    assert weights.find_detectron2(None, home, installed=True) is None
    with pytest.raises(UserError, match="--detectron2 PATH"):
        weights.find_detectron2(None, home)
    (checkout).rename(home / "detectron2")
    assert weights.find_detectron2(None, home, trust=True) == home / "detectron2"


def test_modes_ask_for_different_things(home: Path) -> None:
    custom = examine(weights=home, mode="custom")
    assert {row.name for row in custom.rows if row.asked} == {
        name for name, one in DIMENSIONS.items() if one.free
    }
    assert next(r for r in custom.rows if r.name == "scene").troubles
    long = examine(weights=home, mode="long")
    assert "dreamsim" in next(r for r in long.rows if r.name == "background_consistency").lacks


def test_the_environment_is_told_truthfully(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = places.environment(tmp_path / "other", numpy="2.1.0")
    report = examine(weights=home, environment=other)
    assert "numpy 2.1.0 (wants 1.26.4)" in report.environment
    assert not ready(report)
    with pytest.raises(UserError, match=r"numpy 2\.1\.0"):
        require_versions(find_environment(other))
    absent = examine(weights=home, environment=tmp_path / "none")
    assert "make setup-vbench" in absent.environment and not absent.environment_ready
    assert "no environment to ask" in absent.devices
    good = find_environment()
    assert good.root == tmp_path / "env" and good.versions["torch"] == "2.5.1"
    require_versions(good, long=True)
    (good.python).write_text("#!/bin/sh\necho boom >&2; exit 1\n")
    assert "boom" in examine(weights=home).devices


def test_variables_keep_a_worker_offline_and_below_the_weights(tmp_path: Path) -> None:
    told = variables(tmp_path / "w", tmp_path / "d2")
    assert told["VBENCH_CACHE_DIR"] == str(tmp_path / "w")
    assert told["TORCH_HOME"] == str(tmp_path / "w" / "torch")
    assert told["HF_HUB_OFFLINE"] == "1"
    assert told["PYTHONPATH"] == str(tmp_path / "d2")
    assert variables(tmp_path)["PYTHONPATH"] == ""


def test_the_command_prints_json_and_its_exit_code_says_whether_all_is_ready(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Doctor(weights=home, json=True).run() == 2
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] is False
    assert [row["name"] for row in told["scorers"]][:16] == list(DIMENSIONS)
    one = next(entry for entry in told["missing"] if entry["key"] == "clip_b32")
    assert one["place"] == str(home / "clip_model" / "ViT-B-32.pt")
    assert one["bytes"] == 353_976_522 and one["sha256"].startswith("40d36571")
    assert Doctor(weights=home, dimensions=("temporal_flickering",)).run() == 0
    assert "1 of 1 asked for are ready" in capsys.readouterr().out


def test_videos_give_times_only_where_they_were_measured(home: Path, assets: Path) -> None:
    clips = assets / "clips" / "wan2.1_taew_decoded_cheesecake.mp4"
    report = examine(weights=home, videos=clips)
    assert report.folder is not None
    assert (report.folder.videos, report.folder.frames) == (1, 81)
    times = {row.name: row.seconds for row in report.rows}
    assert times["subject_consistency"] == pytest.approx(53)
    assert times["human_action"] == 62
    assert times["dynamic_degree"] is None and times["color"] is None
    assert "of which no time is known" in text(report)


def test_odd_places_are_told_in_one_sentence(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file, but the weights need a folder"):
        examine(weights=file)
    with pytest.raises(UserError, match="did you mean 'color'"):
        examine(weights=home, dimensions=("colour",))
    with pytest.raises(UserError, match="is not there: give a folder of videos"):
        examine(weights=home, videos=tmp_path / "none")
    places.put(home, "clip_b32", b"")
    (home / "RANDOM_WEIGHTS.json").write_text("{")
    with pytest.raises(UserError, match=r"RANDOM_WEIGHTS\.json"):
        examine(weights=home)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_told(home: Path) -> None:
    home.chmod(0)
    try:
        with pytest.raises(UserError, match="cannot be read"):
            examine(weights=home)
    finally:
        home.chmod(0o755)


def test_of_what_was_asked_for_by_name_nothing_else_is_listed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = examine(weights=home)
    places.small(monkeypatch, "raft_things", b"flow")
    report = examine(weights=home, dimensions=("temporal_flickering",))
    shown = text(report)
    assert report.ready and report.unfiltered and len(shown.splitlines()) < 20
    assert not any(line.startswith("  ") for line in shown.splitlines())
    assert "missing or not usable" not in shown and "detectron2" not in shown
    assert "detectron2: " in text(examine(weights=home, dimensions=("color",)))
    hidden = len(everything.missing())
    assert shown.splitlines()[-1] == (
        f"not asked for: 24 of 24 others are not ready, {hidden} more items are missing; without "
        "--dimensions all are listed"
    )
    assert (
        "moving videos too, against VBench's protocol: its static_filter lacks raft_things" in shown
    )
    assert not examine(weights=home, dimensions=("temporal_flickering",), mode="custom").unfiltered
    # what is asked for and missing is listed, once
    one = text(examine(weights=home, dimensions=("dynamic_degree", "temporal_flickering")))
    assert "missing or not usable (1):" in one and f"{hidden - 1} more items are missing" in one
    assert one.count("  raft_things: ") == 1
    places.put(home, "raft_things", b"flow")
    report = examine(weights=home, dimensions=("temporal_flickering",))
    assert not report.unfiltered and "moving videos too" not in text(report)
    assert Doctor(weights=home, dimensions=("temporal_flickering",), json=True).run() == 0
    told = json.loads(capsys.readouterr().out)["missing"]
    assert told and not any(entry["asked"] for entry in told)


def test_custom_mode_says_what_it_cannot_do_as_a_run_would(home: Path) -> None:
    with pytest.raises(UserError, match="'color' needs videos made from VBench's prompts"):
        examine(weights=home, mode="custom", dimensions=("temporal_flickering", "color"))
    with pytest.raises(UserError, match="'color' needs videos made from VBench's prompts"):
        plan(home, ("color",), "custom")
    # of a group, what the mode has
    report = examine(weights=home, mode="custom", dimensions=("quality", "semantic"))
    assert len([row for row in report.rows if row.asked]) == 7


def test_the_doctor_counts_the_videos_that_a_run_would_look_at(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    (folder / "below").mkdir(parents=True)
    for name in ("b.mp4", "c.MP4", "a.webm", "d.mkv", "notes.txt", "below/e.mp4"):
        (folder / name).write_bytes(b"")
    report = examine(weights=home, videos=folder)
    assert report.folder is not None and report.folder.videos == 2 == len(find(folder))
    said = "a.webm and 1 more are left out: only .mp4 is read, convert what should count"
    assert said in text(report)
