"""``mla-study bench memory`` and ``bench batch`` pass their options on."""

from __future__ import annotations

import pytest

from mla_study.cli import main
from mla_study.evaluation.efficiency import bench_memory


@pytest.mark.parametrize("name", ["memory", "batch"])
def test_options_arrive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def fake(write: bool, measure: bool) -> int:
        seen.append((write, measure))
        return 0

    monkeypatch.setattr(bench_memory, f"bench_{name}", fake)
    assert main(["bench", name]) == 0
    assert main(["bench", name, "--no-write", "--no-measure"]) == 0
    assert seen == [(True, True), (False, False)]
