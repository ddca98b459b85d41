"""Fitting finds rates that were put in, choices are judged by what was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_study.evaluation.efficiency import calibrate as calibrating
from mla_study.evaluation.efficiency.calibrate import (
    Point,
    check,
    checking_grid,
    choices,
    fit,
    fitting_grid,
    inputs,
    measure,
)
from mla_study.evaluation.timing import Spread
from mla_study.kernels.latent_attention.cost import Calibration, Form, Rates, Shape, costs

CPU = torch.device("cpu")
TRUE = Calibration(
    "?", "fp32", 1, 1.3e11, 2e10, Rates(9e10, 4.0, 2e-4), Rates(7e10, 20.0, 1e-4),
    value_is_key=True,
)  # fmt: skip


def synthetic(shapes: list[Shape], noise: float, seed: int) -> list[Point]:
    rng = np.random.default_rng(seed)
    points: list[Point] = []
    for shape in shapes:
        told = costs(shape, value_is_key=True)
        for form in ("reconstruct", "absorbed"):
            s = TRUE.seconds(told[form], form) * float(np.exp(noise * rng.normal()))
            points.append(Point(shape, form, Spread(s, s, s)))
    return points


def test_rates_that_were_put_in_come_out(seed: int) -> None:
    found = fit(synthetic(fitting_grid("fp32"), 0.01, seed), CPU, 1, TRUE.bandwidth)
    assert found.residual < 0.03 and found.points == 60
    assert found.gemm == pytest.approx(TRUE.gemm, rel=0.15)
    assert found.reconstruct.attention == pytest.approx(TRUE.reconstruct.attention, rel=0.1)
    assert found.absorbed.attention == pytest.approx(TRUE.absorbed.attention, rel=0.1)
    table = choices(synthetic(checking_grid("fp32"), 0.0, seed), found, "cpu")
    assert table["right"].mean() > 0.97
    assert set(table["choice"]) == {"reconstruct", "absorbed"}
    assert (table["regret"] >= 1).all()


def test_a_wrong_choice_is_seen(seed: int) -> None:
    slow = Calibration("?", "fp32", 1, 1e5, 1e15, Rates(1e9), Rates(1e15), value_is_key=True)
    table = choices(synthetic(checking_grid("fp32"), 0.0, seed), slow, "cpu")
    assert set(table["choice"]) == {"absorbed"}
    assert table["right"].mean() < 0.9


def test_grids_do_not_overlap() -> None:
    for quick in (False, True):
        fitted, checked = fitting_grid("fp32", quick), checking_grid("fp32", quick)
        assert not set(fitted) & set(checked)
        assert len(set(checked)) == len(checked)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_right_forms_get_numbers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(5, 33, heads=2, d_c=16, d_rope=4, d_head=12, dtype=dtype)
    assert check("absorbed", inputs(shape, CPU), dtype) is None
    both = measure([shape], ("reconstruct", "absorbed"), CPU, 2)
    assert {point.form for point in both} == {"reconstruct", "absorbed"}
    assert all(point.seconds.median > 0 for point in both)
    right = calibrating.FORMS["absorbed"]
    forms = {**calibrating.FORMS, "absorbed": lambda *g: 1.1 * right(*g)}
    monkeypatch.setattr(calibrating, "FORMS", forms)
    assert "exceeds" in (check("absorbed", inputs(shape, CPU), dtype) or "")
    one = measure([shape], ("reconstruct", "absorbed"), CPU, 2)
    assert [point.form for point in one] == ["reconstruct"]


def test_a_form_that_cannot_run_gets_no_number() -> None:
    shape = Shape(2, 17, heads=2, d_c=12, d_rope=4, d_head=12, dtype="fp32")
    assert check("absorbed_triton", inputs(shape, CPU), "fp32") is not None
    forms: tuple[Form, ...] = ("reconstruct", "absorbed", "absorbed_triton")
    points = measure([shape], forms, CPU, 1)
    assert [point.form for point in points] == ["reconstruct", "absorbed"]
    assert fit(points * 4, CPU, 1, 1e10).absorbed_triton is None
