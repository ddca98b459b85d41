"""Compiled rollouts beside plain ones; prints the largest differences as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rollout.rollouts import DENSE, LATENT, model_of, run
from rollout.tape import capture
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from mla_study.config import ModelConfig
from mla_study.rollout.accelerate import Acceleration, accelerate


def difference(config: ModelConfig, how: Acceleration, recorder: Any = None) -> float:
    torch._dynamo.reset()
    model = model_of(config)
    made, plain = run(model, accelerate(model, how, recorder)), run(model_of(config))
    return max(float((a - b).abs().max()) for a, b in zip(made, plain, strict=True))


def warm(call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    call()
    return capture(call)


def frames(layers: int) -> int:
    torch._dynamo.reset()
    counter: Any = CompileCounter()
    model = model_of(replace(LATENT, layers=layers))
    run(model, accelerate(model, Acceleration(compile=True, backend=counter)))
    return counter.frame_count


def main() -> None:
    torch.set_num_threads(1)
    eager = Acceleration(compile=True, backend="eager")
    found = {
        "eager dense": difference(DENSE, eager),
        "eager latent": difference(LATENT, eager),
        "aot_eager latent": difference(LATENT, replace(eager, backend="aot_eager")),
        "recorded": difference(LATENT, replace(eager, graph=True), warm),
        "frames of 2 layers": frames(2),
        "frames of 5 layers": frames(5),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
