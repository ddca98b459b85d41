"""``mla-study mask`` prints the rule and refuses numbers that make none."""

from __future__ import annotations

import pytest

from mla_study.commands.mask import Mask
from mla_study.errors import UserError


def test_it_prints_frames_positions_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert Mask(chunks=4, sink=1, window=6).run() == 0
    *rows, told = capsys.readouterr().out.splitlines()
    assert len(rows) == 12
    assert rows[9].split() == [
        "9",
        "@9",
        "#..#########",
        "0@0",
        *(f"{i}@{i}" for i in range(3, 12)),
    ]
    assert "at most 10 key frames" in told and "84 of 144 pairs" in told


def test_relative_teacher_forcing(capsys: pytest.CaptureFixture[str]) -> None:
    Mask(chunks=3, chunk=1, sink=1, window=0, teacher_forcing=True, relative=True).run()
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "c0 @0   #.....  c0@0",
        "c1 @1   ##....  c0@0 c1@1",
        "c2 @1   #.#...  c0@0 c2@1",
        "n0 @0   ...#..  n0@0",
        "n1 @1   #...#.  c0@0 n1@1",
        "n2 @1   #....#  c0@0 n2@1",
    ]


def test_without_a_window_all_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Mask(chunks=2, chunk=2).run()
    assert "all earlier frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    "numbers", [{"chunks": 0}, {"chunk": 0}, {"sink": -1}, {"window": -1}, {"chunks": -2}]
)
def test_refusals(numbers: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Mask(**numbers).run()
