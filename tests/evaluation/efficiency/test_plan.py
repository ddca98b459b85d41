"""Plans: bounds that facts give, limits of time and of memory, and every assumption told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mla_study.config import WindowConfig, wan_1_3b
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.devices import CARDS, PAPER_ACHIEVED, device
from mla_study.evaluation.efficiency.model_cost import chunk_cost
from mla_study.evaluation.efficiency.plan import Layout, Plan, layouts, plan, real_time_streams
from mla_study.kernels.latent_attention.calibrations import to_text
from mla_study.kernels.latent_attention.cost import Calibration, Rates

LATENT = wan_1_3b(True)


def planned(name: str = "H100", achieved: float | None = None, **more: object) -> Plan:
    given = {"gpus": 2, "viewers": 10, "seconds": 60.0, **more}
    return plan(LATENT, device(name, achieved), **given)  # type: ignore[arg-type]


def test_bounds_at_an_h100s_measured_rate() -> None:
    rows = planned().rows
    assert [round(row.bound_fps or 0) for row in rows[:4]] == [47, 75, 77, 58]
    # at all of the data sheet a stream alone comes near its bound
    for row in planned(achieved=1.0).rows:
        assert row.fps < (row.bound_fps or 0) * 989.4 / 798 <= 1.2 * row.fps


def test_the_papers_own_number_is_what_the_default_share_says() -> None:
    flops = chunk_cost(LATENT, form="reconstruct").flops
    assert 26.93 / 12 * flops / CARDS["H100"].bf16 == pytest.approx(PAPER_ACHIEVED, abs=0.005)


def test_streams_keep_pace_and_one_more_does_not() -> None:
    here = device("B200", 0.5)
    for layout in layouts(WindowConfig()):
        config = replace(LATENT, latent=None) if layout.form == "dense" else LATENT
        streams, spent = real_time_streams(config, layout, here, 1000)
        assert streams >= 1 and spent <= 0.75
        more = chunk_cost(config, layout.window, layout.form, batch=streams + 1)
        assert more.seconds(here.rates, "dense") > 0.75
        assert real_time_streams(config, layout, here, 1)[0] == 1  # memory holds no more
    assert real_time_streams(LATENT, Layout("x", "reconstruct", WindowConfig()), here, 0)[0] == 0


def test_gpus_viewers_and_what_does_not_fit() -> None:
    rows = planned("B200", 0.5, gpus=3, viewers=10).rows
    for row in rows:
        assert row.viewers_served == min(10, 3 * row.real_time)
        assert row.gpus_needed == -(-10 // row.real_time)
        assert row.real_time <= row.fits
        assert row.fps_all >= 16 * row.real_time
    tiny = plan(LATENT, device("H100", 0.5, memory=3.5), gpus=1, viewers=1, seconds=1)
    assert all(row.real_time == row.fits == row.viewers_served == 0 for row in tiny.rows[:2])
    assert tiny.rows[0].gpus_needed is None and tiny.rows[0].fps_all == 0


def test_assumptions_are_told_and_json_holds_them() -> None:
    made = planned(window=WindowConfig(1, 3, 3))
    text = "\n".join(made.assumptions)
    for word in (
        "data sheet", "achieved: 28%", "measured", "sink 1, history 3, chunk 3", "4 denoising",
        "VAE", "16 fps", "bf16", "fitted", "60 s",
    ):  # fmt: skip
        assert word in text, word
    plain = json.loads(json.dumps(made.plain()))
    assert plain["class"] == "modelled" and len(plain["layouts"]) == 5
    assert plain["layouts"][2]["window"] == [1, 3, 3]


def test_a_calibration_file_takes_a_cards_place(tmp_path: Path) -> None:
    rate = 798e12
    rates = Calibration(
        "NVIDIA H100 80GB HBM3",
        "bf16",
        1,
        rate,
        3e12,
        Rates(rate / 2),
        Rates(rate / 4),
        residual=0.1,
    )
    path = tmp_path / "gpu.json"
    path.write_text(to_text([rates]))
    here = device(str(path), None)
    assert here.memory == 80 and "calibration file, measured" in here.facts[0]
    rows = plan(LATENT, here, gpus=1, viewers=1, seconds=60).rows
    assert round(rows[2].bound_fps or 0) == 77 and rows[2].fps < 77
    assert rows[3].fps < rows[2].fps
    fused = replace(rates, value_is_key=True, absorbed_triton=Rates(rate))
    path.write_text(to_text([fused]))
    assert plan(LATENT, device(str(path), None), gpus=1, viewers=1, seconds=60).rows[3].fps > 50
    path.write_text(to_text([rates]))
    half = device(str(path), 0.5)
    assert plan(LATENT, half, gpus=1, viewers=1, seconds=60).rows[2].fps < rows[2].fps
    path.write_text(to_text([replace(rates, device="some CPU")]))
    with pytest.raises(UserError, match="--memory"):
        device(str(path), None)
    assert device(str(path), None, memory=32).memory == 32
    with pytest.raises(UserError, match="no rates of fp16"):
        device(str(path), None, "fp16")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gpus": 0}, "--gpus is 0"),
        ({"viewers": -1}, "--viewers is -1"),
        ({"seconds": 0.0}, "--seconds is 0"),
        ({"seconds": float("nan")}, "--seconds is nan"),
        ({"name": "H300"}, "no device 'H300'"),
        ({"name": "nowhere.json"}, "cannot be read"),
        ({"achieved": 1.5}, "share of 1.5"),
        ({"achieved": 0.0}, "share of 0"),
    ],
)
def test_refusals(given: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        planned(**given)  # type: ignore[arg-type]


def test_further_refusals() -> None:
    with pytest.raises(UserError, match="memory of -1"):
        device("H100", None, memory=-1)
    with pytest.raises(UserError, match="not of fp32"):
        device("H100", None, "fp32")
