"""Where two measured curves meet."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.fig_crossover import measured_crossover, ratios


def test_a_power_law_meets_where_it_should() -> None:
    queries = np.array([2.0, 16, 48, 128, 384, 1560])
    for at in (3.0, 100.0, 700.0):
        assert measured_crossover(queries, (queries / at) ** 0.7) == pytest.approx(at)
    assert np.isnan(measured_crossover(queries, queries * 0 + 0.5))
    assert np.isnan(measured_crossover(queries, queries * 0 + 2.0))


def test_ratios_carry_the_quartiles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 6
    table = pd.DataFrame(
        {
            "queries": rng.permutation(n) + 1, "d_c": 192, "heads": [12] * 5 + [3],
            "dtype": ["fp32"] * 4 + ["bf16", "fp32"],
        }
    )  # fmt: skip
    for form in ("absorbed", "reconstruct"):
        mid = rng.uniform(1, 2, n)
        table[f"{form}_s"], table[f"{form}_low"], table[f"{form}_high"] = mid, mid * 0.9, mid * 1.1
    found = ratios(table, "fp32")
    assert len(found) == 4 and found["queries"].is_monotonic_increasing
    assert (found["low"] < found["ratio"]).all() and (found["ratio"] < found["high"]).all()
