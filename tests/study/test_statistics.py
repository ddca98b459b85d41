"""Means, intervals and correlations against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mla_study.errors import UserError
from mla_study.study.statistics import interval, over_seeds, paired, spearman


def test_means_over_seeds_carry_the_larger_error(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=3)
    frame = pd.DataFrame({"k": "a", "seed": range(3), "value": values, "se": [0.0, 0.0, 0.0]})
    found = over_seeds(frame, ["k"]).iloc[0]
    np.testing.assert_allclose(found["value"], values.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["se"], values.std(ddof=1) / 3**0.5, rtol=1e-6)
    found = over_seeds(frame.assign(se=[30.0, 40.0, 0.0]), ["k"]).iloc[0]
    np.testing.assert_allclose(found["se"], 50 / 3, rtol=1e-6)
    single = over_seeds(frame[:1].assign(se=0.25), ["k"])
    assert single["se"][0] == 0.25 and single["seeds"][0] == 1
    with pytest.raises(UserError, match="several runs of one seed"):
        over_seeds(frame.assign(seed=0), ["k"])


def test_differences_are_paired_by_seed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=4), rng.normal(size=4)
    one_ = pd.DataFrame({"seed": [0, 1, 2, 3, 7], "value": [*first, 5.0]})
    other = pd.DataFrame({"seed": [3, 2, 1, 0], "value": second[::-1]})
    mean, low, high, count = paired(one_, other)
    want = stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose([low, high], [want.low, want.high])
    np.testing.assert_allclose(mean, (first - second).mean())
    assert count == 4
    with pytest.raises(UserError, match="no seed is in both"):
        paired(one_, other.assign(seed=[10, 11, 12, 13]))


def test_rank_correlations_and_their_resamples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 5, 12).astype(float), rng.normal(size=12)
    rho, draws = spearman(x, y, list("aabbccddeeff"), draws=50)
    want = stats.spearmanr(x, y)
    np.testing.assert_allclose(rho, want.statistic)  # type: ignore[attr-defined]
    assert draws.shape == (50,) and np.nanstd(draws) > 0
    # whole groups: of one group every resample is the sample
    np.testing.assert_allclose(spearman(x, y, ["a"] * 12, draws=3)[1], rho)
    assert np.isnan(spearman(np.ones(12), y, list("aabbccddeeff"))[0])


def test_an_interval_is_no_narrower_than_its_values_are_sure(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=3)
    between = interval(values)
    assert interval(values, 1e-9) == between
    mean, low, high = interval(values, 1e3)
    np.testing.assert_allclose([mean - low, high - mean], 1960.0)
    assert interval(np.full(3, 0.25))[1:] == (0.25, 0.25)
    np.testing.assert_allclose(interval(np.full(3, 0.25), 0.1), (0.25, 0.054, 0.446))
    np.testing.assert_allclose(interval(values[:1], 0.1)[2], values[0] + 0.196)
    assert np.isnan(interval(values[:1])[1:]).all()


def test_equal_differences_of_unsure_scores_are_unsure() -> None:
    first = pd.DataFrame({"seed": [0, 1, 2], "value": [0.5, 0.6, 0.7], "se": [0.03, 0.0, 0.04]})
    second = first.assign(value=first["value"] - 0.2, se=[0.0, 0.12, 0.0])
    mean, low, high, count = paired(first, second)
    np.testing.assert_allclose([mean, high - low, count], [0.2, 2 * 1.96 * 0.13 / 3, 3])
