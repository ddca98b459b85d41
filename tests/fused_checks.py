"""Checks of the fused kernel that run in Triton's interpreter (a process of its own) or on a GPU.

The interpreter must be chosen before Triton is imported, so the tests start this file as a worker
(:class:`Worker`): a line of JSON in, a line out. On a GPU :func:`error_of` is called directly.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """One problem: a ring of ``capacity`` frames with ``frames`` in use, the rest poison."""

    batch: int = 2
    queries: int = 3
    heads: int = 3
    capacity: int = 4
    frames: int = 3
    tokens: int = 13
    d_nope: int = 24
    d_rope: int = 16
    d_v: int = 16
    d_c: int = 64
    dtype: str = "float32"
    scale: float = 1.0
    storage: str = "float"  # or the scheme of int8: token, channel
    rotation: str = "none"  # or inside, before
    splits: int = 1
    tile: tuple[int, int] | None = (16, 16)
    seed: int = 0


BASIC = (
    Case(),
    Case(queries=7, heads=5, d_c=208, tokens=5, dtype="float16", scale=3.0),
    Case(batch=1, queries=1, heads=12, d_c=192, d_rope=32, splits=3, rotation="inside"),
    Case(d_rope=48, d_c=80, rotation="before", frames=4, tokens=8, scale=3.0),
    Case(storage="token", rotation="inside", splits=2, dtype="float16", d_c=112, d_rope=6),
    Case(storage="channel", rotation="inside", tokens=11, scale=3.0),
    Case(storage="channel", rotation="inside", tokens=19, scale=3.0, heads=2, d_c=80),
)

# what to replace in the kernel's source -> by what: each is an error that somebody could make
MUTANTS = {
    "natural exponent for the binary one": ("* log2_scale", "* (log2_scale * 0.6931472)"),
    "mask one key too far": ("(token < keys)[None, :], score", "(token <= keys)[None, :], score"),
    "mask one key too near": (
        "(token < keys)[None, :], score",
        "(token < keys - 1)[None, :], score",
    ),
    "load one key too far": (
        "exists = (token < keys)[:, None] & (channel < CHANNELS)[None, :]\n    PARTIAL",
        "exists = (token <= keys)[:, None] & (channel < CHANNELS)[None, :]\n    PARTIAL",
    ),
    "no mask on the last tile": (
        "whole = begin + (end - begin) // BN * BN",
        "whole = begin + (end - begin + BN - 1) // BN * BN",
    ),
    "last tile left out": ("if whole < end:", "if whole + BN < end:"),
    "values not rescaled": ("acc[i] * shrink[:, None]", "acc[i]"),
    "denominator not rescaled": ("total = total * shrink + tl.sum", "total = total + tl.sum"),
    "heads outside queries": (
        "query = (row // heads).to(tl.int64)\n    head = row % heads",
        "query = (row % (rows // heads)).to(tl.int64)\n    head = row // (rows // heads)",
    ),
    "latents of the first sample": ("c_ptr + batch * stride_cb", "c_ptr"),
    "rotary keys of the first sample": ("k_ptr + batch * stride_kb", "k_ptr"),
    "scales of the first sample": ("c_scales_ptr + batch * stride_csb", "c_scales_ptr"),
    "rotated backwards": ("even * cos - odd * sin", "even * cos + odd * sin"),
    "scales of another frame": ("(token // frame_tokens)", "(token % frame_tokens)"),
    "scales change a token late": ("token < (early + 1)", "token <= (early + 1)"),
    "scales of the frame before": ("scales_ptr + late", "scales_ptr + early"),
    "splits averaged": ("weight = tl.exp2(lse - higher)", "weight = 1.0"),
    "splits overlap": ("begin = split * split_keys", "begin = split * (split_keys - BN)"),
    "second part read as the first": ("FIRST + tl.arange(0, WIDTH)", "tl.arange(0, WIDTH)"),
}


def error_of(case: Case, device: str = "cpu") -> float:
    """Norm-relative error of the kernel against the float64 oracle; infinite where it is NaN."""
    import torch

    from mla_study.kernels.latent_attention import reference
    from mla_study.kernels.latent_attention.absorbed_triton import latent_mean
    from mla_study.kernels.latent_attention.triton_tiles import Tiles
    from mla_study.model.quantize import dequantize, quantize
    from mla_study.model.rope import Rotation

    make = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=make, dtype=torch.float64)
        return values.to(dtype).to(device)

    keys = case.frames * case.tokens
    rows = (case.batch, case.queries, case.heads)
    q_nope = normal(*rows, case.d_nope) * case.scale
    q_rope = normal(*rows, case.d_rope) * case.scale
    k_up = normal(case.heads, case.d_nope, case.d_c) / math.sqrt(case.d_c)
    v_up = normal(case.heads, case.d_v, case.d_c) / math.sqrt(case.d_c)
    given: list[Any] = []
    truth: list[Any] = []
    for channels in (case.d_c, case.d_rope):
        held = normal(case.batch, case.frames, case.tokens, channels)
        if case.storage == "float":
            given.append((_ring(held, case.capacity), None))
            truth.append(held.double().flatten(1, 2))
            continue
        packed = quantize(held, "token" if case.storage == "token" else "channel")
        scales = _ring(packed.scales, case.capacity)
        given.append((_ring(packed.data, case.capacity), scales))
        truth.append(dequantize(packed, torch.float64).flatten(1, 2))
    rotation = None
    if case.rotation != "none":
        angles = torch.rand(keys, case.d_rope // 2, generator=make, dtype=torch.float64) * 100
        exact = torch.polar(torch.ones_like(angles), angles).to(device)
        rotation = exact.to(torch.complex64)
        truth[1] = Rotation(exact).apply(truth[1][:, :, None])[:, :, 0]
    shape = None if case.tile is None else Tiles(*case.tile, warps=4, stages=1)
    (c, c_scales), (k_rope, k_scales) = given
    mean = latent_mean(
        torch.einsum("bmhn,hnc->bmhc", q_nope, k_up),
        q_rope,
        c,
        k_rope,
        (case.d_nope + case.d_rope) ** -0.5,
        rotation=rotation,
        c_scales=c_scales,
        k_scales=k_scales,
        rotate_inside=case.rotation == "inside",
        shape=shape,
        splits=case.splits,
    )
    mine = torch.einsum("bmhc,hvc->bmhv", mean, v_up).double()
    exact_out = reference(
        q_nope.double(), q_rope.double(), truth[0], truth[1], k_up.double(), v_up.double()
    )
    error = ((mine - exact_out).norm() / exact_out.norm()).item()
    return error if math.isfinite(error) else math.inf


def _ring(held: Any, capacity: int) -> Any:
    """The first slots of a ring whose other slots are poison."""
    import torch

    batch, frames, *rest = held.shape
    poison = 127 if held.dtype == torch.int8 else math.nan
    ring = torch.full((batch, capacity, *rest), poison, dtype=held.dtype, device=held.device)
    ring[:, :frames] = held
    return ring[:, :frames]


def gradient_error(dtype: str = "float32", device: str = "cpu") -> float:
    """Largest error of the gradients of absorbed_triton against those of the oracle."""
    import torch

    from mla_study.kernels.latent_attention import absorbed_triton, reference

    make = torch.Generator().manual_seed(3)
    shapes = ((2, 5, 3, 24), (2, 5, 3, 16), (2, 21, 80), (2, 21, 16), (3, 24, 80), (3, 16, 80))
    given = [torch.randn(s, generator=make, dtype=torch.float64) for s in shapes]
    given = [(x / 80**0.5 if i > 3 else x).to(getattr(torch, dtype)) for i, x in enumerate(given)]
    weights = torch.randn(2, 5, 3, 16, generator=make)
    mine = [x.clone().to(device).requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    (absorbed_triton(*mine) * weights.to(device)).sum().backward()
    (reference(*truth) * weights).sum().backward()
    errors = [
        ((a.grad.double().cpu() - b.grad).norm() / b.grad.norm()).item()
        for a, b in zip(mine, truth, strict=True)
    ]
    return max(errors)


def mutated(name: str) -> Any:
    """The kernel's module with one error put into it; imported from a temporary file."""
    from mla_study.kernels.latent_attention import absorbed_triton as module

    wrapper = sys.modules[module.__module__]
    source = Path(wrapper.kernels().__file__).read_text(encoding="utf-8")
    good, bad = MUTANTS[name]
    assert source.count(good) == 1, f"{name}: {source.count(good)} places"
    folder = Path(tempfile.mkdtemp())
    file = folder / "mutant.py"
    file.write_text(source.replace(good, bad), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant", file)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


def caught(name: str, device: str = "cpu", dtype: str | None = None) -> bool:
    """Whether a case of BASIC fails, by more than a hair, with a broken kernel."""
    from mla_study.kernels.latent_attention import absorbed_triton as module

    wrapper = sys.modules[module.__module__]
    good, mutant = wrapper.kernels, mutated(name)
    wrapper.kernels = lambda: mutant
    try:
        cases = [case if dtype is None else replace(case, dtype=dtype) for case in BASIC]
        return any(error_of(case, device) > 2 * TOLERANCE[case.dtype] for case in cases)
    finally:
        wrapper.kernels = good


class Worker:
    """A process in which Triton interprets; :meth:`ask` runs one of this file's functions there."""

    def __init__(self) -> None:
        here = Path(__file__).resolve()
        path = os.pathsep.join([str(here.parents[1]), str(here.parent)])
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def error_of(self, case: Case) -> float:
        return self.ask("case", asdict(case))

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()


def refusal(given: dict[str, Any]) -> str:
    """The sentence that a case is refused with."""
    from mla_study.errors import UserError

    try:
        error_of(Case(**given))
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def main() -> None:
    """Answer lines of JSON until the input ends."""
    from jaxtyping import install_import_hook

    install_import_hook("mla_study", "runtime_check.check")
    import torch

    warnings.simplefilter("ignore", RuntimeWarning)  # broken kernels divide by zero
    torch.set_num_threads(1)
    # fresh memory is NaN, so that what the kernel does not write is seen
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    calls: dict[str, Any] = {
        "case": lambda given: error_of(Case(**given)),
        "mutant": caught,
        "gradient": gradient_error,
        "refusal": refusal,
    }
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": calls[name](*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
