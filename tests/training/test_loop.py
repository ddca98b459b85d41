"""Runs that stop and go on, alone and in two ranks: the same numbers as an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.runs import LATENT, OBJECTIVES, Clips, furthest, run_of, stage, trained

from mla_study.errors import UserError
from mla_study.training import checkpoint
from mla_study.training.batch import Batch, Draws
from mla_study.training.folder import differences
from mla_study.training.loop import Run, Trainer, compile_blocks
from mla_study.training.objective import Roles
from mla_study.training.ranks import Ranks, ranks
from mla_study.training.start import fresh_model

HERE = Path(__file__).parent
ALONE = Ranks(0, 1, torch.device("cpu"), False)


def torchrun(count: int, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), str(HERE / "runs.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_goes_on_to_the_same_bits(objective: str, tmp_path: Path) -> None:
    log, weights = trained(run_of(objective, tmp_path / "whole"))
    run = run_of(objective, tmp_path / "cut")
    trained(run)
    # back to where it stood after the second step
    shutil.rmtree(run.out / "checkpoints" / "step-00000003")
    (run.out / "model.safetensors").unlink()
    again, resumed = trained(run)
    assert again.equals(log)
    assert furthest(weights, resumed) == 0
    assert log["value"].notna().all() and set(log["step"]) == {1, 2, 3}


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    run = run_of("teacher_forcing", tmp_path)
    trained(run)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    trained(run)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["flow", "distribution_matching"])
def test_two_ranks_are_one_and_one_goes_on_from_two(objective: str, tmp_path: Path) -> None:
    log, weights = trained(run_of(objective, tmp_path / "one"))
    torchrun(2, objective, str(tmp_path / "two"), "{}")
    again, same = trained(run_of(objective, tmp_path / "two"))  # reads what is there
    assert furthest(weights, same) < 1e-6
    both = log.merge(again, on=["step", "name"])
    assert len(both) == len(log) == len(again)
    assert (both["value_x"] - both["value_y"]).abs().max() < 1e-6
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000003")
    (tmp_path / "two" / "model.safetensors").unlink()
    _, alone = trained(run_of(objective, tmp_path / "two"))
    assert furthest(weights, alone) < 1e-6


@pytest.mark.slow
def test_sigkill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    _, weights = trained(run_of("teacher_forcing", tmp_path / "whole", steps=60))
    out = tmp_path / "cut"
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}"}
    command = [sys.executable, str(HERE / "runs.py"), "teacher_forcing", str(out), '{"steps": 60}']
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*5.tmp")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # a half-written newest one, whatever the moment was
    half = out / "checkpoints" / "step-00000059.tmp"
    half.mkdir(exist_ok=True)
    (half / "__0_0.distcp").write_bytes(b"half")
    _, resumed = trained(run_of("teacher_forcing", out, steps=60))
    assert furthest(weights, resumed) == 0
    assert not list(out.glob("checkpoints/*.tmp"))


def test_micro_batches_are_the_whole_batch(tmp_path: Path) -> None:
    _, whole = trained(run_of("teacher_forcing", tmp_path / "a"))
    _, pieces = trained(run_of("teacher_forcing", tmp_path / "b", micro_batch=3))
    assert 0 < furthest(whole, pieces) < 1e-6  # sums in another order


class Poisoned(Clips):
    def batch(self, samples: list[int]) -> Batch:
        made = super().batch(samples)
        assert made.latents is not None
        if samples[0] >= 8:  # the third step
            made.latents[0, 0, 0, 0, 0] = float("nan")
        return made


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = replace(run_of("teacher_forcing", tmp_path), data=Poisoned())
    found = (
        r"teacher_forcing, step 3, rank 0: .*loss.*NaN.*step-00000002 is the last good; the data of"
    )
    with pytest.raises(UserError, match=found):
        Trainer(run, ALONE, progress=False).train()


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Weights of this value after so many steps."""
    one_step = Trainer._one_step

    def spoilt(self: Trainer) -> object:
        rows = one_step(self)
        if self.step + 1 == step:
            self.roles.generator.head.head.weight.data.fill_(value)
        return rows

    monkeypatch.setattr(Trainer, "_one_step", spoilt)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_nothing_goes_on_from_are_not_saved(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, value)
    told = "step 2: the generator's weights became NaN.*step-00000001 stays"
    with pytest.raises(UserError, match=told):
        Trainer(run_of("teacher_forcing", tmp_path), ALONE, progress=False).train()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_that_no_step_goes_on_from_is_not_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # their squares can be summed, but not times the next step's
    spoil(monkeypatch, 2, 1e18)
    told = "step 3.*step-00000002 led to this, .*step-00000001 is the last good; lower the"
    with pytest.raises(UserError, match=told):
        Trainer(run_of("teacher_forcing", tmp_path), ALONE, progress=False).train()
    spoil(monkeypatch, 1, 1e18)
    told = "step 2.*step-00000001 led to this, there is none before; lower the"
    with pytest.raises(UserError, match=told):
        Trainer(run_of("teacher_forcing", tmp_path / "b"), ALONE, progress=False).train()


def test_no_space_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("teacher_forcing", tmp_path)
    save = checkpoint.state_dict_saver.save

    def full(state: object, checkpoint_id: Path, no_dist: bool) -> None:
        if checkpoint_id.name.startswith("step-00000002"):
            raise OSError(28, "No space left on device")
        save(state, checkpoint_id=checkpoint_id, no_dist=no_dist)

    monkeypatch.setattr(checkpoint.state_dict_saver, "save", full)
    with pytest.raises(UserError, match=r"step 2 cannot be saved.*No space.*step-00000001 stays"):
        Trainer(run, ALONE, progress=False).train()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    _, weights = trained(run)
    _, whole = trained(run_of("teacher_forcing", tmp_path.with_name("whole")))
    assert furthest(weights, whole) == 0


