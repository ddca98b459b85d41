"""What the efficiency figures say of the paper's rows and of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import fig_attribution, table3_efficiency
from mla_study.study.runs import Result


@pytest.fixture
def paper(repo_root: Path) -> pd.DataFrame:
    return pd.read_csv(repo_root / table3_efficiency.DATA[0])


def row(variant: str, window: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "chunk", "status": "ok", "variant": f"{variant} {window}", "window": window,
        "form": "absorbed", "fps": 10.0, "clip_s": 8.0, "first_s": 1.0, "share": 0.5, **more,
    }  # fmt: skip


def result(rows: list[dict[str, Any]]) -> Result:
    run = {"notes": ["", "quarter: small"], "observed": {"hardware": "some GPU"}}
    return Result(Path("nowhere"), {"table": pd.DataFrame(rows)}, run)


def test_the_papers_frames_and_the_exchange(paper: pd.DataFrame) -> None:
    told = table3_efficiency.exchanged(paper)
    for number in ("81.0 for VideoMLA", "75.7 for Self-Forcing", "86.7 for LongSANA",
                   "it is 81.1 and 80.9", "1.24x over LongSANA"):  # fmt: skip
        assert number in told
    frames = table3_efficiency.quoted(paper).set_index("model")["frames"]
    assert frames["VideoMLA"] == pytest.approx(81.0, abs=0.05)


def test_without_a_gpu_the_table_says_so(paper: pd.DataFrame) -> None:
    rows = [
        row("dense", "0+18+3"),
        row("latent auto", "1+6+3"),
        row("latent auto d_c=192", "1+6+3"),
    ]
    small = result([*rows, row("dense", "1+3+3", status="OOM")])
    frame = table3_efficiency.assembled(paper, small, [])
    assert (frame["where"] == table3_efficiency.NO_GPU).sum() == 1
    mine = frame[frame["where"].str.startswith("CPU")]
    assert list(mine["window"]) == ["0 + 18 + 3", "1 + 6 + 3"]
    assert mine["model"].iloc[1].endswith("latent auto: absorbed")
    assert set(frame["source"]) == {"measured", "paper-quoted", ""}


def test_with_a_gpu_every_variant_is_shown(paper: pd.DataFrame) -> None:
    large = result([row("dense", "0+18+3"), row("latent auto", "1+6+3", fps=50.0)])
    frame = table3_efficiency.assembled(paper, result([row("dense", "0+18+3")]), [large])
    assert table3_efficiency.NO_GPU not in set(frame["where"])
    assert list(frame[frame["where"] == "some GPU"]["fps"]) == [10.0, 50.0]


def test_factors_are_told_with_their_predictions() -> None:
    factors = pd.DataFrame(
        [{"reading": "1 + 6 + chunk", "factor": "window", "value": 1.56, "low": 1.5, "high": 1.6,
          "predicted": 1.58, "predicted_full": 1.578}]
    )  # fmt: skip
    assert fig_attribution.summary(factors) == [
        "1 + 6 + chunk, window: 1.560x [1.500, 1.600], FLOPs 1.580x here and 1.578x at 1.3B"
    ]
