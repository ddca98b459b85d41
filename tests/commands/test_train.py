"""``mla-study train``: stages of a few steps on the world, a file of one's own, bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from mla_study.checkpoints.wan.load import load_model
from mla_study.cli import main
from mla_study.training.loop import Trainer

FEW = [f"--set={setting}" for setting in ("steps=2", "batch=2", "frames=6", "save_every=1")]


def train(objective: str, out: Path, *options: str) -> int:
    return main(["train", objective, "--out", str(out), *FEW, *options])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_model(out / "model.safetensors", dtype=torch.float32).state_dict()


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_teacher_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("flow", tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model.safetensors'}\n"
    log = pd.read_parquet(tmp_path / "log.parquet")
    assert set(log["name"]) == {"loss", "gradient_norm"} and set(log["step"]) == {1, 2}
    assert list((tmp_path / "tensorboard").iterdir())
    # finished: nothing is done again, and what was observed stays
    before = (tmp_path / "run.json").read_bytes()
    assert train("flow", tmp_path) == 0
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("objective", ["consistency", "distribution-matching"])
def test_a_latent_student_of_a_teacher(objective: str, tmp_path: Path) -> None:
    options = ["--start", "shipped:latent", "--teacher", "shipped:teacher", "--set", "steps=1"]
    if objective == "distribution-matching":
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("fast red square moving right middle center on stripes\n")
        options += ["--data", str(prompts), "--set", "options.critic_updates=1"]
    assert train(objective, tmp_path / "run", *options) == 0
    log = pd.read_parquet(tmp_path / "run" / "log.parquet")
    assert ("fake_score_loss" in set(log["name"])) == (objective == "distribution-matching")
    assert log["value"].notna().all()


def test_ctrl_c_is_a_sentence_and_the_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_step = Trainer._one_step

    def stopped(self: Trainer) -> object:
        if self.step == 1:
            raise KeyboardInterrupt
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stopped)
        assert train("flow", tmp_path / "cut") == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"interrupted after step 1; .*step-00000001 stays; the same command", told)
    assert train("flow", tmp_path / "cut") == 0
    assert train("flow", tmp_path / "whole") == 0
    assert same(tmp_path / "cut", tmp_path / "whole")


def readme(repo_root: Path, heading: str) -> str:
    section = (repo_root / "README.md").read_text().split(f"## {heading}\n")[1]
    return section.split("\n## ")[0]


def test_a_further_objective_is_the_file_that_the_readme_shows(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    section = readme(repo_root, "A further objective is one file")
    code = re.search(r"```python\n(.*?)```", section, re.S)
    line = re.search(r"^    mla-study (train .*)$", section, re.M)
    assert code is not None and line is not None
    words = line[1].split()
    monkeypatch.chdir(tmp_path)
    own = Path(words[1])
    own.write_text(code[1])
    assert main([*words, "--out", "run", *FEW]) == 0
    assert set(pd.read_parquet("run/log.parquet")["name"]) == {"loss", "gradient_norm"}
    # another file under the same name is another run
    own.write_text(code[1] + "\n# changed\n")
    capsys.readouterr()
    assert main([*words, "--out", "run", *FEW]) == 2
    assert "inputs.objective: was" in capsys.readouterr().err
    assert main([*words, "--out", "other", *FEW, "--set", "options.powr=2"]) == 2
    assert "did you mean 'power'" in capsys.readouterr().err
    own.write_text("import nothing_of_that_name\n")
    assert main([*words, "--out", "other", *FEW]) == 2
    assert "cannot be run (ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['return {"lost": 3}', "return {}", "roles = ('judge',)"])
def test_a_file_that_cannot_be_trained_is_one_sentence(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, body = tmp_path / "mine.py", "    def loss(self, turn, roles, batch, draws):\n        "
    body = f"    {line}\n{body}return {{}}\n" if "roles" in line else f"{body}{line}\n"
    own.write_text(
        "from mla_study.training.objective import Objective\n\n"
        f"class Mine(Objective):\n{body}\nOBJECTIVE = Mine\n"
    )
    assert train(str(own), tmp_path / "run", "--start", "shipped:teacher") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    wanted = "names 'judge'; there are generator" if "roles" in line else "and no 'loss': return {"
    assert last.startswith(f"mla-study: objective {own}") and wanted in last


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["magic"], "no stage 'magic'; it has flow, teacher_forcing"),
        (["flow", "--preset", "wan-1.3b"], "no stage 'flow'; it has teacher_forcing"),
        (["flow", "--set", "stepz=1"], "did you mean 'steps'"),
        (["flow", "--set", "options.droop=1"], "did you mean 'drop'"),
        (["flow", "--set", "steps"], "give name=value"),
        (["teacher-forcing"], "give --start"),
        (["consistency", "--start", "shipped:dense"], "give --teacher"),
        (["distribution_matching", "--start", "shipped:latent"], "give --teacher"),
        (["flow", "--start", "shipped:nothing"], "no 'nothing'"),
        (["flow", "--start", "nothing.safetensors"], "nothing.safetensors"),
        (["flow", "--data", "nowhere"], "--data nowhere is not there: give world"),
        (["flow", "--data", "README.md"], "outside the grammar|prompts alone|README"),
        (["none.py", "--start", "shipped:dense"], "none.py is no Python file"),
        (["flow", "--device", "cuda:7"], "torch sees"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda:7" in words and torch.cuda.device_count() > 7:
        pytest.skip("there is such a GPU")
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert out == "" and last.startswith("mla-study: ") and re.search(told, last), err
    assert not (tmp_path / "run").exists()


def test_another_config_is_told_by_its_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("flow", tmp_path) == 0
    assert train("flow", tmp_path, "--set", "optimiser.lr=1e-5", "--set", "frames=3") == 2
    err = capsys.readouterr().err
    assert "data.world.frames: was 6, is 3" in err and "stage.optimiser.lr: was 0.002" in err


@pytest.mark.slow
def test_two_ranks_by_torchrun(tmp_path: Path, repo_root: Path) -> None:
    def launched(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "-m", "mla_study", "train", "flow"]
        command += ["--out", str(tmp_path / "two"), *FEW, *options]
        environment = os.environ | {"PYTHONPATH": str(repo_root)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)

    assert "does not divide over 2 ranks" in launched("--set", "batch=3").stderr
    done = launched()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tmp_path / 'two' / 'model.safetensors'}\n"
    assert "UserWarning" not in done.stderr
    assert train("flow", tmp_path / "one") == 0
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    # Muon multiplies what two orders of summation differ in
    assert max(float((mine[n] - theirs[n]).abs().max()) for n in mine) < 1e-5


def test_a_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mla_study.evaluation.efficiency.train_plan")
    assert train("distribution_matching", tmp_path, "--dry-run", "--ranks", "2") == 0
    assert "GB" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
