"""Tables of memory: every row has its class, what fails for memory says so, and goals are told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from mla_study.evaluation.efficiency import bench_memory as bench
from mla_study.evaluation.efficiency.bench_memory import (
    KINDS,
    NO_GPU,
    PAPER,
    Kind,
    batch_goals,
    batch_table,
    closed_form,
    on_gpu,
    small_scale,
)
from mla_study.evaluation.efficiency.step_memory import StepMemory
from mla_study.study.notebooks import Project
from mla_study.study.runs import read_result


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return batch_table(pd.read_csv(Path(__file__).resolve().parents[3] / PAPER))


def test_the_paper_is_within_five_percent_and_only_there_at_21_frames(table: pd.DataFrame) -> None:
    told = table[table["paper_slope_gb"].notna()]
    assert set(told["window"]) == {"21 frames"} and set(table["provenance"]) == {"modelled"}
    made = told[(told["transient"] == "k_nope and v") | (told["layout"] == "dense")]
    assert made["error"].abs().max() < 0.05
    # a count of what our own step holds, nothing fitted: latent rows near the paper as well
    latent = made[made["layout"] == "mla"]
    assert (latent["counted_slope_gb"] / latent["paper_slope_gb"] - 1).abs().max() < 0.05
    assert len(table) == 3 + 3 * 4 * 5
    assert table["reduction"].iloc[0] == 0 and table["headroom"].iloc[0] == 1


def test_goals_are_told_for_both_windows(table: pd.DataFrame) -> None:
    goals = {(row.quantity, row.setting): row for row in batch_goals(table)}
    assert goals["slope, d_c 192, bf16", "1 + 6 with chunk, closed form"].met
    assert goals["slope, d_c 192, int8, head by head", "1 + 6 with chunk, closed form"].met
    assert not goals["slope, d_c 192, bf16", "1 + 6 + chunk, closed form"].met
    assert all(row.met for row in goals.values() if "largest batch" in row.quantity)


def test_a_gpu_out_of_memory_gives_a_row_and_the_next_kind_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fake(step: object, device: torch.device) -> StepMemory:
        if step.batch > 2:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return StepMemory(10**9, 10**8, 10**7, 10**6)

    monkeypatch.setattr(bench, "measured", fake)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    rows = list(on_gpu(KINDS[:2], ["21 frames"], (1, 2, 4, 8)))
    assert [row["status"] for row in rows] == ["ok", "ok", "OOM"] * 2
    assert "peak_gb" not in rows[2] and rows[0]["total_gb"] == pytest.approx(1.111)
    monkeypatch.setattr(bench, "measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(on_gpu(KINDS[:1], ["21 frames"], (1,)))


def test_small_scale_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(step: object) -> StepMemory:
        if step.form == "absorbed":  # type: ignore[attr-defined]
            raise MemoryError
        return StepMemory(1, 2, 3, 4)

    monkeypatch.setattr(bench, "in_child", fake)
    rows = list(small_scale((1,)))
    assert {row["form"]: row["status"] for row in rows} == {
        "dense": "ok", "reconstruct": "ok", "absorbed": "OOM",
    }  # fmt: skip
    assert all(row["counted_peak_gb"] > 0 for row in rows)


def test_closed_form_rows() -> None:
    row = closed_form(Kind("absorbed", "int8-token"), "1 + 6 + chunk")
    parts = row["cache_gb"] + row["activations_gb"] + row["transient_gb"]
    assert row["slope_gb"] == pytest.approx(parts)
    assert row["transient"] == "absorbed queries" and row["frames"] == 10


def test_the_commands_write_what_they_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).resolve().parents[3]
    place = SimpleNamespace(root=root, data=tmp_path)
    monkeypatch.setattr(Project, "find", staticmethod(lambda: place))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "WINDOWS", {"21 frames": bench.WINDOWS["21 frames"]})
    assert bench.bench_memory(measure=False) == 0
    found = read_result(tmp_path / "bench_memory")
    assert found.provenance == "modelled" and NO_GPU in found.run["notes"]
    assert set(found.tables) == {"table"} and len(found.table) == len(KINDS)
    assert bench.bench_batch() == 0
    found = read_result(tmp_path / "fig7_batch_scaling")
    assert set(found.tables) == {"table", "goals"}
    assert NO_GPU in capsys.readouterr().out
