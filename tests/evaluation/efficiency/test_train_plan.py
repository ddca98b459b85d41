"""The plan of a training stage against the trainer itself, on real tensors and real shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model.tiny import DENSE, LATENT
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mla_study.config import ModelConfig, WindowConfig, wan_1_3b
from mla_study.errors import UserError
from mla_study.evaluation.bench_train import Noise
from mla_study.evaluation.efficiency import train_memory
from mla_study.evaluation.efficiency.memory import parameters
from mla_study.evaluation.efficiency.model_cost import chunk_cost, prompt_cost
from mla_study.evaluation.efficiency.step_memory import LiveBytes
from mla_study.evaluation.efficiency.train_bytes import (
    gathered_bytes,
    gradient_bytes,
    optimiser_bytes,
    shard_bytes,
)
from mla_study.evaluation.efficiency.train_memory import (
    Models,
    counted_activations,
    counted_flops,
)
from mla_study.evaluation.efficiency.train_plan import plan_training
from mla_study.model.transformer import WanTransformer
from mla_study.training.batch import Draws
from mla_study.training.loop import Run, Trainer
from mla_study.training.objective import Roles
from mla_study.training.ranks import Ranks, accumulating
from mla_study.training.recipe import Optimiser, Stage, stages
from mla_study.training.start import fresh_model

SIZES: dict[str, Any] = {"latent_size": (6, 10), "window": WindowConfig(1, 2, 2)}
TEACHER, STUDENT = replace(DENSE, **SIZES), replace(LATENT, **SIZES)
ALONE = Ranks(0, 1, torch.device("cpu"), False)
MIXED = Optimiser(lr=1e-3, lr_matrix=1e-2)
OBJECTIVES = ("flow", "teacher_forcing", "consistency", "distribution_matching")


def stage_of(objective: str, **changes: Any) -> Stage:
    rolls = objective == "distribution_matching"
    options = {"critic_updates": 1} if rolls else {}
    frames = 4 if rolls else 6
    made = Stage(objective, 20, 6, MIXED, frames, options, micro_batch=3, ema=0.9)
    return replace(made, **changes)


def trainer_of(stage: Stage, model: ModelConfig, out: Path) -> Trainer:
    start, teacher = fresh_model(model), fresh_model(TEACHER, 1)
    run = Run(stage, out, start, Noise(model, stage.frames), teacher)
    return Trainer(run, ALONE, progress=False)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_peak_of_a_real_step(objective: str, recompute: bool, tmp_path: Path) -> None:
    """Within 6 % of what lives at the peak of the trainer's own step on the CPU."""
    stage = stage_of(objective, recompute=recompute)
    trainer = trainer_of(stage, STUDENT, tmp_path)
    trainer._one_step()  # the optimisers' states are there from now on
    with LiveBytes() as live:
        trainer._one_step()
    models, expected = Models(stage, STUDENT, TEACHER), 0
    for role in set(trainer.turns):
        whole = trainer.roles.get(role)
        held = gradient_bytes(whole, ALONE, 2) + counted_activations(models, role, 3)
        expected = max(expected, held)
    assert expected == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_and_states_are_those_of_the_trainer(objective: str, tmp_path: Path) -> None:
    stage = stage_of(objective, critic=replace(MIXED, lr_matrix=0.0))
    trainer = trainer_of(stage, STUDENT, tmp_path)
    trainer._one_step()
    told = plan_training(stage, STUDENT, TEACHER, 1).held
    for role, model in trainer.roles.named().items():
        assert told.pop(f"{role}, fp32") == sum(p.nbytes for p in model.parameters())
    for role, optimisers in trainer.optimisers.items():
        for optimiser in optimisers:
            name = f"{type(optimiser).__name__} states of {role}"
            assert told.pop(name) == states_of(optimiser), name
    assert list(told) == ["runtime"]


def states_of(optimiser: torch.optim.Optimizer) -> int:
    held = (value for state in optimiser.state.values() for value in state.values())
    return sum(local(value).nbytes for value in held if value.ndim)


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


