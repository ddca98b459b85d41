"""Hyperparameters: the paper's in its preset, settings from the command line, the schedule."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mla_study.config import from_json, preset, to_json
from mla_study.errors import UserError
from mla_study.training.objective import make_objective
from mla_study.training.recipe import RECIPES, Optimiser, Stage, changed, stages


def test_the_papers_numbers_are_in_its_preset(repo_root: Path) -> None:
    with (repo_root / "results/paper/table4_hyperparameters.csv").open() as file:
        told = {row["name"]: row["value"] for row in csv.DictReader(file)}
    made = stages("wan-1.3b")
    for name, stage in (
        ("lr_teacher_forcing", "teacher_forcing"),
        ("lr_consistency", "consistency"),
        ("lr_dmd", "distribution_matching"),
    ):
        assert made[stage].optimiser.lr == float(told[name])
        assert made[stage].optimiser.betas == (0.0, 0.999)
        assert made[stage].batch == int(told["total_batch"])
        assert made[stage].precision == told["precision"]
    critic = made["distribution_matching"].critic
    assert critic is not None and critic.lr == 4e-7
    assert made["distribution_matching"].options == {"guidance": 3.0, "critic_updates": 5}
    assert made["distribution_matching"].ema == 0.99
    assert made["consistency"].options["guidance"] == 3.0


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_a_preset_has_an_objective_and_survives_json(name: str) -> None:
    assert preset(name).name == name
    for stage in stages(name).values():
        make_objective(stage.objective, stage.options)
        assert from_json(to_json(stage), Stage) == stage


def test_settings_change_a_stage() -> None:
    base = stages("mini")["distribution_matching"]
    made = changed(base, ("steps=7", "optimiser.lr=1e-4", "critic.warmup=2", "options.guidance=2"))
    assert (made.steps, made.optimiser.lr) == (7, 1e-4)
    assert made.critic is not None and made.critic.warmup == 2
    assert made.options == {**base.options, "guidance": 2}
    for wrong, told in (
        ("steps", "give name=value"),
        ("steps=0", "at least 1"),
        ("stepz=3", "did you mean 'steps'"),
        ("ema=2", "lies in"),
        ("optimiser.betas=[1,0]", "betas from 0 up to below 1"),
        ("precision=fp8", "one of fp32, bf16"),
    ):
        with pytest.raises(UserError, match=told):
            changed(base, (wrong,))
    with pytest.raises(UserError, match="has no critic"):
        changed(stages("mini")["flow"], ("critic.lr=1",))
    with pytest.raises(UserError, match="did you mean 'guidance'"):
        make_objective("consistency", {"guidence": 3.0})
    with pytest.raises(UserError, match="no stages for preset 'x'"):
        stages("x")


def test_rates_rise_and_fall_linearly() -> None:
    chosen = Optimiser(1.0, warmup=4, decay=0.5)
    found = [chosen.factor(update, 20) for update in range(20)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0] and found[4:11] == [1.0] * 7
    assert found[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert Optimiser(1.0).factor(3, 5) == 1.0
