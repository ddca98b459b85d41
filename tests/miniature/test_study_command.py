"""``mla-study study``: what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_study.cli import main


@pytest.mark.parametrize("workers", ["0", "-2"])
def test_workers_are_at_least_one(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "mini", "--store", str(tmp_path / "store"), "--workers", workers]) == 2
    assert f"--workers is {workers}, but it must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