@pytest.fixture
def five_ranks() -> Iterator[Ranks]:
    """The first of five, the others of which only seem to be there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=5)
    try:
        yield Ranks(0, 5, torch.device("cpu"), True)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("model", [TEACHER, STUDENT])
def test_shards_are_those_of_fsdp(five_ranks: Ranks, model: ModelConfig) -> None:
    stage = stage_of("teacher_forcing", precision="bf16", batch=10)
    whole, sharded = fresh_model(model), fresh_model(model)
    five_ranks.shard(sharded, "bf16")
    trainer = trainer_of(stage, model, Path("unwritten"))
    parts = list(sharded.parameters())
    assert shard_bytes(whole.parameters(), 5) == sum(local(p).nbytes for p in parts)

    def backward(last: bool) -> None:
        with accumulating(sharded, last):
            batch = Noise(model, stage.frames).batch(range(1))
            roles = Roles(sharded, null=torch.zeros(1, model.text_len, model.text_dim))
            trainer.objective.loss("generator", roles, batch, Draws(0, (0,), 0))["loss"].backward()

    backward(last=False)
    groups = [
        group
        for module in sharded.modules()
        if hasattr(module, "_get_fsdp_state")
        for group in [module._get_fsdp_state()._fsdp_param_group]
        if group is not None
    ]
    held = [p.unsharded_accumulated_grad for group in groups for p in group.fsdp_params]
    assert all(grad is not None for grad in held)
    assert gradient_bytes(whole, five_ranks, 2) == sum(grad.nbytes for grad in held)
    backward(last=True)
    assert gradient_bytes(whole, five_ranks, 1) == sum(local(p.grad).nbytes for p in parts)
    from mla_study.training.optimisers import make_optimisers

    told = optimiser_bytes(whole, stage, "generator", five_ranks)
    for optimiser in make_optimisers(sharded, stage.optimiser):
        optimiser.step()
        assert told.pop(type(optimiser).__name__) == states_of(optimiser)
    assert not told


def test_what_lies_outside_of_blocks_stays_whole(five_ranks: Ranks) -> None:
    """After a pass without gradients FSDP2 keeps those weights, and the blocks' are gone."""
    model = fresh_model(STUDENT)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    inside = {id(p) for block in model.blocks for p in block.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    told = gathered_bytes(model, [model, model], five_ranks, "bf16")
    assert told == 2 * (2 * rest + 2 * max(blocks)) + 6 * max(blocks)
    padded = 5 * shard_bytes(outside, 5) // 4
    assert rest <= padded < 1.1 * rest
    five_ranks.shard(model, "bf16")
    with torch.no_grad():
        context = torch.zeros(1, STUDENT.text_len, STUDENT.text_dim)
        model(torch.zeros(1, 3, 2, 6, 10), torch.zeros(1), model.condition(context))
    live = [
        part._unsharded_param.untyped_storage().nbytes()
        for module in model.modules()
        if hasattr(module, "_get_fsdp_state")
        for group in [module._get_fsdp_state()._fsdp_param_group]
        if group is not None
        for part in group.fsdp_params
    ]
    assert sum(live) == 2 * padded


def test_flops_are_those_of_the_closed_form() -> None:
    """A backward is twice its products, 2.5 times its attention; recomputed blocks come again."""
    stage = stage_of("flow", ema=0.0, options={"independent": 1.0})
    frames, batch = stage.frames, 2
    cost = chunk_cost(TEACHER, WindowConfig(0, 0, frames), batch=batch, dtype="fp32", passes=1)
    parts = dict(cost.parts)
    tokens = batch * frames * 15
    attention = 4 * tokens * 15 * frames * 36 * 2 + 4 * tokens * 5 * 36 * 2
    forward = sum(parts.values()) + prompt_cost(TEACHER, batch).flops
    # the timestep of every frame has an embedding, and inputs of the model have no gradient
    forward += (frames - 1) * parts["time"]
    inputs = 2 * 36 * (batch * 5 * 7 + batch * frames * 12 + tokens * 3 * 4)
    expected = 3 * (forward - attention) + 3.5 * attention - inputs
    models = Models(stage, TEACHER, TEACHER)
    assert counted_flops(models, "generator", batch) == pytest.approx(expected, rel=1e-12)
    again = counted_flops(replace(models, stage=replace(stage, recompute=True)), "generator", batch)
    inside = sum(parts[n] for n in ("projections", "self-attention", "cross-attention", "ffn"))
    # all of it, for the gate behind a block's last product has a gradient too
    assert again - expected == pytest.approx(inside, rel=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("objective", ["teacher_forcing", "distribution_matching"])
def test_few_blocks_tell_of_all(objective: str, recompute: bool) -> None:
    deep = {"student": replace(STUDENT, layers=4), "teacher": replace(TEACHER, layers=4)}
    models = Models(stage_of(objective, recompute=recompute), **deep)
    told = counted_activations(models, "generator", 3)
    run = train_memory._prepared(models, "generator", 3)
    with LiveBytes() as live, train_memory._without_values():
        run(train_memory._exits(models)[0])
    assert told == live.peak


def test_flops_of_a_rollout_are_a_mean_over_where_it_stops() -> None:
    models = Models(stage_of("distribution_matching"), STUDENT, TEACHER)
    run = train_memory._prepared(models, "generator", 1)
    stops: dict[int, int] = {}
    for step in range(40):
        stops.setdefault(train_memory.draw_exit(4, Draws(0, (0,), step)), step)
    assert sorted(stops) == [0, 1, 2, 3]
    from torch.utils.flop_counter import FlopCounterMode

    found: list[float] = []
    for stop in range(4):
        with FlopCounterMode(display=False) as counter, train_memory._without_values() as tally:
            run(stops[stop])
        found.append(counter.get_total_flops() + tally.flops)
    assert found[0] < found[1] < found[2] < found[3]
    assert counted_flops(models, "generator", 1) == pytest.approx(sum(found) / 4, rel=1e-12)


def test_wan_on_eight_ranks() -> None:
    stage = stages("wan-1.3b")["teacher_forcing"]
    found = plan_training(stage, wan_1_3b(True), wan_1_3b(), 8, "h100")
    assert (found.samples, found.pieces) == (2, 8)
    even = 4 * parameters(wan_1_3b(True)) / 8
    assert even <= found.held["generator, fp32"] < 1.002 * even
    (update,) = found.updates
    assert update.gradients == 8 * even
    # the input of every block is kept: 2 x 42 frames of 1560 tokens, 1536 channels in bf16
    assert update.activations > 30 * 2 * 42 * 1560 * 1536 * 2
    text = found.text()
    assert "ranks 0 to 7" in text and "fits 80 GB" in text and "s a step on H100" in text
    table = {(row["update"], row["part"]): row["value"] for row in found.rows()}
    parts = [size for (role, _), size in table.items() if not role]
    assert table["", "peak"] == pytest.approx(found.peak / 1e9)
    assert sum(parts[:3]) == pytest.approx(sum(found.held.values()) / 1e9)
    assert found.seconds == pytest.approx(found.flops / (0.4 * 989.4e12))
    # more frames need more, and without recomputing the blocks it does not fit
    loose = plan_training(replace(stage, recompute=False), wan_1_3b(True), wan_1_3b(), 8, "H100")
    assert "DOES NOT FIT" in loose.text()


def test_float32_has_no_time() -> None:
    found = plan_training(stage_of("flow"), TEACHER, TEACHER, 3, "H100")
    assert found.seconds is None and "rate of H100 is of bf16" in found.text()
    assert [row["part"] for row in found.rows()][-1] == "peak"


OWN = """
from dataclasses import dataclass
from mla_study.training.objective import Objective

@dataclass(frozen=True)
class Own(Objective):
    def loss(self, turn, roles, batch, draws):
        value = batch.latents.mean()
        return {"loss": value * float(value)}

OBJECTIVE = Own
"""


def test_what_cannot_be_planned_is_told(tmp_path: Path) -> None:
    stage = stage_of("teacher_forcing")
    with pytest.raises(UserError, match="does not divide over 4 ranks"):
        plan_training(stage, STUDENT, TEACHER, 4)
    with pytest.raises(UserError, match="at least 1"):
        plan_training(stage, STUDENT, TEACHER, 0)
    with pytest.raises(UserError, match="no card 'H1'"):
        plan_training(stage, STUDENT, TEACHER, 1, "H1")
    with pytest.raises(UserError, match="one depth"):
        plan_training(stage_of("consistency"), STUDENT, replace(TEACHER, layers=3), 1)
    own = tmp_path / "own.py"
    own.write_text(OWN)
    with pytest.raises(UserError, match="reads the values of tensors"):
        plan_training(stage_of(str(own)), STUDENT, TEACHER, 1)


def test_models_are_left_alone() -> None:
    assert isinstance(Models(stage_of("flow"), TEACHER, TEACHER).model("ema"), WanTransformer)
    q = torch.randn(1, 2, 3, 4)
    with train_memory._without_values():
        pass
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert torch.allclose(out, (q @ q.mT / 2).softmax(-1) @ q, atol=1e-6)
