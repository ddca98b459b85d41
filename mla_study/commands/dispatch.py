"""``mla-study dispatch`` and ``mla-study calibrate``: which form of latent attention, and why."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mla_study.errors import UserError


@dataclass(frozen=True)
class Dispatch:
    """Print which form of latent attention runs at a shape, and what each would cost.

    Example: mla-study dispatch --queries 4680 --keys 15600
    """

    queries: int
    """Query tokens of a pass: 4680 are three frames of Wan at 480p."""
    keys: int
    """Key tokens: sink, history and the queries themselves."""
    batch: int = 1
    """Samples."""
    heads: int = 12
    """Heads."""
    d_c: int = 192
    """Latent, cached."""
    d_rope: int = 32
    """Rotary channels of a head."""
    d_head: int = 128
    """Channels of a head."""
    dtype: Literal["fp64", "fp32", "bf16", "fp16"] | None = None
    """Default: bf16 where the device multiplies it faster, else fp32."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """Threads of the rates to take (default: the nearest to one)."""
    calibration: Path | None = None
    """Rates of this device in place of the committed ones; mla-study calibrate makes them."""
    by_flops: bool = False
    """Forget the rates and count FLOPs alone."""
    keep_expanded: bool = False
    """Hold expanded keys and values over the passes: the memory of a dense cache."""
    passes: int = 5
    """Passes over a chunk: four steps and the clean pass."""
    form: str | None = None
    """Ask for a form by name: reconstruct, absorbed or absorbed_triton."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Decide and print."""
        from mla_study.kernels.latent_attention.calibrations import fast_bf16, find
        from mla_study.kernels.latent_attention.cost import DERIVED, Shape, costs
        from mla_study.kernels.latent_attention.dispatch import decide, explain

        kind = self.device.partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise UserError(f"there is no device '{self.device}': give cpu or cuda")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads is {self.threads}, but it must be at least 1")
        dtype = self.dtype or ("bf16" if fast_bf16(kind) else "fp32")
        shape = Shape(
            self.queries, self.keys, self.batch, self.heads, self.d_c, self.d_rope, self.d_head,
            dtype, self.passes,
        )  # fmt: skip
        if self.queries > self.keys:
            raise UserError(
                f"{self.queries} queries and {self.keys} keys: the queries are among the keys, so "
                "there must be at least as many of these"
            )
        if self.by_flops and self.calibration is not None:
            raise UserError("--by-flops forgets the rates that --calibration names: give one")
        rates = DERIVED
        if not self.by_flops and (kind == "cpu" or _cuda()):
            rates = find(dtype, self.device, self.threads, self.calibration)
        elif self.calibration is not None:
            raise UserError("--calibration names rates of a GPU, but torch sees none here")
        decision = decide(shape, self.device, self.keep_expanded, rates, self.form)
        told = costs(shape, self.keep_expanded, rates.value_is_key)
        if self.json:
            data = {
                "form": decision.form,
                "modelled_seconds": dict(decision.seconds) if rates is not DERIVED else None,
                "flops": {form: told[form].flops for form in decision.seconds},
                "bytes": {form: told[form].bytes for form in decision.seconds},
                "refused": dict(decision.refused),
                "crossover_queries": decision.crossover,
                "shape": asdict(shape),
                "keep_expanded": self.keep_expanded,
                "rates_of": rates.device,
            }
            print(json.dumps(data, indent=1).replace("Infinity", "null"))
            return 0
        print(explain(decision, shape))
        for form in decision.seconds:
            cost = told[form]
            held = f", holds {cost.held / 1e6:.4g} MB a layer" if cost.held else ""
            print(
                f"{form:<16} {cost.flops / 1e9:.4g} GFLOP, {cost.bytes / 1e6:.4g} MB moved, "
                f"{cost.transient / 1e6:.4g} MB transient{held}"
            )
        return 0


def _cuda() -> bool:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class Calibrate:
    """Measure this device's rates, so that dispatch predicts seconds and not FLOPs.

    Rates are fitted on one grid of shapes, and the choice is checked on another. A form whose
    output is wrong gets no number.

    Example: mla-study calibrate --quick --out rates.json
    """

    out: Path | None = None
    """File to write (default: the package's own, which dispatch then finds)."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16, fp16."""
    threads: int = 1
    """Threads of torch; CPU seconds of the process are counted on one, wall seconds on more."""
    device: str = "cpu"
    """cpu or cuda."""
    quick: bool = False
    """Few small shapes, to try it: writes only with --out."""
    write: bool = True
    """Write the rates, and without --quick also results/data/calibration."""

    def run(self) -> int:
        """Measure, print, write."""
        from mla_study.evaluation.efficiency.calibration_run import run_calibration

        if self.threads < 1:
            raise UserError(f"--threads is {self.threads}, but it must be at least 1")
        if not self.dtypes:
            raise UserError("--dtypes is empty: give some of fp32, bf16, fp16")
        for dtype in self.dtypes:
            if dtype not in ("fp32", "bf16", "fp16"):
                raise UserError(f"--dtypes {dtype}: give some of fp32, bf16, fp16")
        path = run_calibration(
            self.dtypes, self.threads, self.device, self.quick, self.write, self.out
        )
        if path is not None:
            print(f"wrote {path}", file=sys.stderr)
        return 0
