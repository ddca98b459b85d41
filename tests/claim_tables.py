"""Copies of the committed results in which a number is changed or a table is not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mla_study.study.claims import CLAIMS, Claim, Outcome
from mla_study.study.claims.ledger import outcome
from mla_study.study.claims.sources import MissingError, Tables
from mla_study.study.runs import write_result

RESULTS = Path(__file__).resolve().parents[1] / "results"
BY_ID = {claim.id: claim for claim in CLAIMS}
Edit = Callable[[pd.DataFrame], pd.DataFrame | None]


def changed(file: str, edit: Edit, folder: Path, honest: bool = True) -> Path:
    """A results folder with one file, in which ``edit`` changed something.

    Args:
        file: below results, such as ``data/study_scores/table.parquet``.
        honest: let the run record name the changed table.
    """
    source, place = RESULTS / file, folder / file
    place.parent.mkdir(parents=True)
    if file.endswith(".csv"):
        frame = pd.read_csv(source)
        edited = edit(frame)
        (frame if edited is None else edited).to_csv(place, index=False)
        return folder
    shutil.copytree(source.parent, place.parent, dirs_exist_ok=True)
    frame = pd.read_parquet(source)
    edited = edit(frame)
    (frame if edited is None else edited).to_parquet(place, index=False)
    if honest:
        record = place.with_name("run.json")
        run = json.loads(record.read_text())
        run["tables"][place.stem]["sha256"] = hashlib.sha256(place.read_bytes()).hexdigest()
        record.write_text(json.dumps(run))
    return folder


def judge(name: str, *more: Path) -> Outcome:
    """One claim, by the committed results and folders that go before them."""
    return outcome(BY_ID[name], Tables(RESULTS, more))


def result(folder: Path, name: str, tables: dict[str, pd.DataFrame], config: object = None) -> Path:
    """A made-up result in a user's own folder."""
    write_result(
        folder / name, tables, config=config or {}, inputs={}, seed=0,
        modules=("mla_study.study.claims.model",), provenance="measured", validity="full",
        observed={"hardware": "a made-up card"},
    )  # fmt: skip
    return folder


class Without(Tables):
    """The committed tables without one file; what was read is shared by all."""

    gone = ""

    def result(self, name: str, table: str = "table"):
        """As the base's, but for the file that is gone."""
        if self.gone == f"data/{name}/{table}.parquet":
            raise MissingError(f"results/data/{name}")
        return super().result(name, table)

    def paper(self, name: str):
        """As the base's, but for the file that is gone."""
        if self.gone == f"paper/{name}.csv":
            raise MissingError(f"results/paper/{name}.csv")
        return super().paper(name)


def judged_without(claim: Claim, file: str, tables: Without) -> Outcome:
    """A claim where a file is not there."""
    tables.gone = file
    try:
        return outcome(claim, tables)
    finally:
        tables.gone = ""
