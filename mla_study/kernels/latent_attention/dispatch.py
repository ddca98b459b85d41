"""Which form of latent attention to run: a pure function of shapes and a device's rates."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from mla_study.errors import UserError
from mla_study.kernels.latent_attention.cost import (
    DERIVED,
    Calibration,
    Form,
    Shape,
    costs,
    crossover,
)

# where FLOPs alone decide, the fused kernel and its PyTorch form tie, and the first is taken
GPU_FORMS: tuple[Form, ...] = ("reconstruct", "absorbed_triton", "absorbed")


@dataclass(frozen=True)
class Decision:
    """The form chosen, the modelled seconds (or FLOPs, ``derived``) of each, and what is refused.

    Attributes:
        refused: form -> why it cannot run at this shape.
        crossover: queries below which absorbed has fewer FLOPs, at these keys.
    """

    form: Form
    seconds: Mapping[Form, float]
    refused: Mapping[Form, str]
    calibration: Calibration
    crossover: float


def decide(
    shape: Shape,
    device: str = "cpu",
    keep_expanded: bool = False,
    calibration: Calibration = DERIVED,
    form: str | None = None,
) -> Decision:
    """Choose the form with the least modelled time.

    Args:
        device: cpu or cuda; the fused kernel runs on cuda only.
        keep_expanded: hold expanded keys and values over ``shape.passes`` (a dense cache again).
        calibration: rates of the device.
        form: take this one, or say why it cannot run.

    Raises:
        UserError: ``form`` is unknown or cannot run at this shape.
    """
    refused: dict[Form, str] = {}
    for name in GPU_FORMS:
        reason = _refusal(name, shape, device)
        if reason is not None:
            refused[name] = reason
    if form is not None:
        if form not in GPU_FORMS:
            raise UserError(f"there is no form '{form}': give one of {', '.join(GPU_FORMS)}")
        if form in refused:
            raise UserError(f"form {form} cannot run here: {refused[form]}")
    told = costs(shape, keep_expanded, calibration.value_is_key)
    seconds: dict[Form, float] = {
        name: calibration.seconds(told[name], name) for name in GPU_FORMS if name not in refused
    }
    ranked: list[tuple[float, Form]] = [(spent, name) for name, spent in seconds.items()]
    chosen: Form = min(ranked, key=lambda pair: pair[0])[1] if form is None else form
    limit = crossover(shape.d_c, shape.d_rope, shape.d_head, keys=shape.keys)
    return Decision(chosen, seconds, refused, calibration, limit)


@functools.lru_cache(maxsize=4096)
def choose(
    M: int,
    K: int,
    B: int = 1,
    H: int = 12,
    d_c: int = 192,
    d_rope: int = 32,
    device: str = "cpu",
    dtype: str = "bf16",
    keep_expanded: bool = False,
    *,
    d_head: int = 128,
    passes: int = 5,
    calibration: Calibration = DERIVED,
) -> Form:
    """The form to run for M queries and K keys, see :func:`decide`; pure."""
    shape = Shape(M, K, B, H, d_c, d_rope, d_head, dtype, passes)
    return decide(shape, device, keep_expanded, calibration).form


def _refusal(form: Form, shape: Shape, device: str) -> str | None:
    if form != "absorbed_triton":
        return None
    if device.partition(":")[0] != "cuda":
        return "the fused kernel computes on CUDA devices only"
    import torch

    from mla_study.kernels.latent_attention.absorbed_triton import arch_of, unavailable
    from mla_study.kernels.latent_attention.triton_tiles import unsupported

    if shape.dtype not in ("fp16", "bf16"):
        return f"the fused kernel computes in fp16 and bf16, not in {shape.dtype}"
    dtype = torch.float16 if shape.dtype == "fp16" else torch.bfloat16
    there = torch.device(device)
    # asked about a GPU on a machine without one, only the shape can be judged
    arch = arch_of(there) if torch.cuda.is_available() else None
    reason = unsupported(shape.d_c, shape.d_rope, dtype, shape.keys, arch)
    return reason or unavailable(there)


def _below(limit: float, keys: float = float("inf")) -> str:
    return "at any number of queries" if limit >= keys else f"below {limit:.0f} queries"


def explain(decision: Decision, shape: Shape) -> str:
    """The decision as text, a line a form."""
    rates = decision.calibration
    unit = "FLOP" if rates.device == "derived" else "s"
    lines = [
        f"{shape.queries} queries, {shape.keys} keys, batch {shape.batch}, {shape.heads} heads of "
        f"{shape.d_head}, d_c {shape.d_c}, d_rope {shape.d_rope}, {shape.dtype}",
        f"rates: {rates.device}"
        + (
            " (FLOPs alone: nothing was measured on this device)"
            if rates.device == "derived"
            else f", {rates.threads} threads, {rates.points} points, residual {rates.residual:.1%}"
        ),
    ]
    for form in GPU_FORMS:
        mark = "->" if form == decision.form else "  "
        if form in decision.refused:
            lines.append(f"{mark} {form:<16} cannot run: {decision.refused[form]}")
        else:
            lines.append(f"{mark} {form:<16} {decision.seconds[form]:.4g} {unit}")
    limit = decision.crossover
    many = crossover(shape.d_c, shape.d_rope, shape.d_head)
    lines.append(
        f"by FLOPs absorbed is cheaper {_below(limit, shape.keys)} "
        f"({_below(many)} where keys are many)"
    )
    if rates.value_is_key:
        sdpa = crossover(shape.d_c, shape.d_rope, shape.d_head, True, shape.keys)
        lines.append(
            f"by those of SDPA, whose values are as wide as its keys, {_below(sdpa, shape.keys)}"
        )
    return "\n".join(lines)
