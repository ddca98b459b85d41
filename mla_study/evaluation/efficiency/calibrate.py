"""Measure the forms of latent attention on a grid of shapes, and fit the cost model's rates to it.

Example::

    mla-study calibrate --quick
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import least_squares
from torch import Tensor
from tqdm import tqdm

from mla_study.errors import UserError
from mla_study.evaluation.efficiency.ceilings import ceilings
from mla_study.evaluation.timing import Clock, Spread, clock_of, interleaved
from mla_study.kernels.latent_attention import FORMS, reference
from mla_study.kernels.latent_attention.calibrations import device_key
from mla_study.kernels.latent_attention.cost import Calibration, Form, Rates, Shape, costs
from mla_study.kernels.latent_attention.dispatch import decide
from mla_study.model.storage import DTYPES

TOLERANCE = {"fp32": 2e-6, "fp16": 1e-3, "bf16": 1e-2}
NEAR = 1.05  # a choice this close to the better form counts as right


@dataclass(frozen=True)
class Point:
    """Seconds of one form at one shape."""

    shape: Shape
    form: Form
    seconds: Spread


def grid(
    queries: Iterable[int],
    keys: Iterable[int],
    d_c: Iterable[int],
    heads: Iterable[int],
    dtype: str,
) -> list[Shape]:
    """All combinations, heads of 128 with 32 rotary channels."""
    shapes = product(heads, d_c, keys, queries)
    return [Shape(m, k, heads=h, d_c=c, dtype=dtype) for h, c, k, m in shapes]


def fitting_grid(dtype: str, quick: bool = False) -> list[Shape]:
    """Shapes that the rates are fitted to."""
    if quick:
        return grid((1, 32, 256), (512,), (64, 192), (3,), dtype)
    return grid((1, 8, 64, 256, 1024), (1024, 4096), (64, 192, 512), (12,), dtype)


def checking_grid(dtype: str, quick: bool = False) -> list[Shape]:
    """Other shapes, on which the choice is checked."""
    if quick:
        return grid((4, 100, 400), (700,), (96, 256), (4,), dtype)
    big = grid(
        (2, 16, 48, 128, 192, 384, 768, 1560), (3120,), (48, 96, 128, 192, 256, 384), (12,), dtype
    )
    return big + grid((4, 24, 96, 288, 1170), (1500, 6240), (48, 128, 192, 320), (3,), dtype)


def inputs(shape: Shape, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """q_nope, q_rope, c, k_rope, k_up, v_up: Gaussian, logits of order one."""
    make = torch.Generator().manual_seed(seed)
    s, dtype = shape, DTYPES[shape.dtype]

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=make) * scale).to(device, dtype)

    return (
        normal(s.batch, s.queries, s.heads, s.d_nope),
        normal(s.batch, s.queries, s.heads, s.d_rope),
        normal(s.batch, s.keys, s.d_c),
        normal(s.batch, s.keys, s.d_rope),
        normal(s.heads, s.d_nope, s.d_c, scale=s.d_c**-0.5),
        normal(s.heads, s.d_head, s.d_c, scale=s.d_c**-0.5),
    )


def check(form: Form, given: Sequence[Tensor], dtype: str) -> str | None:
    """Why a form may get no number: it cannot run, or errs from the float64 oracle; None: right.

    The oracle sees up to 64 of the queries.
    """
    try:
        mine = FORMS[form](*given)[:, :64].double()
    except UserError as refused:
        return str(refused)
    few = (given[0][:, :64], given[1][:, :64], *given[2:])
    truth = reference(*(x.double() for x in few))
    error = float((mine - truth).norm() / truth.norm())
    if error < TOLERANCE[dtype]:
        return None
    return f"its error {error:.2g} exceeds {TOLERANCE[dtype]:g}"


@torch.no_grad()
def measure(
    shapes: Sequence[Shape],
    forms: Sequence[Form],
    device: torch.device,
    repeats: int = 5,
    clock: Clock | None = None,
    on_shape: Callable[[int], object] = lambda done: None,
) -> list[Point]:
    """Interleaved seconds of the forms at each shape; a form that is wrong gets no number."""
    points: list[Point] = []
    for done, shape in enumerate(shapes):
        given = inputs(shape, device)
        right: list[Form] = [form for form in forms if check(form, given, shape.dtype) is None]
        calls = {form: partial(FORMS[form], *given) for form in right}
        times = interleaved(calls, repeats, 1, clock or clock_of(device))
        points += [
            Point(shape, form, times.spread(form)) for form in right if form in times.seconds
        ]
        on_shape(done + 1)
    return points


def fit(
    points: Sequence[Point], device: torch.device, threads: int, bandwidth: float
) -> Calibration:
    """Rates that minimise the log ratios of modelled to measured seconds (soft L1).

    Args:
        bandwidth: bytes/s, measured (:func:`~.ceilings.ceilings`): most shapes do not feel it, so
            that a fit could not find it.
    """
    forms = tuple(dict.fromkeys(point.form for point in points))
    dtype = points[0].shape.dtype
    name = device_key(str(device))
    told = [costs(point.shape, value_is_key=True)[point.form] for point in points]
    seconds = np.array([point.seconds.median for point in points])
    best = max(cost.flops / t for cost, t in zip(told, seconds, strict=True))

    def unpack(x: np.ndarray) -> Calibration:
        v = np.exp(x)
        rates = {f: Rates(*map(float, v[1 + 3 * i : 4 + 3 * i])) for i, f in enumerate(forms)}
        spare = Rates(1.0)
        return Calibration(
            name, dtype, threads, float(v[0]), bandwidth,
            rates.get("reconstruct", spare), rates.get("absorbed", spare),
            rates.get("absorbed_triton"), points=len(points), value_is_key=True,
        )  # fmt: skip

    def residuals(x: np.ndarray) -> np.ndarray:
        made = unpack(x)
        pairs = zip(told, points, strict=True)
        modelled = np.array([made.seconds(cost, point.form) for cost, point in pairs])
        return np.log(modelled / seconds)

    start = [best]
    for form in forms:
        quickest = min(p.seconds.median for p in points if p.form == form)
        start += [best, 16.0, quickest / 4]
    solved = least_squares(residuals, np.log(start), loss="soft_l1", f_scale=0.1, max_nfev=2000)
    rms = float(np.sqrt(np.mean(np.square(residuals(solved.x)))))
    return replace(unpack(solved.x), residual=rms)


def calibrate(
    dtype: str,
    device: torch.device,
    quick: bool = False,
    repeats: int = 5,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Calibration, pd.DataFrame, pd.DataFrame]:
    """Measure, fit and check, on as many threads as torch has.

    Returns:
        The rates; the fitted points (measured and modelled seconds of each form); the choices on
        shapes that were not fitted, see :func:`choices`.
    """
    forms: tuple[Form, ...] = ("reconstruct", "absorbed")
    if device.type == "cuda":
        forms = (*forms, "absorbed_triton")
    say(f"{dtype}: bandwidth")
    copy = ceilings(device, DTYPES[dtype], 3 if quick else 7).copy.median
    results: list[list[Point]] = []
    for name, shapes in (
        ("fitting", fitting_grid(dtype, quick)),
        ("checking", checking_grid(dtype, quick)),
    ):
        with tqdm(total=len(shapes), desc=f"{dtype}, {name}", unit="shape", disable=None) as bar:
            results.append(
                measure(shapes, forms, device, repeats, on_shape=lambda done, bar=bar: bar.update())
            )
    fitted = fit(results[0], device, torch.get_num_threads(), copy)
    rows = [
        {
            **asdict(p.shape), "form": p.form, "seconds": p.seconds.median, "low": p.seconds.low,
            "high": p.seconds.high,
            "modelled_s": fitted.seconds(costs(p.shape, value_is_key=True)[p.form], p.form),
        }
        for p in results[0]
    ]  # fmt: skip
    return fitted, pd.DataFrame(rows), choices(results[1], fitted, device.type)


def choices(points: Sequence[Point], calibration: Calibration, device: str) -> pd.DataFrame:
    """A row a shape: measured seconds of each form, the choice, and what it costs.

    ``regret`` is the chosen form's seconds over the better one's; ``right`` where that is at most
    1.05.
    """
    rows: list[dict[str, Any]] = []
    for shape in dict.fromkeys(point.shape for point in points):
        mine: dict[Form, Spread] = {p.form: p.seconds for p in points if p.shape == shape}
        if len(mine) < 2:
            continue
        decision = decide(shape, device, calibration=calibration)
        best = min(spread.median for spread in mine.values())
        row: dict[str, Any] = {**asdict(shape), "choice": decision.form}
        for form, spread in mine.items():
            row |= {
                f"{form}_s": spread.median,
                f"{form}_low": spread.low,
                f"{form}_high": spread.high,
            }
            row[f"{form}_modelled_s"] = decision.seconds[form]
        row["regret"] = mine[decision.form].median / best if decision.form in mine else float("nan")
        row["right"] = bool(row["regret"] <= NEAR)
        rows.append(row)
    return pd.DataFrame(rows)
