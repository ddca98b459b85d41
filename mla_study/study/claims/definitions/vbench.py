"""Claims about Wan's own quality, which need two runs of VBench of one protocol."""

from __future__ import annotations

from mla_study.evaluation.vbench.runs.protocol import Protocol, differences
from mla_study.study.claims.definitions.common import Reader
from mla_study.study.claims.model import Claim, Evidence, Number, evidence
from mla_study.study.claims.rules import NoWorse
from mla_study.study.claims.sources import MissingError, one

POINT = 0.01
"""A point of VBench: a difference below it counts as none."""
DENSE, LATENT = "dense", "latent"


def short(reader: Reader) -> Evidence:
    return _compared(reader, "vbench", "total")


def long(reader: Reader) -> Evidence:
    return _compared(reader, "vbench_long", "overall_6")


def _compared(reader: Reader, prefix: str, scorer: str) -> Evidence:
    names = [f"{prefix}_{kind}" for kind in (DENSE, LATENT)]
    lacking = [name for name in names if not reader.has(name)]
    if lacking:
        raise MissingError(
            "VBench scores of Wan 1.3B, dense and latent: "
            f"`mla-study vbench run VIDEOS --out results/data/{lacking[0]}`"
        )
    columns = ("scorer", "label", "value", "low", "high", "validity")
    dense, latent = (
        one(reader.table(name, columns=columns), name, scorer=scorer) for name in names
    )
    unlike = _unlike(reader, names)
    if unlike:
        raise MissingError(f"two runs of one protocol ({unlike})")
    partial = [name for name, row in zip(names, (dense, latent), strict=True)
               if row["validity"] != "full"]  # fmt: skip
    if partial:
        raise MissingError(f"all videos and VBench's own metrics in {partial[0]}")
    value = float(latent["value"]) - float(dense["value"])
    low = float(latent["low"]) - float(dense["high"])
    high = float(latent["high"]) - float(dense["low"])
    return evidence(
        Number(f"latent − dense, {dense['label']}", value, low, high, "share",
               bounds="of both intervals, 95 % each"),
        [
            Number(f"{kind}, {row['label']}", float(row["value"]), float(row["low"]),
                   float(row["high"]), "share", "beside", bounds="95 %, over prompts")
            for kind, row in ((DENSE, dense), (LATENT, latent))
        ],
    )  # fmt: skip


def _unlike(reader: Reader, names: list[str]) -> str:
    """What differs between two runs, in words; '' where nothing does."""
    try:
        first, second = (Protocol.read(reader.config(name)) for name in names)
    except (KeyError, TypeError):
        raise MissingError(f"results of vbench run in {' and '.join(names)}") from None
    table = reader.table(names[0], columns=("scorer",))
    return "; ".join(differences(first, second, [str(name) for name in table["scorer"]]))


CLAIMS = (
    Claim(
        id="short-horizon-vbench",
        statement="On short videos VideoMLA keeps the VBench score of its dense counterpart.",
        place="Table 5",
        quantity="VBench's Total, latent minus dense, one protocol",
        unit="share",
        scale="full",
        null="no difference",
        query=short,
        rule=NoWorse(POINT),
        figure="table5_vbench",
        command="mla-study vbench run VIDEOS --out results/data/vbench_latent",
        reading="Needs Wan's weights, VBench's metric weights and the videos of both models; the "
        "interval is that of two independent runs, wider than a paired one.",
    ),
    Claim(
        id="long-horizon-vbench",
        statement="On long videos VideoMLA keeps the VBench-Long score of its dense counterpart.",
        place="Table 2",
        quantity="plain mean of six dimensions, latent minus dense, one protocol",
        unit="share",
        scale="full",
        null="no difference",
        query=long,
        rule=NoWorse(POINT),
        figure="table2_long_horizon",
        command="mla-study vbench run VIDEOS --mode long --out results/data/vbench_long_latent",
        reading="As short-horizon-vbench, with videos of 30 s or more.",
    ),
)