def test_another_run_is_refused_by_its_differences(tmp_path: Path) -> None:
    trained(run_of("teacher_forcing", tmp_path, steps=1))
    other = stage("teacher_forcing", steps=1, batch=2)
    other = replace(other, optimiser=replace(other.optimiser, lr=1e-3))
    run = Run(other, tmp_path, fresh_model(LATENT, 1), Clips(), fresh_model(LATENT, 2))
    with pytest.raises(UserError, match=r"stage\.batch: was 4, is 2; stage\.optimiser\.lr: was"):
        trained(run)
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}, "c": 2}) == ["c: was None, is 2"]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_checkpoint_cut_short_is_named(steps: int, tmp_path: Path) -> None:
    run = run_of("teacher_forcing", tmp_path, steps=steps)
    trained(run)
    (tmp_path / "model.safetensors").unlink()
    newest = tmp_path / "checkpoints" / f"step-0000000{steps}"
    os.truncate(newest / "__0_0.distcp", 1000)
    on = "goes on from the one before" if steps == 2 else "begins anew, for there is no other"
    with pytest.raises(UserError, match=rf"{newest.name} cannot be read \(\w.*\): remove it.*{on}"):
        trained(run)
    shutil.rmtree(newest)
    _, again = trained(run)
    _, whole = trained(run_of("teacher_forcing", tmp_path / "whole", steps=steps))
    assert furthest(again, whole) == 0


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = run_of("teacher_forcing", tmp_path, steps=2)
    trained(run)
    newest = tmp_path / "checkpoints" / "step-00000002"
    (newest / ".metadata").write_bytes(b"junk")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000002 cannot be read.*from the one before"):
        trained(run)


def test_a_newest_without_its_log_or_index_is_none(tmp_path: Path) -> None:
    run = run_of("teacher_forcing", tmp_path / "cut")
    _, whole = trained(run)
    newest = run.out / "checkpoints" / "step-00000003"
    (newest / checkpoint.LOG).unlink()
    (run.out / "model.safetensors").unlink()
    _, resumed = trained(run)
    assert furthest(whole, resumed) == 0
    assert (newest / checkpoint.LOG).exists()


def test_compiled_latent_blocks_have_one_form() -> None:
    model = fresh_model(LATENT)
    compile_blocks(model)  # nothing is compiled before the first pass
    assert [block.self_attn.form for block in model.blocks] == ["reconstruct"] * 2


def test_the_moving_average_is_that_of_the_updates(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def look(step: int, roles: Roles) -> list[dict[str, object]]:
        name = "blocks.0.ffn.0.weight"
        seen.append(dict(roles.generator.named_parameters())[name].detach().clone())
        return [{"name": "looked", "value": float(step)}]

    run = replace(run_of("teacher_forcing", tmp_path), observers=(look,), observe_at=(1, 2, 3))
    log, weights = trained(run)
    average = seen[0].double()
    for step, value in enumerate(seen[1:], start=1):
        decay = min(0.8, step / (step + 9))
        average = decay * average + (1 - decay) * value.double()
    torch.testing.assert_close(weights["blocks.0.ffn.0.weight"].double(), average)
    assert log[log["name"] == "looked"]["value"].tolist() == [0, 1, 2, 3]


def test_more_ranks_than_a_batch_can_feed() -> None:
    with pytest.raises(UserError, match="batch of 4 does not divide over 3 ranks"):
        Ranks(1, 3, torch.device("cpu"), True).share(4)
    assert list(Ranks(1, 2, torch.device("cpu"), True).share(4)) == [2, 3]
    with pytest.raises(UserError, match="wants GPU"), ranks("cuda", "fp32"):
        pass


def test_draws_follow_the_sample_and_not_the_batch(seed: int) -> None:
    together = Draws(seed, [4, 9, 2], 1).noise(3, 2)
    apart = torch.cat([Draws(seed, [n], 1).noise(3, 2) for n in (4, 9, 2)])
    assert torch.equal(together, apart)
    one, other = (torch.rand(1, generator=Draws(seed, n, 1).shared) for n in ([1], [2, 3]))
    assert torch.equal(one, other)


def test_bf16_passes_keep_float32_masters(tmp_path: Path) -> None:
    run = run_of("teacher_forcing", tmp_path, precision="bf16", steps=2)
    with ranks("cpu", "bf16") as here:
        trainer = Trainer(run, here, progress=False)
        trainer.train()
        kinds = {p.dtype for p in trainer.roles.generator.parameters()}
    assert kinds == {torch.float32}
    _, exact = trained(run_of("teacher_forcing", tmp_path.with_name("exact"), steps=2))
    from safetensors.torch import load_file

    assert 0 < furthest(load_file(tmp_path / "model.safetensors"), exact) < 0.05


@pytest.mark.slow
def test_compiled_blocks_train_the_same(tmp_path: Path) -> None:
    # in a process of its own: shapes that are checked at run time do not compile
    torchrun(1, "teacher_forcing", str(tmp_path / "a"), '{"compile": true}')
    _, compiled = trained(run_of("teacher_forcing", tmp_path / "a", compile=True))
    _, plain = trained(run_of("teacher_forcing", tmp_path / "b"))
    assert furthest(compiled, plain) < 1e-6


def test_the_record_names_what_was_run(tmp_path: Path) -> None:
    trained(run_of("consistency", tmp_path, steps=1))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["provenance"] == "measured"
    assert record["identity"]["config"]["stage"]["objective"] == "consistency"
    assert record["identity"]["config"]["data"] == {"kind": "gaussian"}
