"""A run's folder: one run, one process at a time, and free again where nothing was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_study.errors import UserError
from mla_study.training.folder import LOCK_FILE, TRAIN_FILE, claimed
from mla_study.training.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), False)


def refused(told: str, out: Path, run: dict[str, Any], made: bool = False) -> None:
    with pytest.raises(UserError, match=told), claimed(out, run, {}, ALONE, lambda: made):
        pass


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    first, other = {"seed": 1}, {"seed": 2}
    with claimed(tmp_path, first, {"threads": 1}, ALONE, lambda: False):
        # it may still be at its first step
        refused("is in use by another run", tmp_path, other)
        assert json.loads((tmp_path / TRAIN_FILE).read_text())["seed"] == 1
    with claimed(tmp_path, other, {}, ALONE, lambda: False):
        assert json.loads((tmp_path / TRAIN_FILE).read_text())["seed"] == 2
    refused("another run: seed: was 2, is 1", tmp_path, first, made=True)
    (tmp_path / TRAIN_FILE).write_text("{half")
    refused(r"train\.json cannot be read", tmp_path, other, made=True)


def test_without_locks_a_start_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unknown)
    with claimed(tmp_path, {"seed": 1}, {}, ALONE, lambda: False):
        pass
    refused("holds another run", tmp_path, {"seed": 2})
    (tmp_path / "file").write_text("")
    refused("cannot be written", tmp_path / "file", {})
    assert (tmp_path / LOCK_FILE).exists()
