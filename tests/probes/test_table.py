"""Tidy rows: columns, dtypes, and each null in the scale of what it stands beside."""

from __future__ import annotations

import numpy as np
import pytest

from mla_study.checkpoints.operators.find import Attention, Part
from mla_study.probes.nulls import DEFAULT_KS, gaussian_null, truncated_null
from mla_study.probes.spectrum import METRICS, measures
from mla_study.probes.stacks import Spectrum
from mla_study.probes.store import Measured
from mla_study.probes.table import (
    COLUMNS,
    SPECTRA_COLUMNS,
    Rows,
    Source,
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
