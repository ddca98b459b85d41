"""The figures and tables of the miniature study, from a made-up study whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import made_up_study
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from analysis import (
    fig2_composed_operator,
    fig8_rank_saturation,
    fig_drift,
    fig_spectrum_vs_quality,
    fig_subspace,
    fig_training_curves,
    miniature,
    table5a_latent_dim,
    table5b_split,
    table_questions,
)
from mla_study.errors import UserError
from mla_study.miniature import prediction
from mla_study.study.tables import cells

Drawn = Callable[[ModuleType], Figure]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_study.write(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return made_up_study.tables()


@pytest.fixture
def drawn(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    def draw(module: ModuleType) -> Figure:
        monkeypatch.setattr(module, "ROOT", study)
        figure = module.draw(str(tmp_path))
        assert {p.suffix for p in tmp_path.glob(f"{module.ID}.*")} >= {".pdf", ".png", ".svg"}
        return figure

    return draw


def one(frame: pd.DataFrame, **where: object) -> pd.Series:
    found = frame[np.logical_and.reduce([frame[name] == value for name, value in where.items()])]
    assert len(found) == 1, where
    return found.iloc[0]


def test_steps_to_a_loss() -> None:
    # log loss falls linearly in log(1 + step): loss = (1 + step)^-2
    steps = np.array([0, 4, 20, 100])
    curve = pd.DataFrame({"step": steps, "value": (1.0 + steps) ** -2})[::-1]
    for step in (0.0, 3.0, 57.0, 100.0):
        np.testing.assert_allclose(miniature.steps_to(curve, (1 + step) ** -2 * (1 + 1e-12)), step)
    assert np.isnan(miniature.steps_to(curve, 1e-5))


def test_predictors_are_those_of_the_run(tables: dict[str, pd.DataFrame]) -> None:
    found = prediction.predictors(tables["ranks"], tables["spectra"], tables["conversion"])
    row = one(found, run="spectral-12-s1")
    np.testing.assert_allclose(row["rank_loss"], 1 - (0.97 * 12 + 0.005) / 96, rtol=1e-6)
    np.testing.assert_allclose(row["error"], 0.12 + 1 / 12, rtol=1e-6)
    kept: list[float] = []
    for layer in range(made_up_study.LAYERS):
        sigma = [3 * (1 - i / 96 / 1.1) * (1 + 0.02 * layer * (i + 1) / 96) for i in range(96)]
        kept.append(sum(s * s for s in sigma[:12]) / sum(s * s for s in sigma))
    np.testing.assert_allclose(row["weight_loss"], 1 - np.mean(kept), rtol=1e-6)


def test_correlations_by_scope(tables: dict[str, pd.DataFrame]) -> None:
    names = ("ranks", "spectra", "conversion", "curves", "scores")
    runs = prediction.predicted(*(tables[name] for name in names))
    assert runs[runs["all_"]]["config"].nunique() == 11
    assert not runs["run"].str.contains("-t1500-").any()
    found = prediction.correlations(runs)
    row = one(found, predictor="output_loss", quality="held_out", scope="d_c")
    mine = runs[runs["d_c_"]]
    want = stats.spearmanr(mine["output_loss"], mine["held_out"])
    np.testing.assert_allclose(row["rho"], want.statistic, rtol=1e-6)  # type: ignore[attr-defined]
    assert row["low"] <= row["rho"] <= row["high"] + 1e-9 and row["configs"] == 5
    # what follows from d_c alone is no more than d_c; another order is compared on equal resamples
    for quality in ("held_out", "all_correct"):
        null = one(found, predictor=prediction.NULL, quality=quality, scope="all")
        mine = runs.dropna(subset=[quality])
        want = stats.spearmanr(-mine["d_c"], mine[quality]).statistic  # type: ignore[attr-defined]
        np.testing.assert_allclose(null["rho"], want, rtol=1e-6)
        for predictor in (prediction.NULL, "weight_loss", "output_loss"):
            row = one(found, predictor=predictor, quality=quality, scope="all")
            assert row[["gain", "gain_low", "gain_high"]].abs().max() < 1e-9
            assert row["rho"] == null["rho"]
        row = one(found, predictor="error", quality=quality, scope="all")
        sign = 1 if quality == "held_out" else -1
        np.testing.assert_allclose(row["gain"], sign * (row["rho"] - null["rho"]), atol=1e-6)
        assert row["gain_low"] <= row["gain"] <= row["gain_high"] and row["gain"] > 0
    # equal for all inits of one size: nothing to correlate
    assert np.isnan(one(found, predictor="output_loss", quality="held_out", scope="init")["rho"])


def test_tables_hold_what_was_measured_and_what_is_quoted(drawn: Drawn, tmp_path: Path) -> None:
    drawn(table5a_latent_dim)
    table = pd.read_csv(tmp_path / "table5a_latent_dim.csv").set_index("ratio")
    run = {"init": "activation", "variant": "latent", "d_c": 12, "d_rope": 8, "long": False}
    want = np.mean([made_up_study.quality({**run, "seed": seed}) for seed in (0, 1, 2)])
    row = table.loc["0.125"]
    np.testing.assert_allclose(row["all_correct"], want, rtol=1e-6)
    np.testing.assert_allclose(row["all_correct_se"], 0.02 / 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(row["saved"], 1 - 20 / 192, rtol=1e-6)
    assert (row["paper_d_c"], row["total"]) == (192, 83.89)
    assert table.loc["0.333", "total"] == 83.40 and np.isnan(table.loc["0.333", "all_correct"])
    np.testing.assert_allclose(table.loc["dense", "all_correct"], 0.81)
    np.testing.assert_allclose(table.loc["teacher", "all_correct"], 0.9)
    drawn(table5b_split)
    table = pd.read_csv(tmp_path / "table5b_split.csv").set_index("share")
    assert table.loc["0.75", ["split", "paper_split", "total"]].tolist() == ["8/24", "32/96", 78.31]
    np.testing.assert_allclose(table.loc["0.1875", "all_correct"], want - 0.1, rtol=1e-6)
    assert np.isnan(table.loc["0.125", "iou"])
    assert "paper-quoted" in (tmp_path / "table5b_split.md").read_text()


def test_a_difference_of_rounding_alone_is_told_as_none(tables: dict[str, pd.DataFrame]) -> None:
    exact, kept = [1 / 3, 2 / 3, 0.996094], [0.3333333, 0.6666667, 0.996094]
    first, second = (pd.DataFrame({"seed": [0, 1, 2], "value": v}) for v in (exact, kept))
    value, low, high, _ = miniature.paired(first, second)
    assert 0 < max(map(abs, (value, low, high))) < 1e-6
    row = table_questions.answers(tables).head(1).assign(value=value, low=low, high=0.0097)
    assert cells(row, table_questions.COLUMNS)[0][2:5] == ["0", "0", "0.0097"]


def test_questions_are_answered_by_their_intervals(tables: dict[str, pd.DataFrame]) -> None:
    found = table_questions.answers(tables)
    verdicts = found.set_index("quantity")["verdict"]
    assert verdicts["$r_{.99}$, activation: trained − start"] == "less"
    assert verdicts["spectral: share of random's steps"] == "fewer"
    assert verdicts["TF loss, random, long (1500 steps) − spectral"] == "stays behind"
    assert verdicts["random's steps to spectral's last loss"] == "0 of 3 seeds get there"
    assert verdicts["all correct − spectral's"] == verdicts["TF loss − random's"] == "better"
    assert verdicts["all correct − dense's, $d_c$ = 4"] == "breaks"
    assert verdicts["IoU − dense's, $d_c$ = 2"] == "breaks"
    assert verdicts["IoU − dense's, $d_c$ = 24"] == "holds"
    # .29, .17, .08, .06 and .05 are lost, known to .03; IoU falls by half of that, known to .001
    where = verdicts["sizes where all correct falls by > 0.05"]
    assert where == "breaks: 2, 4; not settled: 12, 24, 48"
    assert verdicts["sizes where IoU falls by > 0.05"] == "breaks: 2, 4; holds: 12, 24, 48"
    # the interval of d_c itself leaves out 0 for all correct alone
    assert verdicts["ρ(1 − E($d_c$) of its outputs, TF loss)"] == "does not predict"
    assert verdicts["ρ(1 − $d_c$ / d ($d_c$ itself), all correct)"] == "predicts"
    assert verdicts["ρ(1 − E($d_c$) of its outputs, all correct)"] == "no more than $d_c$ itself"
    told = verdicts["ρ(output error after conversion, TF loss)"]
    assert told == "predicts; more than $d_c$: not settled"
    assert verdicts["activation, no-clean-pass: all correct, 10x"] == "costs more than 0.05"
    assert verdicts["activation, int8-token: IoU, 10x"] == "costs less than 0.05"
    row = one(found, quantity="activation, history-0: IoU, 10x")
    half = 1.96 * 0.0005 * (2 / 3) ** 0.5
    want = [-0.15, -0.15 - half, -0.15 + half]
    np.testing.assert_allclose(row[["value", "low", "high"]].astype(float), want, rtol=1e-6)
    # noise between seeds takes the verdict away
    scores = tables["scores"].copy()
    noisy = (scores["init"] == "activation") & (scores["seed"] == 1)
    scores.loc[noisy, "value"] -= 0.4
    other = table_questions.answers({**tables, "scores": scores}).set_index("quantity")["verdict"]
    assert other["all correct − spectral's"] == "not told apart"
    assert other["all correct − dense's, $d_c$ = 4"] == "not settled"


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0.01, 0.2, "gains"),
        (-0.04, 0.1, "no cost of 0.05"),
        (-0.04, -0.01, "costs less than 0.05"),
        (-0.2, -0.06, "costs more than 0.05"),
        (-0.2, -0.01, "costs"),
        (-0.2, 0.2, "not settled"),
        (float("nan"), 0.2, "not settled"),
    ],
)
def test_what_a_cost_is_called(low: float, high: float, want: str) -> None:
    assert table_questions.cost(low, high) == want


@pytest.mark.parametrize(
    ("alone", "gain", "low", "want"),
    [
        ("predicts", 0.0, 0.0, "no more than $d_c$ itself"),
        ("predicts", -0.1, -0.3, "no more than $d_c$ itself"),
        ("predicts", 0.1, 0.02, "predicts, more than $d_c$"),
        ("predicts", 0.1, -0.02, "predicts; more than $d_c$: not settled"),
        ("does not predict", -0.1, -0.3, "does not predict"),
        ("predicts the reverse", -1.0, -1.5, "predicts the reverse"),
    ],
)
def test_a_predictor_is_held_against_size_alone(
    alone: str, gain: float, low: float, want: str
) -> None:
    assert table_questions.beyond_size(alone, gain, low) == want


def test_spectra_are_drawn_beside_their_nulls(drawn: Drawn) -> None:
    figure = drawn(fig2_composed_operator)
    top, bottom = figure.axes[2], figure.axes[12]
    assert "= 12" in top.get_title()
    null, *lines = top.lines
    assert [len(line.get_ydata()) for line in lines] == [12, 12, 12]
    assert null.get_color() == "#999999"
    trained = [3 * (1 - 0.25 * i / 12) for i in range(12)]
    upper = [s * (1 + 0.02 * (i + 1) / 12) for i, s in enumerate(trained)]
    ratios = [[s / sigma[0] for s in sigma] for sigma in (trained, upper)]
    np.testing.assert_allclose(lines[0].get_ydata(), np.mean(ratios, axis=0), rtol=1e-5)
    assert len(bottom.containers) == 3
    with pytest.raises(UserError, match="no student has init=absent"):
        fig2_composed_operator.draw("unused", init="absent")


def test_curves_of_losses_overlaps_and_drift(drawn: Drawn, tmp_path: Path) -> None:
    figure = drawn(fig_training_curves)
    lines = {tuple(np.round(line.get_ydata(), 5)) for line in figure.axes[0].lines}
    dense = {"init": "none", "variant": "dense", "d_c": 0, "d_rope": 0, "long": False, "seed": 1}
    want = [made_up_study.loss(dense, step) for step in made_up_study.TF]
    assert any(len(x) == len(want) and np.allclose(x, want, rtol=1e-4) for x in lines)
    steps = pd.read_csv(tmp_path / "fig_training_curves_steps.csv").set_index("level")
    assert steps["random"].isna().any() and steps["random, long"].notna().all()
    assert steps["spectral"].iloc[-1] > steps["activation"].iloc[-1]
    figure = drawn(fig_subspace)
    start = {round(float(line.get_ydata()[-1]), 4) for line in figure.axes[0].lines}
    assert round(1 - 0.001 * 390**0.5, 4) in start and 0.125 in start
    figure = drawn(fig_drift)
    assert len(figure.axes) == 12 and figure.axes[0].get_xscale() == "log"
    assert max(float(line.get_xdata()[-1]) for line in figure.axes[0].lines) == 149.25
    assert len([line for line in figure.axes[6].lines if len(line.get_xdata()) == 10]) == 5
    shown = [axis.get_ylabel().split(" (")[0] for axis in figure.axes]
    assert shown[:3] == shown[6:9] == ["all correct", "background right", "IoU in the window"]
    # what is drawn of the background is the background's, 0.2 above the level of all correct
    dense = made_up_study.quality({"init": "none", "variant": "dense", "d_c": 0, "d_rope": 0,
                                   "seed": 1, "long": False})  # fmt: skip
    for axis, want in zip(figure.axes[:2], (dense, dense + 0.2), strict=False):
        assert any(np.isclose(float(line.get_ydata()[0]), want) for line in axis.lines)


def test_predictions_are_drawn_with_their_correlations(drawn: Drawn, tmp_path: Path) -> None:
    figure = drawn(fig_spectrum_vs_quality)
    assert len(figure.axes) == 10
    assert "all   ρ +0.90" in figure.axes[4].get_title(loc="left")
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert "itself" in figure.axes[0].get_xlabel() and titles[0] == titles[2] == titles[3]
    table = pd.read_csv(tmp_path / "fig_spectrum_vs_quality_correlations.csv")
    assert len(table) == 5 * 2 * 4 and table["configs"].max() == 11


def test_other_splits_and_lengths_do_not_stand_in_the_rank_figure(drawn: Drawn) -> None:
    # the made-up study has the same init, seed and d_c in several splits and lengths
    figure = drawn(fig8_rank_saturation)
    assert "range of 3 seeds" in figure.get_suptitle()
