"""What the benchmark of training times is a trainer's step, and its rows say what they compare."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model.tiny import DENSE, LATENT

from mla_study.cli import main
from mla_study.config import WindowConfig, mini
from mla_study.evaluation import bench_train
from mla_study.evaluation.bench_train import Noise, forcing, stepper, teacher_time, tracked, work
from mla_study.evaluation.efficiency import train_plan
from mla_study.miniature.judge import Trial
from mla_study.training.data.opening import world_data
from mla_study.training.loop import Trainer
from mla_study.training.recipe import stages

SIZES: dict[str, Any] = {"latent_size": (4, 6), "window": WindowConfig(1, 2, 2)}


def test_a_step_trains_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Trainer] = []
    real = Trainer.__init__

    def kept(self: Trainer, *given: Any, **more: Any) -> None:
        real(self, *given, **more)
        seen.append(self)

    monkeypatch.setattr(Trainer, "__init__", kept)
    student, teacher = replace(LATENT, **SIZES), replace(DENSE, **SIZES)
    stage = replace(stages("mini")["consistency"], batch=1, frames=4, steps=2)
    step = stepper(stage, student, Noise(student, 4), teacher)
    (trainer,) = seen
    assert trainer.roles.teacher is not None and trainer.roles.teacher.config == teacher
    before = [p.clone() for p in trainer.roles.generator.parameters()]
    for done in (1, 0, 1):  # more steps than the stage has: the schedule begins anew
        step()
        assert trainer.step == done
    after = list(trainer.roles.generator.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not list(tmp_path.iterdir())


def test_noise_has_the_models_shapes() -> None:
    data = Noise(DENSE, 5)
    batch = data.batch([4, 5, 6])
    assert batch.latents is not None and batch.latents.shape == (3, 3, 5, 60, 104)
    assert batch.context.shape == (3, 5, 7) and data.null.shape == (1, 5, 7)
    assert data.batch([0, 1, 2]) is batch


def test_the_tracker_is_asked_as_the_study_asks() -> None:
    watch, ranks = tracked(mini(True), mini(), world_data(mini(), 0))
    rows: Any = ranks()
    assert {row["layer"] for row in rows} == {0, 1, 2, 3}
    names = {row["name"] for row in watch()}  # type: ignore[attr-defined]
    assert "held_out" in names and names > {row["metric"] for row in rows}


def test_a_worker_answers_every_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(bench_train, "forcing", lambda *_: lambda: calls.append(1))
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n3\n"))
    work()
    assert len(calls) == 1 + 2 + 3
    assert len([float(line) for line in capsys.readouterr().out.split()]) == 3


@pytest.mark.parametrize("score", [0.0, 0.5])
def test_the_teacher_is_trained_until_it_is_good(
    score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge says .5 from the second time after the start on; the goal is met there or never."""
    asked: list[int] = []

    def judge(*_: object, **__: object) -> list[dict[str, bool]]:
        asked.append(1)
        return [{"all_correct": len(asked) > 2}, {"all_correct": False}]

    monkeypatch.setattr(bench_train, "judge", judge)
    monkeypatch.setattr(bench_train, "TEACHER_SCORE", score or 0.6)
    stage = replace(stages("mini")["flow"], steps=7, batch=2)
    (row,) = teacher_time(stage, 2, Trial(videos=2))
    assert 0 < row.value < 60 and row.unit == "CPU s"
    if score:
        assert row.quantity == "teacher to 0.5 all-correct" and len(asked) == 3
        assert "0.500 of 2 videos all correct at step 4 of 7" in row.setting
    else:
        assert row.quantity == "whole teacher" and len(asked) == 5
        assert "at step 7 of 7" in row.setting


def test_forcing_takes_changes() -> None:
    small = replace(LATENT, **SIZES)
    forcing(small, Noise(small, 4), {"batch": 1, "frames": 4})()


def test_options_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(bench_train, "bench_train", lambda *given: seen.append(given) or 0)
    monkeypatch.setattr(train_plan, "write_plans", lambda: seen.append("plans"))
    assert main(["bench", "train", "--quick", "--no-write"]) == 0
    assert main(["bench", "train-memory"]) == 0
    assert seen == [(True, False), "plans"]
