"""Table 3: throughput and latency, the paper's rows as quoted beside what is measured here.

The paper's rows are of a B200, and it does not say whether they count the VAE; ours count neither
VAE nor text encoder. Rows of Wan 1.3B come from ``mla-study bench rollout --scale full`` on a GPU,
and the table says so while there are none; those of a model with a quarter of its sizes come from
one CPU thread (``fig_attribution``).

Frames a second times the seconds of a clip are the clip's frames. In the paper's table they are 81
for VideoMLA, but neither for Self-Forcing nor for LongSANA; with one entry of those two exchanged
they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mla_study.study.plots import PAGE_WIDTH, style
from mla_study.study.runs import Result, read_result, round_significant
from mla_study.study.tables import Column, rules_between, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table3_efficiency"
TITLE = "Throughput and latency of the rollout, beside the paper's Table 3"
PROVENANCE = ("measured", "paper-quoted")
DATA = ("results/paper/table3_efficiency.csv", "results/data/fig_attribution")
ROOT = Path(__file__).resolve().parents[1]
GPU = ("bench_rollout_full_beside", "bench_rollout_full_within")
NO_GPU = "not measured on a GPU yet"
CLIP_FRAMES = 81
COLUMNS = (
    Column("model", "Model"),
    Column("window", "Window\nframes"),
    Column("where", "Measured on"),
    Column("fps", "FPS", ".2f"),
    Column("latency_s", "Latency\ns", ".2f"),
    Column("frames", "FPS x\nlatency", ".1f"),
    Column("first_s", "First\nchunk s", ".2f"),
    Column("share", "Of matmul\nceiling", ".0%"),
    Column("source", "Class"),
)
PAPER_WINDOWS = {"Self-Forcing": "21", "VideoMLA": "1 + 6"}
SHOWN = ("dense", "latent reconstruct", "latent auto")


def INPUTS() -> dict[str, Path]:
    """Measurements on a GPU, where there are any."""
    places = {name: ROOT / "results" / "data" / name / "run.json" for name in GPU}
    return {name: place for name, place in places.items() if place.exists()}


def quoted(paper: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows, with frames = FPS x latency."""
    return pd.DataFrame(
        {
            "model": paper["model"],
            "window": paper["model"].map(PAPER_WINDOWS).fillna(""),
            "where": "B200",
            "fps": paper["throughput_fps_b200"],
            "latency_s": paper["latency_s_b200"],
            "frames": paper["throughput_fps_b200"] * paper["latency_s_b200"],
            "source": "paper-quoted",
        }
    )


def ours(table: pd.DataFrame, model: str, where: str, every: bool) -> pd.DataFrame:
    """Rows of chunks at the steady state: plain forms, or every variant that has a number."""
    rows: list[dict[str, Any]] = []
    for row in table[(table["kind"] == "chunk") & (table["status"] == "ok")].to_dict("records"):
        name = str(row["variant"]).replace(f" {row['window']}", "")
        if not every and name not in SHOWN:
            continue
        if name.startswith("latent auto"):
            name = name.replace("auto", f"auto: {row['form']}")
        sink, history, chunk = (int(part) for part in str(row["window"]).split("+"))
        rows.append(
            {
                "model": f"{model}, {name}",
                "window": f"{sink} + {history} + {chunk}",
                "where": where,
                "fps": row["fps"],
                "latency_s": row["clip_s"],
                "frames": row["fps"] * row["clip_s"],
                "first_s": row["first_s"],
                "share": row["share"],
                "source": "measured",
            }
        )
    return pd.DataFrame(rows)


def exchanged(paper: pd.DataFrame) -> str:
    """What exchanging one column of Self-Forcing and LongSANA does to frames = FPS x latency."""
    held = paper.set_index("model")
    one, two, mla = (held.loc[n] for n in ("Self-Forcing", "LongSANA", "VideoMLA"))
    fps, latency = "throughput_fps_b200", "latency_s_b200"
    return (
        f"FPS x latency should be a clip's {CLIP_FRAMES} frames. In the paper it is "
        f"{mla[fps] * mla[latency]:.1f} for VideoMLA, {one[fps] * one[latency]:.1f} for "
        f"Self-Forcing and {two[fps] * two[latency]:.1f} for LongSANA; with one column of the last "
        f"two exchanged it is {two[fps] * one[latency]:.1f} and {one[fps] * two[latency]:.1f}. So "
        f"its {mla[fps] / two[fps]:.2f}x over LongSANA may be over Self-Forcing."
    )


def assembled(paper: pd.DataFrame, small: Result, large: list[Result]) -> pd.DataFrame:
    """All rows: quoted, Wan 1.3B on a GPU (or that there are none), the quarter model."""
    parts = [quoted(paper)]
    for result in large:
        where = str(result.run["observed"]["hardware"])
        parts.append(ours(result.table, "Wan 1.3B", where, every=True))
    if not large:
        parts.append(
            pd.DataFrame({"model": ["Wan 1.3B, dense and latent"], "window": [""],
                          "where": [NO_GPU], "source": [""]})
        )  # fmt: skip
    parts.append(ours(small.table, "quarter of it", "CPU, one thread", every=False))
    found = pd.concat(parts, ignore_index=True).reindex(columns=[c.name for c in COLUMNS])
    return round_significant(found)


def draw(out_dir: str) -> Figure:
    """Assemble and save ``table3_efficiency.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
    """
    paper = pd.read_csv(ROOT / DATA[0])
    small = read_result(ROOT / DATA[1])
    large = [read_result(place.parent) for place in INPUTS().values()]
    frame = assembled(paper, small, large)
    groups = frame.assign(group=frame["source"] + frame["where"])
    with style():
        return save_table(
            frame,
            Path(out_dir) / ID,
            COLUMNS,
            provenance=PROVENANCE,
            validity=small.validity if not large else "full",
            run_hash=(large[0] if large else small).run_hash,
            title=TITLE,
            notes=[
                exchanged(paper),
                "Our rows: DiT only, VAE and text encoder not counted; random weights; steady "
                "state; a window of sink + history + chunk. Latency is that of 81 frames from an "
                "empty cache, whose first chunks are cheaper than FPS says. The quarter model has "
                f"{small.run['notes'][1].split(': ', 1)[1]}.",
            ],
            rule_before=rules_between(groups, "group"),
            width=PAGE_WIDTH,
        )
