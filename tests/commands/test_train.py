"""``mla-study train``: stages of a few steps on the world, a file of one's own, bad input."""

from __future__ import annotations

import json
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
from mla_study.config import mini, small
from mla_study.evaluation.efficiency import host, train_plan
from mla_study.miniature.store import STEP_SECONDS
from mla_study.training.folder import TRAIN_FILE, observed_in
from mla_study.training.loop import Trainer
from mla_study.training.recipe import stages

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
    teacher = "shipped:dense" if objective == "consistency" else "shipped:teacher"
    options = ["--generator", "shipped:latent", "--teacher", teacher, "--set", "steps=1"]
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


@pytest.mark.parametrize("wrong", ["options.drop=2", "frames=13"])
def test_a_start_that_failed_leaves_the_folder_free(wrong: str, tmp_path: Path) -> None:
    objective = ["distribution_matching"] if wrong == "frames=13" else ["flow"]
    more = ["--generator", "shipped:latent", "--teacher", "shipped:teacher"]
    options = [*FEW, "--set", "options.critic_updates=1", *more] if wrong == "frames=13" else FEW
    command = ["train", *objective, "--out", str(tmp_path), *options]
    assert main([*command, "--set", wrong]) == 2
    assert (tmp_path / TRAIN_FILE).exists() and not (tmp_path / "checkpoints").exists()
    assert main(command) == 0
    # something was made: now the folder is this run's
    assert main([*command, "--set", wrong]) == 2
    assert main(command) == 0


def test_a_truncated_checkpoint_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("flow", tmp_path) == 0
    (tmp_path / "model.safetensors").unlink()
    (part,) = tmp_path.glob("checkpoints/step-00000002/__0_0.distcp")
    os.truncate(part, 1000)
    capsys.readouterr()
    assert train("flow", tmp_path) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"step-00000002 cannot be read \(\w.*\): remove it.*from the one before\.$", told
    )


def test_threads_are_recorded_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[int] = []
    one_step = Trainer._one_step

    def counted(self: Trainer) -> object:
        used.append(torch.get_num_threads())
        if self.step == 1 and len(used) < 6:
            raise KeyboardInterrupt
        return one_step(self)

    monkeypatch.setattr(Trainer, "_one_step", counted)

    def notes(*options: str) -> list[str]:
        capsys.readouterr()
        train("flow", tmp_path, *options)
        err = capsys.readouterr().err
        return [line for line in err.splitlines() if line.startswith("note: the run goes on")]

    torch.set_num_threads(2)
    try:
        assert not notes() and used == [1, 1]  # of so small a model
        assert not notes("--threads", "1") and used == [1, 1, 1]
        (told,) = notes("--threads", "2")
        assert "goes on with 2 threads in place of 1" in told and used[3:] == [2]
        assert observed_in(tmp_path) == {"ranks": 1, "device": "cpu", "threads": 2}
        torch.set_num_threads(1)
        (told,) = notes()
        assert "goes on with 2 threads, as before" in told and used[4:] == [2]
    finally:
        torch.set_num_threads(1)
    monkeypatch.undo()
    assert train("flow", tmp_path, "--threads", "1") == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["observed"]["threads"] == 1


