"""Claims that the paper's own tables settle: their arithmetic, and what rankings rest on."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mla_study.evaluation.vbench.scores import total_of, weighted_total
from mla_study.study.claims.definitions.common import Reader
from mla_study.study.claims.model import Claim, Evidence, Number, evidence, stated
from mla_study.study.claims.rules import Agrees, First
from mla_study.study.claims.sources import MissingError, one, rows

OURS = "VideoMLA"
DIMENSIONS = ("aesthetic_quality", "background_consistency", "dynamic_degree", "imaging_quality",
              "motion_smoothness", "subject_consistency")  # fmt: skip
DYNAMIC = "dynamic_degree"
CLIP_FRAMES = 81
NOTHING = "published values without error bars: nothing to set them against"


def overall(reader: Reader) -> Evidence:
    table = _long(reader)
    again = table[list(DIMENSIONS)].mean(axis=1)
    off = float((again - table["overall"]).abs().max())
    found: list[Number] = []
    beside = [_number("largest difference of Overall and the plain mean of six", off)]
    for horizon, mine in table.groupby("horizon_s"):
        found.append(_place(f"Overall at {horizon} s", mine["overall"], mine["model"]))
        ranked = mine.sort_values("overall", ascending=False)
        best = ranked[ranked["model"] != OURS].iloc[0]
        own = float(one(mine, "table2_long_horizon.csv", model=OURS)["overall"])
        label = f"lead over {best['model']} at {horizon} s"
        beside.append(_number(label, own - float(best["overall"])))
    return evidence(found, beside)


def without_one(reader: Reader) -> Evidence:
    table = _long(reader)
    found: list[Number] = []
    beside: list[Number] = []
    for horizon, mine in table.groupby("horizon_s"):
        for left_out in DIMENSIONS:
            others = [name for name in DIMENSIONS if name != left_out]
            label = f"{horizon} s without {left_out.replace('_', ' ')}"
            found.append(_place(label, mine[others].mean(axis=1), mine["model"]))
        own = one(mine, "table2_long_horizon.csv", model=OURS)
        rest = mine[mine["model"] != OURS]
        best = rest.sort_values("overall", ascending=False).iloc[0]
        share = (float(own[DYNAMIC]) - float(best[DYNAMIC])) / len(DIMENSIONS)
        lead = float(own["overall"]) - float(best["overall"])
        told = f"{horizon} s: dynamic degree's part of the lead of {lead:+.3f} over {best['model']}"
        beside.append(_number(told, share))
    return evidence(sorted(found, key=lambda number: -number.value), beside)


def _long(reader: Reader) -> pd.DataFrame:
    columns = ("model", "horizon_s", "overall", *DIMENSIONS)
    table = reader.paper("table2_long_horizon", columns=columns)
    rows(table, "table2_long_horizon.csv", model=OURS)
    return table


def user_study(reader: Reader) -> Evidence:
    criteria = ("prompt_adherence", "temporal_consistency", "dynamic_consistency")
    table = reader.paper("table2_user_study", columns=("model", "overall", *criteria))
    rows(table, "table2_user_study.csv", model=OURS)
    again = table[list(criteria)].mean(axis=1)
    return evidence(
        [
            _place(name.replace("_", " "), table[name], table["model"])
            for name in (*criteria, "overall")
        ],
        _number("largest difference of overall and the mean of three",
                float((again - table["overall"]).abs().max())),
    )  # fmt: skip


def total(reader: Reader) -> Evidence:
    found: list[Number] = []
    told: list[Number] = []
    plain: list[float] = []
    for name, label in (("table5a_latent_dim", "d_c = {d_c}"),
                        ("table5b_nope_rope_split", "{d_nope}/{d_rope}")):  # fmt: skip
        table = reader.paper(name, columns=("semantic", "quality", "total"))
        for row in table.to_dict("records"):
            quality, semantic = float(row["quality"]), float(row["semantic"])
            value = _total(total_of(quality, semantic))
            here = label.format_map({str(key): value for key, value in row.items()})
            found.append(
                Number(f"(4 Quality + Semantic) / 5 at {here}", value, value - 0.005,
                       value + 0.005, "%", provenance="paper-quoted", bounds="rounding")
            )  # fmt: skip
            told.append(stated(f"Total at {here}", f"{row['total']:.2f}", "%"))
            mean = _total(weighted_total(quality, semantic))
            plain.append(abs(mean - float(row["total"])))
    board = reader.paper("vbench_leaderboard", columns=("quality", "semantic", "total"))
    own = max(
        abs(_total(total_of(float(row["quality"]), float(row["semantic"]))) - float(row["total"]))
        for row in board.to_dict("records")
    )
    return evidence(
        found, told,
        _number("largest difference of Total and the plain mean", max(plain), "%"),
        _number(f"largest difference of 4:1 and Total in {len(board)} rows of the leaderboard",
                own, "%"),
    )  # fmt: skip


def _total(value: float | None) -> float:
    assert value is not None  # both parts were given
    return value


def clip_frames(reader: Reader) -> Evidence:
    columns = ("model", "throughput_fps_b200", "latency_s_b200")
    table = reader.paper("table3_efficiency", columns=columns).set_index("model")
    names = ("Self-Forcing", "LongSANA", OURS)
    for name in names:
        if name not in table.index:
            raise MissingError(f"{name} in results/paper/table3_efficiency.csv")
    fps, seconds = table["throughput_fps_b200"], table["latency_s_b200"]
    one_way, other_way = names[:2]
    return evidence(
        [_frames(f"{name}: FPS x latency", fps[name], seconds[name]) for name in names],
        Number("a clip", CLIP_FRAMES, CLIP_FRAMES, CLIP_FRAMES, "frames", "stated",
               "paper-quoted"),
        [
            _frames(f"FPS of {a} x latency of {b}", fps[a], seconds[b], "null")
            for a, b in ((one_way, other_way), (other_way, one_way))
        ],
        [
            _number(f"{OURS} over {name}, FPS", float(fps[OURS] / fps[name]), "x")
            for name in (other_way, one_way)
        ],
    )  # fmt: skip


def _frames(label: str, fps: object, seconds: object, role: str = "found") -> Number:
    a, b = float(str(fps)), float(str(seconds))
    half = 0.005
    return Number(
        label, a * b, (a - half) * (b - half), (a + half) * (b + half), "frames",
        "null" if role == "null" else "found", "paper-quoted", "rounding",
    )  # fmt: skip


def _place(label: str, values: pd.Series, models: pd.Series) -> Number:
    """Place of the paper's model; equal values share the better one."""
    rounded = np.round(values.to_numpy(float), 9)
    own = rounded[(models == OURS).to_numpy()][0]
    place = 1 + int((rounded > own).sum())
    return Number(label, place, unit=f"of {len(rounded)}", provenance="paper-quoted")


