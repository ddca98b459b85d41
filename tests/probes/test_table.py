"""Tidy rows: columns, dtypes, and each null in the scale of what it stands beside."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mla_study.checkpoints.operators.find import Attention, Part
from mla_study.probes.nulls import DEFAULT_KS, gaussian_edge, gaussian_null, truncated_null
from mla_study.probes.spectrum import METRICS, measures
from mla_study.probes.stacks import Spectrum
from mla_study.probes.store import Measured
from mla_study.probes.table import (
    COLUMNS,
    EDGE,
    SPECTRA_COLUMNS,
    Rows,
    Source,
    edge_ratio,
    functional_errors,
    null_of,
    table_of,
)

ATTENTION = Attention("b.3", 3, "self", "separate", {"k": Part("k", ((0, 9),), 7)}, {})
SOURCE = Source("/a/b", "label", "svd", 500)


def block(spectrum: Spectrum) -> Measured:
    return Measured([spectrum], [measures(spectrum.sigma, spectrum.full_rank)], {})


def rows_of(spectrum: Spectrum, truncated: dict[int, np.ndarray] | None = None) -> Rows:
    rows = Rows(lambda metric: True, 0, truncated or {})
    rows.add(SOURCE, ATTENTION, block(spectrum))
    return rows


def test_columns_and_dtypes_are_as_promised(seed: int) -> None:
    sigma = np.sort(np.random.default_rng(seed).random(7))[::-1].copy()
    table, spectra = rows_of(Spectrum("k", -1, "raw", sigma, 9, 7, "gram")).frames()
    assert tuple(table.columns) == COLUMNS
    promised = (
        "checkpoint series step layer attention operator head gauge metric value null null_value "
        "null_se m n method provenance"
    )
    assert " ".join(table.columns) == promised
    kinds = {name: str(kind) for name, kind in table.dtypes.items()}
    text = {"checkpoint", "series", "attention", "operator", "gauge", "metric", "null", "method"}
    assert kinds["step"] == "Int64"
    assert {kinds[c] for c in ("layer", "head", "m", "n")} == {"int64"}
    assert {kinds[c] for c in ("value", "null_value", "null_se")} == {"float64"}
    assert {kinds[c] for c in text | {"provenance"}} <= {"object", "str", "string"}
    assert list(table["metric"]) == list(METRICS)
    first = table.iloc[0].to_dict()
    assert (first["checkpoint"], first["series"], first["step"]) == ("label", "svd", 500)
    assert (first["layer"], first["attention"], first["head"]) == (3, "self", -1)
    assert (first["m"], first["n"], first["method"]) == (9, 7, "gram")
    assert first["provenance"] == "measured"
    assert tuple(spectra.columns) == SPECTRA_COLUMNS
    assert list(spectra["index"]) == list(range(1, 8))
    np.testing.assert_array_equal(spectra["sigma"], sigma)
    assert dict(spectra.dtypes.astype(str))["index"] == "int64"


def test_no_step_is_missing_and_not_zero() -> None:
    row = ("a", "", None, 0, "self", "kv", -1, "raw", "overlap", 0.5, "none", np.nan, np.nan)
    frame = table_of([(*row, 1, 2, "row space", "measured")])
    assert frame["step"].isna().all() and str(frame["step"].dtype) == "Int64"
    assert frame["series"].tolist() == [""]
    assert len(table_of([])) == 0 and tuple(table_of([]).columns) == COLUMNS


@pytest.mark.parametrize(("m", "n"), [(9, 7), (1, 7), (9, 1)])
def test_the_nulls_spectral_norm_has_the_size_of_the_operator(m: int, n: int) -> None:
    sigma = np.linspace(30, 10, min(m, n))
    table, _ = rows_of(Spectrum("k", -1, "raw", sigma, m, n, "gram")).frames()
    row = table[table["metric"] == "spectral_norm"].iloc[0]
    value, se = gaussian_null(m, n)["spectral_norm"]
    norm = np.linalg.norm(sigma)
    assert row["null_value"] == pytest.approx(value * norm)
    assert row["null_se"] == pytest.approx(se * norm)
    if min(m, n) == 1:
        assert row["null_value"] == pytest.approx(row["value"])


def test_products_stand_beside_three_nulls() -> None:
    source = np.geomspace(5, 1, 20)
    sigma = np.geomspace(3, 1, 4)
    spectrum = Spectrum("composed", -1, "raw", sigma, 48, 24, "factors", 4)
    table, _ = rows_of(spectrum, {3: source}).frames()
    nulls = ["gaussian", "gaussian_product", "truncated_source"]
    assert list(dict.fromkeys(table["null"])) == nulls
    cut = table[table["null"] == "truncated_source"].set_index("metric")
    expected = truncated_null(source, 4, 24)
    for metric, (value, se) in expected.items():
        assert cut.loc[metric, "null_value"] == pytest.approx(value, nan_ok=True)
        assert cut.loc[metric, "null_se"] == se
    assert cut.loc["spectral_norm", "null_value"] == 5
    other, _ = rows_of(spectrum, {4: source}).frames()
    assert "truncated_source" not in set(other["null"])
    heads = Spectrum("ov", 0, "raw", sigma, 48, 24, "factors", 4)
    assert set(rows_of(heads, {3: source}).frames()[0]["null"]) == set(nulls[:2])


def test_the_edge_stands_beside_its_nulls(seed: int) -> None:
    rng = np.random.default_rng(seed)
    source, m, n, r = np.geomspace(5, 1, 20), 48, 24, 4

    def edges(spectrum: Spectrum) -> pd.DataFrame:
        rows = Rows(lambda metric: metric == EDGE, 0, {3: source}, edge=True)
        rows.add(SOURCE, ATTENTION, block(spectrum), {0: {"untrained": {EDGE: (0.7, np.nan)}}})
        return rows.frames()[0].set_index("null")

    def drawn(k: int, *factors: tuple[int, int]) -> np.ndarray:
        """log sigma_k / sigma_1 of 400 Gaussian matrices, or products."""
        made = [[rng.standard_normal(shape) for shape in factors] for _ in range(400)]
        sigma = [np.linalg.svd(f[0] @ f[-1] if f[1:] else f[0])[1] for f in made]
        return np.log([s[k - 1] / s[0] for s in sigma])

    table = edges(Spectrum("composed", -1, "raw", np.geomspace(3, 1, r), m, n, "factors", r))
    np.testing.assert_allclose(table["value"], 1 / 3)
    assert table.loc["truncated_source", "null_value"] == pytest.approx(source[3] / source[0])
    assert table.loc["untrained", "null_value"] == 0.7
    dense = edges(Spectrum("kv", -1, "raw", np.geomspace(3, 1, n), m, n, "gram"))
    assert dense["value"].iloc[0] == pytest.approx(3 ** (-2 / 23))  # number 24 / 8
    for found, null, sample in (
        (table, "gaussian_product", drawn(r, (m, r), (r, n))),
        (table, "gaussian", drawn(r, (m, n))),
        (dense, "gaussian", drawn(3, (m, n))),
    ):
        value, se = found.loc[null, "null_value"], found.loc[null, "null_se"]
        assert np.log(value) == pytest.approx(sample.mean(), abs=7 * sample.std() / 32**0.5)
        assert 0.4 < se / value / sample.std() < 2
    with pytest.raises(ValueError, match="no singular value number 25"):
        gaussian_edge(m, n, 25)
    zero = Spectrum("kv", -1, "raw", np.zeros(n), m, n, "gram")
    assert np.isnan(edge_ratio(zero))
    assert edge_ratio(Spectrum("composed", -1, "raw", np.ones(3), m, n, "factors", 4)) == 0


def test_only_wanted_metrics_have_rows() -> None:
    spectrum = Spectrum("k", -1, "raw", np.array([2.0, 1.0]), 9, 2, "gram")
    rows = Rows(lambda metric: metric == "condition", 0, {})
    rows.add(SOURCE, ATTENTION, block(spectrum))
    assert [row[8] for row in rows.table] == ["condition"]
    assert len(rows.spectra) == 1


def test_functional_errors_are_those_of_the_best_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sigma = np.sort(rng.random(300))[::-1] * np.geomspace(1, 1e-9, 300)
    spectrum = Spectrum("kv", -1, "weighted-raw", sigma, 500, 300, "gram")
    found = functional_errors(spectrum)
    assert set(found) == {f"functional_error_at_{k}" for k in (*DEFAULT_KS, "n/8")}
    total = np.square(sigma).sum()
    for k in DEFAULT_KS:
        want = np.sqrt(np.square(sigma[k:]).sum() / total)
        assert found[f"functional_error_at_{k}"] == pytest.approx(want, rel=1e-9)
    between = (np.square(sigma[37:]).sum() + np.square(sigma[38:]).sum()) / 2 / total  # 37.5
    assert found["functional_error_at_n/8"] == pytest.approx(np.sqrt(between), rel=1e-9)
    assert functional_errors(Spectrum("kv", -1, "raw", sigma, 500, 300, "gram")) == {}
    nothing = Spectrum("kv", -1, "weighted-raw", np.zeros(3), 5, 3, "gram")
    assert all(np.isnan(v) for v in functional_errors(nothing).values())


def test_a_null_of_functional_errors_follows_from_its_energy() -> None:
    model = {"energy_at_64": (0.75, 0.02), "energy_at_512": (1.0, 0.0)}
    assert null_of(model, "functional_error_at_64", 9.0) == pytest.approx((0.5, 0.02))
    assert null_of(model, "functional_error_at_512", 9.0) == (0.0, 0.0)


def test_stored_nulls_of_a_block_are_used() -> None:
    spectrum = Spectrum("kv", -1, "weighted-raw", np.array([2.0, 1.0]), 9, 2, "gram")
    measured = block(spectrum)
    measured.nulls = {0: {"gaussian": dict.fromkeys(METRICS, (0.25, 0.5))}}
    rows = Rows(lambda metric: metric in ("r_0.99", "spectral_norm"), 0, {})
    rows.add(SOURCE, ATTENTION, measured)
    assert [row[10:13] for row in rows.table] == [
        ("gaussian", 0.25, 0.5),
        ("gaussian", 0.25 * 5**0.5, 0.5 * 5**0.5),
    ]
