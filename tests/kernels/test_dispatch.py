"""The choice of a form: by FLOPs where nothing is known, by rates where they were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from mla_study.errors import UserError
from mla_study.kernels.latent_attention import calibrations
from mla_study.kernels.latent_attention.calibrations import device_key, file_name, find, to_text
from mla_study.kernels.latent_attention.cost import DERIVED, Calibration, Rates, Shape
from mla_study.kernels.latent_attention.dispatch import choose, decide, explain

ROOT = Path(__file__).resolve().parents[2]
RATES = Calibration("some device", "fp32", 1, 1e11, 2e10, Rates(1e11, 1.0, 1e-4), Rates(8e10))


def test_by_flops() -> None:
    assert choose(4680, 15600) == "reconstruct"
    assert choose(268, 10**7) == "absorbed"
    assert choose(270, 10**7) == "reconstruct"
    assert choose(4680, 15600, d_c=112) == "absorbed"
    assert choose(1, 15600, 7, 40, 512, 32) == "absorbed"
    # over five passes a kept expansion costs less: the crossover falls
    assert choose(200, 15600) == "absorbed"
    assert choose(200, 15600, keep_expanded=True) == "reconstruct"


def test_rates_move_the_choice() -> None:
    shape = Shape(400, 8000, dtype="fp32")
    assert decide(shape).form == "reconstruct"
    slow = replace(RATES, gemm=1e9)
    assert decide(shape, calibration=slow).form == "absorbed"
    told = decide(shape, calibration=slow)
    assert told.seconds["absorbed"] < told.seconds["reconstruct"]
    text = explain(told, shape)
    assert "some device" in text and "below 260 queries (below 269 queries" in text
    assert "FLOPs alone" in explain(decide(shape), shape)


def test_a_form_by_name() -> None:
    shape = Shape(4680, 15600)
    assert decide(shape, form="absorbed").form == "absorbed"
    with pytest.raises(UserError, match="CUDA"):
        decide(shape, form="absorbed_triton")
    with pytest.raises(UserError, match="no form 'fast'"):
        decide(shape, form="fast")
    assert "absorbed_triton" in decide(shape).refused


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"d_c": 12}, "d_c from 64"),
        ({"d_c": 200}, "steps of 16"),
        ({"d_rope": 0}, "d_rope"),
        ({"dtype": "fp32"}, "not in fp32"),
    ],
)
def test_what_the_fused_kernel_cannot_take(change: dict[str, object], why: str) -> None:
    shape = replace(Shape(8, 15600, dtype="bf16"), **change)  # type: ignore[arg-type]
    told = decide(shape, "cuda")
    assert why in told.refused["absorbed_triton"]
    assert told.form in ("reconstruct", "absorbed")  # PyTorch takes it
    assert why in explain(told, shape)
    with pytest.raises(UserError, match=why):
        decide(shape, "cuda", form="absorbed_triton")


def test_the_fused_kernel_where_it_fits() -> None:
    pytest.importorskip("triton")
    told = decide(Shape(8, 15600, dtype="bf16"), "cuda")
    assert "absorbed_triton" not in told.refused
    # it does not compute values as wide as keys
    assert told.seconds["absorbed_triton"] <= told.seconds["absorbed"]


def test_rates_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(to_text([RATES]).replace("100000000000.0", "-1.0", 1))
    with pytest.raises(UserError, match="above 0"):
        calibrations.read(path)


def test_calibrations_are_files_of_one_device(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    here = replace(RATES, device=device_key(), threads=2)
    path.write_text(to_text([here, replace(here, threads=8)]))
    assert calibrations.read(path) == [here, replace(here, threads=8)]
    assert find("fp32", "cpu", 1, path) == here
    assert find("fp32", "cpu", 7, path).threads == 8
    with pytest.raises(UserError, match="no rates of bf16"):
        find("bf16", "cpu", 1, path)
    path.write_text(to_text([RATES]))
    with pytest.raises(UserError, match="was measured on 'some device'"):
        find("fp32", "cpu", 3, path)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"kind": "other", "entries": []}',
        '{"kind": "mla-study calibration", "entries": [{"device": 3}]}',
        '{"kind": "mla-study calibration", "entries": [{"devise": "x"}]}',
        '{"kind": "mla-study calibration", "entries": 3}',
    ],
)  # fmt: skip
def test_files_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rates\.json"):
        calibrations.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        calibrations.read(tmp_path / "absent.json")


def test_an_unmeasured_device_counts_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrations, "FOLDER", tmp_path)
    find.cache_clear()
    assert find("fp32") is DERIVED
    entry = replace(RATES, device=device_key())
    (tmp_path / file_name(device_key())).write_text(to_text([entry]))
    find.cache_clear()
    assert find("fp32") == entry
    assert find("fp64") is DERIVED
    find.cache_clear()


def test_committed_choices_follow_from_committed_rates() -> None:
    """On >= 95 % of the measured shapes the choice is within 5 % of the better form."""
    folder = ROOT / "results/data/calibration"
    table = pd.read_parquet(folder / "choices.parquet")
    device = json.loads((folder / "run.json").read_text())["identity"]["config"]["device"]
    entries = calibrations.read(calibrations.FOLDER / file_name(device), device)
    for (dtype, threads), rows in table.groupby(["dtype", "threads"]):
        rates = next(e for e in entries if (e.dtype, e.threads) == (dtype, threads))
        right = 0
        for row in rows.itertuples():
            shape = Shape(
                int(row.queries), int(row.keys), int(row.batch), int(row.heads), int(row.d_c),
                int(row.d_rope), int(row.d_head), str(dtype), int(row.passes),
            )  # fmt: skip
            form = decide(shape, calibration=rates).form
            assert form == row.choice
            both = {"reconstruct": row.reconstruct_s, "absorbed": row.absorbed_s}
            right += both[form] <= 1.05 * min(both.values())
        assert right >= 0.95 * len(rows), (dtype, right, len(rows))
