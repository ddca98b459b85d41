"""The arithmetic against published rows and against sums written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mla_study.errors import UserError
from mla_study.evaluation.vbench import scores
from mla_study.evaluation.vbench.dimensions import (
    DIMENSIONS,
    OVERALL_6,
    SUBSTITUTES,
    choose,
    is_free,
)

PAPER = Path(__file__).resolve().parents[3] / "results" / "paper"
LEADERBOARD = pd.read_csv(PAPER / "vbench_leaderboard.csv")


def shares(row: pd.Series) -> dict[str, float]:
    return {name: row[name] / 100 for name in DIMENSIONS}


@pytest.mark.parametrize("place", range(len(LEADERBOARD)))
def test_published_rows_give_their_published_scores(place: int) -> None:
    row = LEADERBOARD.iloc[place]
    found = scores.composites(shares(row))
    for name in ("quality", "semantic", "total"):
        # rounded inputs: 1e-4 over the width of a dimension's bounds
        assert 100 * found[name] == pytest.approx(row[name], abs=0.0101), name


def test_there_are_ten_rows() -> None:
    assert len(LEADERBOARD) == 10


def test_overall_of_the_long_table_is_the_plain_mean_of_six() -> None:
    table = pd.read_csv(PAPER / "table2_long_horizon.csv")
    assert len(table) == 20
    for row in table.to_dict("records"):
        raw = {name: row[name] for name in OVERALL_6}
        assert scores.overall_6(raw) == pytest.approx(row["overall"], abs=0.00101)


def test_totals_of_the_ablations_are_plain_means() -> None:
    tables = [pd.read_csv(PAPER / f"table5{x}.csv") for x in ("a_latent_dim", "b_nope_rope_split")]
    rows = pd.concat(tables)
    assert len(rows) == 8
    for row in rows.to_dict("records"):
        plain = scores.weighted_total(row["quality"], row["semantic"])
        assert plain == pytest.approx(row["total"], abs=0.0101)
    default = rows[(rows["d_nope"] == 96) & (rows["d_rope"] == 32)].iloc[0]
    assert scores.total_of(default["quality"], default["semantic"]) == pytest.approx(
        84.41, abs=0.01
    )


@pytest.mark.parametrize("missing", list(DIMENSIONS))
def test_a_missing_dimension_gives_no_total(missing: str) -> None:
    raw = shares(LEADERBOARD.iloc[4])
    del raw[missing]
    found = scores.composites(raw)
    assert "total" not in found and "total_mean" not in found
    assert DIMENSIONS[missing].group not in found
    assert ("overall_6" in found) == (missing not in OVERALL_6)
    raw[missing] = float("nan")
    assert scores.composites(raw) == found


def test_a_substitute_never_enters_a_composite() -> None:
    raw = shares(LEADERBOARD.iloc[0])
    del raw["dynamic_degree"]
    raw["dynamic_degree[raft-small]"] = 0.5
    assert "quality" not in scores.composites(raw)


def test_raw_score_is_the_mean_by_terms_and_imaging_counts_to_a_hundred() -> None:
    assert scores.raw_score("subject_consistency", [0.9, 0.6], [80, 20]) == pytest.approx(0.84)
    assert scores.raw_score("imaging_quality", [70, 50], [1, 1]) == pytest.approx(0.6)
    assert np.isnan(scores.raw_score("color", [], []))
    assert np.isnan(scores.raw_score("color", [0.5], [0]))


def test_bootstrap_resamples_prompts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = [f"p{i}" for i in range(40) for _ in range(5)]
    centre = np.repeat(rng.normal(0.5, 0.1, 40), 5)
    found = scores.bootstrap("scene", centre, np.ones(200), prompts, seed=seed)
    assert (found.videos, found.prompts) == (200, 40)
    # the standard error of 40 means, not of 200 values
    expected = 2 * 1.96 * centre[::5].std() / 40**0.5
    assert found.high - found.low == pytest.approx(expected, rel=0.25)
    assert found.low < found.value < found.high
    single = scores.bootstrap("scene", [0.1, 0.3], [1, 3], ["a", "a"])
    assert single.value == pytest.approx(0.25) and np.isnan(single.low)


def test_paired_difference_sees_a_shift_and_no_shift(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = {f"p{i}": float(x) for i, x in enumerate(rng.normal(size=60))}
    shifted = {k: v + 0.2 + 0.01 * float(rng.normal()) for k, v in base.items()}
    gap, low, high, p, n = scores.paired_difference(shifted, base, seed=seed)
    assert low < 0.2 + 0.01 and high > 0.19 and gap == pytest.approx(0.2, abs=0.01)
    assert p < 0.01 and n == 60
    assert scores.paired_difference(base, base)[3] == 1.0
    assert scores.paired_difference({"a": 1.0}, {"b": 1.0})[4] == 0


def test_names_and_groups_choose_scorers() -> None:
    assert choose(["all"]) == tuple(DIMENSIONS) and len(DIMENSIONS) == 16
    assert choose(["quality", "temporal_flickering"])[2] == "temporal_flickering"
    assert set(choose(["substitutes"])) == set(SUBSTITUTES)
    free = tuple(name for name in DIMENSIONS if is_free(name))
    assert choose(["all"], free) == free and len(free) == 7
    with pytest.raises(UserError, match="did you mean 'scene'"):
        choose(["scenes"])
    with pytest.raises(UserError, match="needs videos made from VBench's prompts"):
        choose(["scene"], free)


def test_intervals_of_composites_come_from_independent_draws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row = shares(LEADERBOARD.iloc[3])
    drawn = {name: row[name] + 0.01 * rng.normal(size=400) for name in DIMENSIONS}
    found = scores.composite_intervals(drawn)
    low, high = found["overall_6"]
    assert low < scores.composites(row)["overall_6"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.01 / 6**0.5, rel=0.2)
    assert scores.composite_intervals({"scene": np.empty(0)}) == {}
