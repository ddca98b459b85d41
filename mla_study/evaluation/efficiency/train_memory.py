"""One micro-batch of training, counted on the meta device: activations at their peak, and FLOPs.

The objective's own loss and its backward run on tensors without content, the functional cache of a
self-rollout, the sequence of 2F frames of teacher forcing and recomputed blocks among them. Every
storage that lives is kept book of, and so is what autograd saves. Attention proper counts as a
fused kernel: it saves queries, keys, values, output and a float32 number a query and head, and its
backward makes three gradients. Weights and their gradients are not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.step_memory import LiveBytes
from mla_study.model.transformer import WanTransformer, meta_model
from mla_study.training.batch import Batch, Draws
from mla_study.training.loop import objective_of, roles_of
from mla_study.training.objective import TRAINED, Objective, Role, Roles
from mla_study.training.recipe import Stage
from mla_study.training.self_rollout import draw_exit

_META = torch.device("meta")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Models:
    """What a stage trains with: shapes only.

    Attributes:
        student: of ``generator`` and ``ema``. teacher: of ``teacher`` and ``fake_score``.
    """

    stage: Stage
    student: ModelConfig
    teacher: ModelConfig

    def objective(self) -> Objective:
        """What is minimised."""
        return objective_of(self.stage)

    def config(self, role: Role) -> ModelConfig:
        """The shapes of a role."""
        return self.teacher if role in ("teacher", "fake_score") else self.student

    def named(self) -> tuple[Role, ...]:
        """All roles of the stage."""
        return roles_of(self.stage, self.objective())

    def model(self, role: Role) -> WanTransformer:
        """A role's model on the meta device, in the dtype of the passes."""
        model = meta_model(self.config(role)).to(_DTYPES[self.stage.precision]).train()
        model.requires_grad_(role in TRAINED)
        model.recompute = self.stage.recompute
        return model

    def thin(self, layers: int) -> Models:
        """The same of so many blocks."""
        return replace(
            self,
            student=replace(self.student, layers=layers),
            teacher=replace(self.teacher, layers=layers),
        )


class _NoValues(TorchFunctionMode):
    """Tests of values that are not there: none of them is bad, and no count is 0."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.any and args[0].is_meta:
            return torch.zeros((), dtype=torch.bool)
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


@dataclass
class _Tally:
    """FLOPs of all attention."""

    flops: float = 0.0


@contextmanager
def _without_values() -> Generator[_Tally]:
    """What a fused kernel allocates in place of attention proper, and no test of values."""
    tally = _Tally()

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Any:
        return _Attention.apply(q, k, v, tally)

    # a function mode would not reach the blocks that a backward recomputes
    with _NoValues(), mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield tally


class _Attention(torch.autograd.Function):
    """softmax(q k^T) v as a flash kernel leaves it in memory; q [B, H, M, D], k, v [B, H, K, .]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tally: _Tally) -> Tensor:
        ctx.tally = tally
        tally.flops += _products(q, k, (q, v))
        # tokens before heads, as the kernels do, so that joining the heads copies nothing
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        if any(ctx.needs_input_grad[:3]):
            sums = q.new_empty(q.shape[:3], dtype=torch.float32)
            ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, _, _ = ctx.saved_tensors
        # scores again, then their gradient, and those of the three inputs
        ctx.tally.flops += _products(q, k, (q, q, q, v, v))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _products(q: Tensor, k: Tensor, widths: Sequence[Tensor]) -> float:
    return 2.0 * math.prod(q.shape[:3]) * k.shape[2] * sum(x.shape[3] for x in widths)


def counted_activations(models: Models, turn: Role, samples: int) -> int:
    """Bytes that a micro-batch of an update holds at its peak beside weights and gradients.

    Raises:
        UserError: an objective that reads the values of tensors, or models of unequal depth.
    """
    first, _ = _exits(models)

    def peak(thin: Models) -> int:
        run = _prepared(thin, turn, samples)
        with LiveBytes() as live, _without_values():
            run(first)
        return live.peak

    return round(_of_all_layers(models, peak, (2, 3)))


def counted_flops(models: Models, turn: Role, samples: int) -> float:
    """FLOPs of a micro-batch of an update, forward and backward; recomputed blocks count twice.

    Matrix products and attention (FLOP = 2 multiply-adds). Where a rollout stops is random: the
    mean of the first step and the last, for each step between adds the same.

    Raises:
        UserError: as :func:`counted_activations`.
    """
    exits = _exits(models)

    def flops(thin: Models) -> float:
        run = _prepared(thin, turn, samples)
        with FlopCounterMode(display=False) as counter, _without_values() as tally:
            done = 1
            if run(exits[0]):
                run(exits[1])
                done = 2
        return (counter.get_total_flops() + tally.flops) / done

    return _of_all_layers(models, flops, (1, 2))


def _of_all_layers(
    models: Models, count: Callable[[Models], float], depths: tuple[int, int]
) -> float:
    """A count at full depth from those of few blocks: all are alike, and each adds the same."""
    layers = models.student.layers
    if models.teacher.layers != layers:
        raise UserError(
            f"student and teacher have {layers} and {models.teacher.layers} blocks: a plan needs "
            "models of one depth"
        )
    if layers <= depths[1]:
        return count(models)
    few, more = (count(models.thin(n)) for n in depths)
    return more + (layers - depths[1]) * (more - few)


def _exits(models: Models) -> tuple[int, int]:
    """Numbers of two steps in which a self-rollout stops at once, and after all of its steps."""
    stops = len(models.student.flow.denoise_steps)
    found: dict[int, int] = {}
    for step in range(100 * stops):
        found.setdefault(draw_exit(stops, Draws(models.stage.seed, (0,), step)), step)
        if len(found) == stops:
            break
    return found[0], found[stops - 1]


def _prepared(models: Models, turn: Role, samples: int) -> Callable[[int], bool]:
    """The call of one micro-batch of a step; whether it drew what all samples share."""
    stage, config, objective = models.stage, models.student, models.objective()
    with torch.device(_META):
        null = torch.zeros(1, config.text_len, config.text_dim)
    made: dict[str, Any] = {role: models.model(role) for role in models.named()}
    roles = Roles(**made, null=null)
    for parameter in roles.get(turn).parameters():
        # gradients are counted by whoever knows how they are sharded
        parameter.register_post_accumulate_grad_hook(_forget)

    def run(step: int) -> bool:
        with torch.device(_META):
            context = torch.zeros(samples, config.text_len, config.text_dim)
            shape = (config.in_channels, stage.frames, *config.latent_size)
            latents = torch.zeros(samples, *shape) if objective.needs_latents else None
        batch = Batch(context, latents, ("",) * samples)
        draws = Draws(stage.seed, range(samples), step, _META)
        before = draws.shared.get_state()
        try:
            objective.loss(turn, roles, batch, draws)["loss"].backward()
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
            raise UserError(
                f"{stage.objective} reads the values of tensors, which a dry run does not have "
                f"({str(error).splitlines()[0][:120]}): train a few steps instead"
            ) from None
        return not torch.equal(before, draws.shared.get_state())

    return run


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
