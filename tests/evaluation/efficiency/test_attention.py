"""The layers that are compared are right, and a wrong one gets no number."""

from __future__ import annotations

import math

import pytest
import torch

from mla_study.commands.bench_attention import BenchAttention
from mla_study.commands.dispatch import Calibrate
from mla_study.errors import UserError
from mla_study.evaluation.efficiency import attention
from mla_study.evaluation.efficiency.attention import (
    BASES,
    DENSE,
    bench_attention,
    check,
    compare,
    goal_rows,
    make_step,
)
from mla_study.evaluation.efficiency.ceilings import Ceilings
from mla_study.evaluation.goals import Row
from mla_study.evaluation.timing import Spread

CPU = torch.device("cpu")
LIMITS = Ceilings(Spread(1e11, 1e11, 1e11), Spread(8e10, 8e10, 8e10), Spread(2e10, 2e10, 2e10))


@pytest.mark.parametrize("variant", [*BASES, "reconstruct", "absorbed", "auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_is_right(variant: str, dtype: torch.dtype) -> None:
    assert check(variant, "quarter", CPU, dtype) is None


def test_a_wrong_variant_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.LatentSelfAttention.mix

    def wrong(self, *rest):  # type: ignore[no-untyped-def]
        return right(self, *rest) * (1.02 if self.form == "absorbed" else 1.0)

    monkeypatch.setattr(attention.LatentSelfAttention, "mix", wrong)
    found = compare("quarter", 3, 40, CPU, torch.float32, 2)
    assert set(found.wrong) == {"absorbed"}
    rows = {row["variant"]: row for row in found.rows(LIMITS)}
    assert "exceeds" in rows["absorbed"]["problem"] and "seconds" not in rows["absorbed"]
    assert rows["reconstruct"]["seconds"] > 0
    told = goal_rows(found)
    assert any("absorbed: error" in row.quantity and math.isnan(row.value) for row in told)
    assert not any(row.quantity.startswith("layer, absorbed /") for row in told)


def test_without_a_base_there_are_no_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "check", lambda v, *rest: "wrong" if v in BASES else None)
    found = compare("quarter", 3, 40, CPU, torch.float32, 2)
    rows = {row["variant"]: row for row in found.rows(LIMITS)}
    assert "seconds" in rows["auto"] and "to_dense" not in rows["auto"]
    assert [row.quantity for row in goal_rows(found)].count("layer, absorbed / reconstruct") == 1


def test_the_fused_kernel_counts_as_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare("quarter", 2, 40, CPU, torch.float32, 1)
    monkeypatch.setattr(attention.LatentSelfAttention, "form_for", lambda *_: "absorbed_triton")
    assert found.form("auto") == "absorbed_triton"
    assert found.cost("auto") == found.cost("absorbed") != found.cost("reconstruct")


def test_nothing_to_measure_is_said() -> None:
    for empty in (BenchAttention(shapes=()), BenchAttention(dtypes=())):
        with pytest.raises(UserError, match="give at least one"):
            empty.run()
    with pytest.raises(UserError, match="--dtypes is empty"):
        Calibrate(dtypes=()).run()


def test_a_row_counts_what_runs() -> None:
    found = compare("quarter", 2, 64, CPU, torch.float32, 2)
    rows = {row["variant"]: row for row in found.rows(LIMITS)}
    d, d_c, d_q = 384, 48, 192
    dense = 4 * 3 * 2 * 64 * 128 + 2 * 2 * 4 * d * d
    assert rows[DENSE]["flops"] == dense
    made = 2 * 64 * d_c * 3 * (96 + 128) + 4 * 3 * 2 * 64 * 128
    projected = 2 * 2 * (d * (d_c + 32 + d_q) + d_q * 384 + d * d)
    assert rows["reconstruct"]["flops"] == made + projected
    assert rows["auto"]["form"] in ("absorbed", "reconstruct")
    assert rows[DENSE]["to_dense"] == 1.0 and rows[DENSE]["bound_to_dense"] == 1.0


def test_the_ring_is_written_in_place() -> None:
    step = make_step("absorbed", "quarter", 3, 10, CPU, torch.float32, 1)
    before = step.rings[0].entry[0].clone()
    with torch.no_grad():
        step.call()()
        fresh, _ = step.layer.entry(step.inputs[0])
    after = step.rings[0].entry[0]
    assert torch.equal(after[:, :7], before[:, :7])
    assert torch.allclose(after[:, 7:], fresh)


def test_the_whole_benchmark_tells_rows_as_they_come() -> None:
    told: list[Row] = []
    rows, table = bench_attention([(2, 33)], ("quarter",), ("fp32",), CPU, 2, told.extend)
    assert told == rows
    assert len(table) == 5 and (table["problem"] == "").all()
    with pytest.raises(UserError, match="among the keys"):
        compare("quarter", 5, 4, CPU, torch.float32)
