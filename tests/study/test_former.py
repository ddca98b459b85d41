"""What a figure drew earlier and no longer draws: removed where that is known, else left."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_study.errors import UserError
from mla_study.study import former, staleness
from mla_study.study.runs import file_sha256, json_sha256, read_record

VALUES = {"slope": 1.5}


@pytest.fixture
def stamp(tmp_path: Path) -> Path:
    """Of a drawing of two files with :data:`VALUES`, which lie in ``out``."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("fig1.svg", "fig1_measured.svg", "fig2.svg"):
        (out / name).write_text(name)
    hashes = {name: file_sha256(out / name) for name in ("fig1.svg", "fig1_measured.svg")}
    file = out / ".stamps" / "fig1.json"
    staleness.write_stamp(file, {"parameters": json_sha256(VALUES)}, hashes)
    return file


def test_only_recorded_files_that_stand_as_drawn_are_removed(stamp: Path) -> None:
    out = stamp.parents[1]
    held = read_record(stamp)
    assert former.remove(out, held, {"fig1.svg", "fig1_measured.svg"}) == []
    (told,) = former.remove(out, held, {"fig1.svg"})
    assert told == "removed fig1_measured.svg, which it no longer draws"
    (out / "fig1.svg").write_text("edited")
    assert former.remove(out, held) == ["no longer draws fig1.svg, left as edited by hand"]
    assert sorted(p.name for p in out.glob("*.svg")) == ["fig1.svg", "fig2.svg"]
    # a stamp that names a file elsewhere, or says nothing, removes nothing
    beside = out.parent / "beside.txt"
    beside.write_text("mine")
    assert former.remove(out, {"outputs": {"../beside.txt": file_sha256(beside)}}) == []
    assert former.remove(out, {}) == former.remove(out, {"outputs": None}) == []
    assert beside.exists()


def test_a_drawing_is_withdrawn_by_its_own_parameters(stamp: Path) -> None:
    out = stamp.parents[1]
    assert former.withdraw(stamp, out, {"slope": 2.0}) == []
    assert len(list(out.glob("*.svg"))) == 3
    (told,) = former.withdraw(stamp, out, VALUES)
    assert "fig1.svg, fig1_measured.svg" in told
    assert [p.name for p in out.glob("*.svg")] == ["fig2.svg"]
    assert not stamp.exists()
    assert former.withdraw(stamp, out, VALUES) == []


def test_what_cannot_be_removed_is_told(stamp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"fig1\.svg .*Permission denied"):
        former.withdraw(stamp, stamp.parents[1], VALUES)
