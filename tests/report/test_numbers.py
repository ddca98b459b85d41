"""Every number on the page is that of a table, and the same data give the same page."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import page_reader
import pandas as pd
import pytest
from page_reader import Element
from report_page import make_page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "results" / "data"


@pytest.fixture(scope="module")
def content(page: Path) -> Element:
    return page_reader.read(page)


def number(text: str) -> float:
    return float(text) if text else math.nan


def table(name: str, part: str = "table") -> pd.DataFrame:
    return pd.read_parquet(DATA / name / f"{part}.parquet")


def claim(content: Element, name: str) -> Element:
    return content.one("details", claim=name)


def values(content: Element, name: str, role: str) -> list[tuple[float, float, float]]:
    """Value and bounds of a claim's numbers of a role."""
    return [
        (number(row.one("td", "value")["value"]), number(row.one("td", "low")["low"]),
         number(row.one("td", "low")["high"]))
        for row in claim(content, name).all("tr", role=role)
    ]  # fmt: skip


def test_numbers_and_verdicts_are_those_of_the_ledger(content: Element) -> None:
    ledger = table("claims")
    rows = list(content.all("tr", "claim"))
    assert [(row["claim"], row["verdict"]) for row in rows] == list(
        zip(ledger["id"], ledger["verdict"], strict=True)
    )
    counted = {item["verdict"]: int(item["count"]) for item in content.all("li", "count")}
    assert counted == dict(Counter(ledger["verdict"])) | {
        verdict: 0 for verdict in counted if verdict not in set(ledger["verdict"])
    }
    numbers = table("claims", "numbers")
    shown = 0
    for name, mine in numbers.groupby("id"):
        held = {
            int(row["position"]): row for row in claim(content, str(name)).all("tr", "position")
        }
        assert sorted(held) == sorted(mine["position"])
        for wanted in mine.to_dict("records"):
            row = held[wanted["position"]]
            assert row["role"] == wanted["role"]
            found = [number(row.one("td", "value")["value"]), number(row.one("td", "low")["low"]),
                     number(row.one("td", "low")["high"])]  # fmt: skip
            expected = [wanted["value"], wanted["low"], wanted["high"]]
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)
            assert wanted["label"] in row.text and wanted["provenance"] in row.text
            shown += 1
    assert shown == len(numbers) > 200


def test_numbers_are_those_of_the_measured_tables(content: Element) -> None:
    model = table("bench_model").set_index("quantity")["value"]
    ratio = model["cache, latent bf16 / dense bf16"]
    found = [value for value, _, _ in values(content, "cache-bytes", "found")]
    assert found == pytest.approx([100 * (1 - ratio), 1 / ratio])

    factors = table("fig_attribution", "factors")
    layout = factors[(factors["factor"] == "layout, reconstruct") & (factors["kind"] == "chunk")]
    found = values(content, "throughput-layout", "found")
    wanted = layout[["value", "low", "high"]].to_numpy().tolist()
    assert sorted(found) == [pytest.approx(row) for row in sorted(map(tuple, wanted))]

    scores = table("study_scores")
    at_end = scores[
        (scores["stage"] == "dmd") & (scores["clips"] == 1) & (scores["scope"] == "first")
        & (scores["condition"] == "plain") & (scores["metric"] == "iou")
        & ~scores["run"].str.contains(r"-t\d+-s\d+$")
    ]  # fmt: skip
    spectral = at_end[(at_end["init"] == "spectral") & (at_end["d_c"] == 12)]
    dense = at_end[at_end["variant"] == "dense"]
    lost = spectral.set_index("seed")["value"] - dense.set_index("seed")["value"]
    found = [value for value, _, _ in values(content, "short-horizon-parity", "found")]
    assert any(value == pytest.approx(lost.dropna().mean(), rel=1e-6) for value in found)


def test_sources_name_their_runs(content: Element) -> None:
    rows = list(content.all("tr", "source"))
    assert len(rows) > 30
    for row in rows:
        file = ROOT / "results" / row["source"]
        if file.suffix == ".csv":
            assert "paper-quoted" in row.text
            continue
        run = json.loads((file.parent / "run.json").read_text())
        for told in (run["run_hash"][:12], run["provenance"], run["validity"]):
            assert told in row.text


