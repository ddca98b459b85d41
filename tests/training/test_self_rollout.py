"""The differentiable rollout: the same videos as the one without gradients, and where they flow."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from rollout.rollouts import DENSE, LATENT, model_of
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.stream import Rollout, RolloutConfig
from mla_study.training.batch import Draws
from mla_study.training.self_rollout import SelfRollout, draw_exit

FRAMES = 8


def context(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 10, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [DENSE, LATENT], ids=["dense", "latent"])
def test_the_last_exit_is_the_rollout(config: ModelConfig, seed: int) -> None:
    model = model_of(config)
    steps = len(config.flow.denoise_steps)
    told = context(3)
    made = SelfRollout(model).run(told, FRAMES, steps - 1, Draws(seed, [4, 7, 1], 0))
    again = Draws(seed, [4, 7, 1], 0)
    order = count()

    def noise(chunk: int, draw: int) -> Tensor:
        assert next(order) == chunk * steps + draw
        return again.noise(config.out_channels, config.window.chunk, *config.latent_size)

    rollout = Rollout(model, told, RolloutConfig(batch=3), noise=noise)
    plain = torch.cat([rollout.advance().latents for _ in range(FRAMES // 2)], dim=2)
    torch.testing.assert_close(made.detach(), plain, atol=2e-5, rtol=1e-4)


def test_gradients_flow_into_the_exit_step_alone(seed: int) -> None:
    model = model_of(LATENT).double()
    told = context(1).double()
    weight = model.blocks[1].ffn[0].weight

    def loss(chosen: WanTransformer, learnt_from: int = 0) -> Tensor:
        draws = Draws(seed, [0], 0)
        return SelfRollout(chosen, learnt_from=learnt_from).run(told, 4, 1, draws).square().sum()

    loss(model).backward()
    assert weight.grad is not None
    found, weight.grad = weight.grad.clone(), None
    # with the passes before the exit and the clean ones detached, the same by hand
    calls: list[bool] = []
    forward = model.forward

    def seen(*a: object, **k: object) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return forward(*a, **k)  # type: ignore[arg-type]

    model.forward = seen  # type: ignore[method-assign]
    value = loss(model)
    assert calls == [False, True, False] * 2
    value.backward()
    torch.testing.assert_close(weight.grad, found)
    weight.grad = None
    calls.clear()
    loss(model, learnt_from=2).backward()
    assert calls == [False, False, False, False, True, False]
    assert not torch.allclose(weight.grad, found)


class Exact(Draws):
    def noise(self, *shape: int) -> Tensor:
        return super().noise(*shape).double()


def test_the_gradient_is_a_finite_difference_of_the_exit_pass(seed: int) -> None:
    model = model_of(LATENT).double()
    told, weight = context(1).double(), model.blocks[1].ffn[0].weight

    def loss() -> Tensor:
        made = SelfRollout(model, learnt_from=2).run(told, 4, 1, Exact(seed, [0], 0))
        return made.square().sum()

    loss().backward()
    assert weight.grad is not None
    size, forward = float(weight.grad.norm()), model.forward
    way = weight.grad / size

    def moved(by: float) -> float:
        def passed(*a: object, **k: object) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(*a, **k)  # type: ignore[arg-type]
            weight.data += by * way
            made = forward(*a, **k)  # type: ignore[arg-type]
            weight.data -= by * way
            return made

        model.forward = passed  # type: ignore[method-assign]
        return float(loss().detach())

    # the cache holds float32, which a smaller step would show
    assert (moved(1e-2) - moved(-1e-2)) / 2e-2 == pytest.approx(size, rel=1e-3)


def test_one_exit_for_the_batch_and_steps_beyond_the_schedule(seed: int) -> None:
    drawn = {draw_exit(4, Draws(seed, [n], n)) for n in range(60)}
    assert drawn == {0, 1, 2, 3}
    assert draw_exit(4, Draws(seed, [1, 2], 9)) == draw_exit(4, Draws(seed, [8], 9))
    with pytest.raises(UserError, match="step 4 leaves the schedule of 4 steps"):
        SelfRollout(model_of(DENSE)).run(context(1), 4, 4, Draws(seed, [0], 0))
