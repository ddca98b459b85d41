"""Objectives as the trainer asks them: their losses are the pure functions, joined by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from training.runs import DENSE, FRAMES, LATENT, Clips, run_of, trained

from mla_study.errors import UserError
from mla_study.kernels.masks import teacher_forcing
from mla_study.training.batch import Draws
from mla_study.training.flow import add_noise, block_timesteps, x0_from_flow
from mla_study.training.objective import Roles, make_objective, objective_class
from mla_study.training.objectives.consistency import HUBER
from mla_study.training.objectives.flow import Flow, dropped
from mla_study.training.objectives.teacher_forcing import TeacherForcing
from mla_study.training.start import fresh_model

SAMPLES = [3, 8, 5]


def roles() -> Roles:
    student, average = fresh_model(LATENT, 1), fresh_model(LATENT, 4)
    return Roles(student, fresh_model(DENSE, 2), fresh_model(DENSE, 3), average, null=Clips.null)


def sigma(t: Tensor) -> Tensor:
    return (t.double() / 1000)[:, None, :, None, None]


def test_teacher_forcing_scores_the_noisy_half(seed: int) -> None:
    batch, held = Clips().batch(SAMPLES), roles()
    loss = TeacherForcing(weighting="uniform").loss(
        "generator", held, batch, Draws(seed, SAMPLES, 0)
    )
    draws = Draws(seed, SAMPLES, 0)
    t = draws.each(lambda own: block_timesteps(1, FRAMES, 2, 3.0, own))
    noise, x0 = draws.noise(3, FRAMES, 4, 4).double(), batch.latents
    assert x0 is not None
    noisy = (1 - sigma(t)) * x0.double() + sigma(t) * noise
    model = held.generator.double()
    rule = teacher_forcing(FRAMES, 2, LATENT.window, "relative")
    both = torch.cat([x0.double(), noisy], dim=2)
    times = torch.cat([torch.zeros_like(t), t], dim=1)
    flow = model(both, times, model.condition(batch.context.double()), rule)[:, :, FRAMES:]
    expected = (flow - (noise - x0.double())).square().mean()
    assert float(loss["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_flow_drops_captions_and_sees_every_frame(seed: int) -> None:
    batch, held = Clips().batch(SAMPLES), roles()
    told = Flow(drop=0.0).loss("generator", held, batch, Draws(seed, SAMPLES, 0))["loss"]
    untold = Flow(drop=1.0).loss("generator", held, batch, Draws(seed, SAMPLES, 0))["loss"]
    batch.context[:] = 0
    same = Flow(drop=0.0).loss("generator", held, batch, Draws(seed, SAMPLES, 0))["loss"]
    assert float(untold) == pytest.approx(float(same), rel=1e-6)
    assert float(told) != float(untold)


def test_a_share_of_captions_is_dropped_whole() -> None:
    context, null = torch.randn(3000, 2, 3), torch.full((1, 2, 3), 7.0)
    draws = Draws(1, range(3000), 0)
    gone = (dropped(context, null, 0.1, draws) == 7).all(dim=(1, 2))
    assert gone.double().mean() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(dropped(context, null, 0.0, draws), context)
    with pytest.raises(UserError, match="drop is 2"):
        dropped(context, null, 2, draws)


def test_consistency_is_the_distance_along_one_teacher_step(seed: int) -> None:
    """The whole step in float64, from the definitions."""
    batch, held = Clips().batch(SAMPLES), roles()
    objective = make_objective("consistency", {"intervals": 7, "guidance": 2.5})
    loss = objective.loss("generator", held, batch, Draws(seed, SAMPLES, 0))["loss"]
    draws = Draws(seed, SAMPLES, 0)
    u = torch.linspace(1, 0, 8, dtype=torch.float64)
    grid = 1000 * 3 * u / (1 + 2 * u)

    def interval(own: torch.Generator) -> Tensor:
        return torch.randint(0, 7, (1, FRAMES // 2), generator=own).repeat_interleave(2, 1)

    index = draws.each(interval)
    t, later = grid[index], grid[index + 1]
    noise, x0 = draws.noise(3, FRAMES, 4, 4).double(), batch.latents
    assert x0 is not None
    x0 = x0.double()
    x_t = (1 - sigma(t)) * x0 + sigma(t) * noise

    def flow(name: str, x: Tensor, at: Tensor, context: Tensor) -> Tensor:
        model = getattr(held, name).double()
        rule = teacher_forcing(FRAMES, 2, model.config.window, "relative")
        times = torch.cat([torch.zeros_like(at), at], dim=1)
        both = torch.cat([x0, x], dim=2)
        return model(both, times, model.condition(context.double()), rule)[:, :, FRAMES:].detach()

    null = torch.zeros_like(batch.context)
    cond, uncond = flow("teacher", x_t, t, batch.context), flow("teacher", x_t, t, null)
    x_next = x_t + (sigma(later) - sigma(t)) * (uncond + 2.5 * (cond - uncond))
    student = x_t - sigma(t) * flow("generator", x_t, t, batch.context)
    target = x_next - sigma(later) * flow("ema", x_next, later, batch.context)
    square = (student - target).square().flatten(1).mean(1)
    expected = ((square + HUBER**2).sqrt() - HUBER).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_distribution_matching_moves_who_has_the_turn(seed: int) -> None:
    held = roles()
    options = {"frames": FRAMES, "critic_updates": 3, "guidance": 1.0}
    objective = make_objective("distribution_matching", options)
    assert objective.turns() == ("fake_score",) * 3 + ("generator",)
    batch = Clips().batch(SAMPLES)
    for turn in ("fake_score", "generator"):
        loss = objective.loss(turn, held, batch, Draws(seed, SAMPLES, 0))["loss"]
        loss.backward()
        for role, model in held.named().items():
            moved = any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
            assert moved == (role == turn), (turn, role)
        getattr(held, turn).zero_grad(set_to_none=True)
    # the generator's loss is half the mean square of the scores' difference
    made = objective.loss("generator", held, batch, Draws(seed, SAMPLES, 0))
    per_sample = made["gradient"]
    assert float(made["loss"]) > 0 and float(per_sample) > 0


def test_context_frames_of_a_longer_rollout_are_not_trained(seed: int) -> None:
    held, batch = roles(), Clips().batch(SAMPLES)
    options = {"frames": FRAMES, "clips": 2, "grad_frames": 2}
    objective = make_objective("distribution_matching", options)
    loss = objective.loss("generator", held, batch, Draws(seed, SAMPLES, 0))["loss"]
    loss.backward()
    assert float(loss) > 0
    assert held.generator.head.head.weight.grad is not None


def test_a_file_of_ones_own_is_an_objective(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("OBJECTIVE = 3\n")
    with pytest.raises(UserError, match=r"own\.py defines no OBJECTIVE"):
        objective_class(str(own))
    with pytest.raises(UserError, match=r"no\.py is no Python file"):
        objective_class(str(tmp_path / "no.py"))
    with pytest.raises(UserError, match="no objective 'magic'; there are consistency"):
        objective_class("magic")


HEAD = """
from mla_study.training.objective import Objective
class Own(Objective):
"""
LOSS = "    def loss(self, turn, roles, batch, draws):\n        return {}\n"
TURNS = "    def turns(self):\n        return {}\n"


def own_objective(folder: Path, body: str) -> str:
    file = folder / "own.py"
    file.write_text(f"{HEAD}{body}OBJECTIVE = Own\n")
    return str(file)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("    roles = ('teacher', 'judge')\n" + LOSS, r"roles names 'judge'; there are g"),
        ("    roles = ('teacher')\n" + LOSS, r"roles is 'teacher', but a tuple is wanted"),
        (TURNS.format("('fake_score',)") + LOSS, r"turns\(\) gives .*here of generator$"),
        (TURNS.format("()") + LOSS, r"turns\(\) gives \(\), but a tuple"),
        (
            "    roles = ('teacher', 'fake_score')\n" + TURNS.format("('teacher',)") + LOSS,
            r"here of generator, fake_score$",
        ),
        ("    pass\n", r"Own defines no loss\(self, turn, roles"),
    ],
)  # fmt: skip
def test_a_file_that_asks_for_what_there_is_not_is_told(
    body: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"own\.py: .*{told}"):
        make_objective(own_objective(tmp_path, body))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{'lost': w.sum()}", r"gave 'lost' and no 'loss': return \{\"loss\": a tensor"),
        ("{}", r"gave nothing and no 'loss'"),
        ("w.sum()", r"gave Tensor, but a dict is wanted"),
        ("None", r"gave NoneType"),
        ("{'loss': w.square()}", r"gave shape \[24\] for 'loss', but it logs scalars"),
        ("{'loss': w.sum(), 'size': 3.0}", r"gave 3\.0 for 'size'"),
        ("{'loss': w.sum().detach()}", r"gave a 'loss' that carries no gradient"),
        ("{'loss': roles.get('teacher').time_projection[1].bias.sum()}", r"role 'teacher', which"),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_be_trained_on_is_told(given: str, told: str, tmp_path: Path) -> None:
    body = LOSS.format(given).replace("return", "w = roles.get(turn).blocks[0].norm3.bias; return")
    run = run_of(own_objective(tmp_path, body), tmp_path / "run", steps=1, batch=1)
    where = "" if "roles.get" in given else r"own\.py, in the generator's turn: loss\(\) "
    with pytest.raises(UserError, match=where + told):
        trained(run)


def test_x0_and_noise_agree_with_the_flow(seed: int) -> None:
    draws = Draws(seed, SAMPLES, 0)
    x0, noise = draws.noise(3, 2, 4, 4), draws.noise(3, 2, 4, 4)
    t = torch.tensor([250.0, 10.0, 990.0])
    torch.testing.assert_close(
        x0_from_flow(add_noise(x0, noise, t), noise - x0, t), x0, atol=1e-5, rtol=1e-4
    )