def test_curves_are_those_of_the_tables(content: Element) -> None:
    spectra = table("fig1_spectra", "spectra")
    mine = spectra[(spectra["checkpoint"] == "smollm2") & (spectra["gauge"] == "raw")]
    sigma = mine.pivot_table(index="layer", columns="index", values="sigma").to_numpy()
    data = page_reader.chart(content, "spectra-sigma")
    (line,) = (one for one in data["series"] if one["name"] == "SmolLM2")
    normal = sigma / sigma[:, :1]
    np.testing.assert_allclose(line["values"], np.median(normal, axis=0), rtol=5.1e-5)
    np.testing.assert_allclose(line["low"], normal.min(axis=0), rtol=5.1e-5)
    energy = np.cumsum(sigma**2, axis=1) / (sigma**2).sum(axis=1, keepdims=True)
    data = page_reader.chart(content, "spectra-energy")
    (line,) = (one for one in data["series"] if one["name"] == "SmolLM2")
    np.testing.assert_allclose(line["values"], np.median(energy, axis=0), rtol=5.1e-5)

    drift = table("study_drift")
    mine = drift[
        (drift["variant"] == "dense") & (drift["clips"] == 10) & (drift["condition"] == "plain")
        & (drift["metric"] == "iou")
    ]  # fmt: skip
    data = page_reader.chart(content, "drift-iou")
    (line,) = (one for one in data["series"] if one["name"] == "dense, 10x")
    shown = {x: y for x, y in zip(data["x"], line["values"], strict=True) if y is not None}
    wanted = mine.groupby("second")["value"].mean().to_dict()
    assert shown == pytest.approx(wanted, rel=2e-5)


def test_previews_are_rows_of_the_tables(content: Element) -> None:
    previews = list(content.all("table", "preview"))
    assert len(previews) >= len(list(DATA.glob("*/run.json")))
    for preview in previews:
        frame = pd.read_parquet(ROOT / preview["preview"])
        body = next(preview.all("tbody"))
        rows = list(body.all("tr", "row"))
        assert len(rows) == len(frame) if len(frame) <= 12 else 3 <= len(rows) <= 12
        heads = [head.text for head in preview.all("th")]
        for row in rows:
            place = int(row["row"])
            shown = [*zip(heads, row.all("td"), strict=True)]
            shown += [(cell["same"], cell) for cell in preview.all("span", "same")]
            for head, cell in shown:
                value = frame.iloc[place][head]
                if "data-value" in cell.attributes:
                    assert float(cell["value"]) == float(value)
                elif isinstance(value, str):
                    assert cell.text.rstrip("…") in " ".join(value.split())


def test_tables_hold_the_numbers_of_their_csv(content: Element) -> None:
    scores = table("study_scores")
    dense = scores[
        (scores["variant"] == "dense") & (scores["stage"] == "dmd") & (scores["clips"] == 1)
        & (scores["scope"] == "first") & (scores["condition"] == "plain")
        & (scores["metric"] == "iou")
    ]["value"].mean()  # fmt: skip
    shown = next(content.all("table", table="table5a_latent_dim"))
    row = next(row for row in shown.all("tr") if row.text.startswith("dense"))
    numbers = [float(cell["value"]) for cell in row.all("td", "value")]
    assert any(value == pytest.approx(dense, rel=1e-6) for value in numbers)


def test_every_figure_stands_in_the_index(content: Element) -> None:
    wanted = {file.stem for file in (ROOT / "notebooks").glob("*.ipynb")}
    rows = {row["index"]: row for row in content.all("tr", "index")}
    assert set(rows) == wanted
    shown = {item["figure"] for item in content.all("figure", "figure")}
    shown |= {item["table"] for item in content.all("table", "table")}
    for name, row in rows.items():
        assert name in shown or "drawn from" in row.text, name
        assert len(row.text) > 80
        (link,) = (a for a in row.all("a"))
        target = link.attributes["href"][1:]
        assert any(item.attributes.get("id") == target for item in content.all()), target


def test_the_same_data_give_the_same_bytes(page: Path, tmp_path: Path) -> None:
    make_page(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
