"""The rank figure from a table that the tracker makes, and from folders of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model.tiny import DENSE, LATENT, make

from analysis import fig8_rank_saturation as fig8
from mla_study.checkpoints.wan.save import save_model
from mla_study.errors import UserError
from mla_study.model.transformer import WanTransformer
from mla_study.probes.tracker import Tracker
from mla_study.study import runs

STAGES = {"TF": (0, 20, 40), "CD": (50, 60), "DMD": (70, 80)}


def walk(seed: int, steps: int) -> list[WanTransformer]:
    """A model at steps of a random walk."""
    models = [make(LATENT, seed)]
    for _ in range(steps - 1):
        later = WanTransformer(LATENT)
        with torch.no_grad():
            for new, old in zip(later.parameters(), models[-1].parameters(), strict=True):
                new.copy_(old + 0.1 * torch.randn_like(old))
        models.append(later)
    return models


@pytest.fixture
def table(seed: int) -> pd.DataFrame:
    source = make(DENSE, seed).state_dict()
    steps = [(stage, step) for stage, held in STAGES.items() for step in held]
    rows: list[dict[str, Any]] = []
    for number, init in enumerate(("spectral", "random")):
        for run in range(3):
            tracker = Tracker(source, make(LATENT, seed + 7 + number).state_dict())
            models = walk(seed % 10**6 + 100 * number + run, len(steps))
            for (stage, step), model in zip(steps, models, strict=True):
                where = {
                    "run": f"{init}-{run}", "variant": "latent", "init": init, "d_c": 11,
                    "seed": run, "stage": stage,
                }  # fmt: skip
                rows += [{**where, **row} for row in tracker.measure(model, step)]
    return pd.DataFrame(rows)


def test_curves_are_means_of_medians(table: pd.DataFrame) -> None:
    rows = fig8.chosen(table, 0, "", "raw", several=False)
    found = fig8.curve(rows, fig8.RANK).set_index(["init", "step"])
    assert found.loc["random"].index.tolist() == [0, 20, 40, 50, 60, 70, 80]
    mine = table[
        (table["init"] == "random") & (table["step"] == 60) & (table["metric"] == fig8.RANK)
    ]
    by_seed = [np.median(list(set(one["value"]))) for _, one in mine.groupby("seed")]
    want = np.mean(by_seed), min(by_seed), max(by_seed)
    at = found.loc[("random", 60), ["value", "low", "high"]]
    np.testing.assert_allclose(np.array(at, dtype=float), want)
    null = fig8.null_curve(rows, fig8.RANK, "untrained")
    assert null.groupby("init")["null_value"].nunique().tolist() == [1, 1]
    assert fig8.stages(rows) == {"TF": 0, "CD": 50, "DMD": 70}


def test_rows_are_chosen_or_what_is_ambiguous_is_told(table: pd.DataFrame) -> None:
    other = table.assign(d_c=5, run=table["run"] + "-5")[table["seed"] == 0]
    both = pd.concat([table, other])
    assert set(fig8.chosen(both, 0, "", "raw", several=False)["d_c"]) == {11}
    assert set(fig8.chosen(both, 5, "", "raw", several=False)["d_c"]) == {5}
    assert set(fig8.chosen(both, 0, "", "raw", several=True)["d_c"]) == {5, 11}
    split = table.assign(variant="16/16", run=table["run"] + "-split")
    with pytest.raises(UserError, match=r"2 runs .* choose with variant=16/16 or latent"):
        fig8.chosen(pd.concat([table, split]), 0, "", "raw", several=False)
    assert len(fig8.chosen(pd.concat([table, split]), 0, "latent", "raw", several=False)) == len(
        table
    )
    for wrong in ({"d_c": 9}, {"gauge": "weighted-raw"}, {"variant": "x"}):
        given = {"d_c": 0, "variant": "", "gauge": "raw", **wrong}
        with pytest.raises(UserError, match="no composed operator has"):
            fig8.chosen(table, **given, several=False)


def test_the_studys_table_is_drawn(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/paper").symlink_to(fig8.ROOT / "results/paper")
    runs.write_result(
        tmp_path / fig8.DATA[0], {"table": table}, config={}, inputs={}, seed=0,
        modules=("analysis.fig8_rank_saturation",), provenance="measured", validity="full",
    )  # fmt: skip
    monkeypatch.setattr(fig8, "ROOT", tmp_path)
    figure = fig8.draw(str(tmp_path / "out"))
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".pdf", ".png", ".svg"}
    rank, share, edge = figure.axes
    want = fig8.curve(table[table["init"] == "spectral"], fig8.RANK)["value"]
    for axes, values in ((rank, want), (share, want / 11)):
        drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == len(values)]
        assert any(np.allclose(line, values, rtol=1e-5) for line in drawn)
    quoted = {round(float(x.get_ydata()[0]), 3) for x in share.lines if x.get_linestyle() == "--"}
    assert quoted == {0.984, 0.974}
    assert {x.get_text().strip() for x in edge.texts} == set(STAGES)


def test_anyones_folders_are_drawn(tmp_path: Path, seed: int) -> None:
    for number, name in enumerate(("svd", "mine")):
        for step, model in enumerate(walk(seed % 10**6 + number, 3)):
            save_model(model, tmp_path / name / f"step_{step}", layout="latent")
    save_model(make(DENSE, seed), tmp_path / "dense")
    series = f"svd:{tmp_path}/svd,mine:{tmp_path}/mine"
    table, run = fig8.probe_runs(series, str(tmp_path / "dense"))
    assert set(table["init"]) == {"svd", "mine"} and set(table["d_c"]) == {11}
    assert set(table["null"]) >= {"gaussian_product", "truncated_source"}
    assert run["validity"] == "full" and len(run["identity"]["inputs"]) == 7
    figure = fig8.draw(str(tmp_path / "out"), series=series)
    assert "of svd, mine, the weights" in figure.get_suptitle()
    with pytest.raises(UserError, match="names no series"):
        fig8.draw(str(tmp_path / "out"), series=f"{tmp_path}/svd")