def _number(label: str, value: float, unit: str = "") -> Number:
    return Number(label, value, unit=unit, role="beside", provenance="paper-quoted")


CLAIMS = (
    Claim(
        id="long-horizon-best",
        statement="VideoMLA has the best Overall score at long horizons.",
        place="abstract; Table 2",
        quantity="place in the paper's own table, at each horizon",
        unit="place of 10",
        scale="arithmetic",
        null=NOTHING,
        query=overall,
        rule=First(),
        figure="table2_long_horizon",
        command="make figures FIG=table2_long_horizon",
        reading="Overall is the plain mean of six dimensions, not VBench's weighting. Places "
        "are read off the paper's own numbers, which carry no error bars.",
    ),
    Claim(
        id="long-horizon-broad",
        statement="Its lead at long horizons does not hang on a single dimension.",
        place="Table 2",
        quantity="place when one of the six dimensions is left out",
        unit="place of 10",
        scale="arithmetic",
        null=NOTHING,
        query=without_one,
        rule=First(),
        figure="table2_long_horizon",
        command="make figures FIG=table2_long_horizon",
        reading="Dynamic degree is a yes-or-no measure of optical flow that rewards any motion: "
        "a lead that it makes is a lead in motion.",
    ),
    Claim(
        id="user-study",
        statement="Users prefer VideoMLA in all criteria.",
        place="Table 2, user study",
        quantity="place in the paper's own table, by criterion",
        unit="place of 9",
        scale="arithmetic",
        null=NOTHING,
        query=user_study,
        rule=First(),
        figure="table2_user_study",
        command="make figures FIG=table2_user_study",
        reading="Places in published means; without the ratings themselves nobody can say how "
        "far chance would carry.",
    ),
    Claim(
        id="total-is-vbench",
        statement="The Total of the ablations is VBench's Total.",
        place="Tables 5a and 5b",
        quantity="VBench's (4 Quality + Semantic) / 5 from the printed parts, against the printed "
        "Total",
        unit="%",
        scale="arithmetic",
        null="ten rows of VBench's leaderboard, which the same formula reproduces",
        query=total,
        rule=Agrees(),
        figure="table5_vbench",
        command="make figures FIG=table5_vbench",
        reading="If it is not, these Totals must not be set beside a leaderboard's. The plain "
        "mean of Quality and Semantic is listed beside.",
    ),
    Claim(
        id="throughput-rows",
        statement="Table 3 sets throughput and latency of the same clip side by side, which gives "
        "1.23x over LongSANA.",
        place="headline number; Table 3",
        quantity="frames a second times seconds of a clip",
        unit="frames",
        scale="arithmetic",
        null="the same with one column of the two other rows exchanged",
        query=clip_frames,
        rule=Agrees(),
        figure="table3_efficiency",
        command="make figures FIG=table3_efficiency",
        reading="The two columns should describe one clip of 81 frames. If rows do so only once "
        "an entry of one is exchanged with that of another, the table has a slip, and "
        "the speed-up may be over another model.",
    ),
)