def test_a_bidirectional_teacher_of_consistency_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(teacher: str | Path, out: str) -> bool:
        capsys.readouterr()
        options = ["--generator", "shipped:dense", "--teacher", str(teacher), "--set", "steps=1"]
        assert train("consistency", tmp_path / out, *options) == 0
        return f"note: {teacher} is bidirectional" in capsys.readouterr().err

    assert told("shipped:teacher", "a")
    assert not told("shipped:dense", "b")
    assert train("flow", tmp_path / "flow", "--set", "steps=1") == 0
    assert told(tmp_path / "flow" / "model.safetensors", "c")
    assert not told(tmp_path / "b" / "model.safetensors", "d")


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
    assert train(str(own), tmp_path / "run", "--generator", "shipped:teacher") == 2
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
        (["teacher-forcing"], "give --generator"),
        (["consistency", "--generator", "shipped:dense"], "--teacher, the dense model after"),
        (["distribution_matching", "--generator", "shipped:latent"], "or shipped:teacher"),
        (["flow", "--generator", "shipped:nothing"], "no 'nothing'"),
        (["flow", "--generator", "nothing.safetensors"], "nothing.safetensors"),
        (["flow", "--data", "nowhere"], "--data nowhere is not there: give world"),
        (["flow", "--data", "README.md"], "outside the grammar|prompts alone|README"),
        (["none.py", "--generator", "shipped:dense"], "none.py is no Python file"),
        (["flow", "--device", "cuda:7"], "torch sees"),
        (["flow", "--device", "foo"], "there is no device 'foo' to train on: give cpu or cuda"),
        (["flow", "--device", "meta"], "there is no device 'meta' to train on"),
        (["flow", "--threads", "0"], "--threads is 0, but it must be at least 1"),
        (["flow", "--set", "optimiser.lr=1e38"], "neither may exceed 1e\\+30"),
        (["distribution_matching", "--set", "options.critic_updates=-1"], "updates -1.*least 1"),
        (["distribution_matching", "--set", "options.critic_updates=0"], "updates 0.*least 1"),
        (["distribution_matching", "--set", "options.grad_frames=0"], "grad_frames 0.*left out"),
        (["distribution_matching", "--set", "options.clips=0"], "clips 0"),
        (["distribution_matching", "--set", "options.score_range=[9,9]"], "timesteps 9 to 9"),
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
        command += ["--generator", "shipped:teacher", "--out", str(tmp_path / "two"), *FEW]
        command += options
        environment = os.environ | {"PYTHONPATH": str(repo_root)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)

    assert "does not divide over 2 ranks" in launched("--set", "batch=3").stderr
    done = launched()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tmp_path / 'two' / 'model.safetensors'}\n"
    assert "UserWarning" not in done.stderr
    assert train("flow", tmp_path / "one", "--generator", "shipped:teacher") == 0
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    # Muon multiplies what two orders of summation differ in
    assert max(float((mine[n] - theirs[n]).abs().max()) for n in mine) < 1e-5


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_of_the_miniature_is_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = dry(capsys, "flow")
    assert "flow, mini, 1 rank," in told and "peak of rank 0" in told
    assert re.search(r"generator, fp32 +2\.8 MB\n", told)
    assert re.search(r"MB   fits \d[\d.]* GB \(free on this machine\)", told)
    assert f"about {STEP_SECONDS['flow']} s a step, 12 min for 3600 steps" in told
    halved = dry(capsys, "flow", "--set", "batch=8", "--set", "steps=1")
    assert "about 0.1 s a step, 0 s for 1 step\n" in halved and "scaled by FLOPs" in halved
    monkeypatch.setattr(host, "memory_gib", lambda: 1.0)  # enough for one
    shared = dry(capsys, "flow", "--ranks", "2", "--set", "batch=2")
    assert "DOES NOT FIT 2 times into 1.07 GB" in shared
    assert "no time: one rank alone was measured" in shared
    on_card = dry(capsys, "flow", "--device", "cuda", "--set", "batch=1")
    assert "fits 80 GB (H100)" in on_card and "1 x 1 sample of 12 frames" in on_card
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_wan_is_of_eight_cards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    real = train_plan.plan_training

    def seen(*given: object) -> object:
        asked.extend(given[3:])
        return real(stages("mini")["flow"], mini(), mini(), 1)

    monkeypatch.setattr(train_plan, "plan_training", seen)
    dry(capsys, "consistency", "--preset", "wan-1.3b")
    assert asked == [8, "H100", None]


def test_a_step_of_no_known_time_says_why() -> None:
    found = host.this_host("small", stages("small")["flow"], small(), small())
    assert found.step_s is None and found.why == "none of preset small was measured on a CPU"
