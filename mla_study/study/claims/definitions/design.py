"""Claims about choices: the split of a head, the size of the latent, positions of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from mla_study.miniature.results import (
    D_C,
    D_ROPE,
    HEAD,
    MARGIN,
    held_out,
    of_student,
    score_rows,
    usual,
)
from mla_study.study.claims.definitions.common import (
    STUDY,
    TOLD,
    Reader,
    curves,
    difference,
    scores,
)
from mla_study.study.claims.model import Claim, Evidence, Number, Role, evidence
from mla_study.study.claims.rules import MoreThanNull, NoWorse
from mla_study.study.claims.sources import MissingError, rows

METRICS = ("all_correct", "iou")
SMALL = 4
"""Of 96 channels what the smallest latent of the paper's Table 5a is of the width, 64 of 1536."""


def split_is_best(reader: Reader) -> Evidence:
    loss = _swept(held_out(curves(reader)))
    shown = _swept(score_rows(scores(reader), "all_correct"))
    lost, right = (frame[frame["d_c"] == D_C] for frame in (loss, shown))
    others = sorted(set(lost["d_rope"]) - {D_ROPE})
    if not others:
        raise MissingError("a student of another split in results/data/study_curves")
    found: list[Number] = []
    for size in others:
        told = f"{HEAD - size}/{size}"
        better = difference(
            f"held-out loss of {told} − that of {HEAD - D_ROPE}/{D_ROPE}", _at(lost, size),
            _at(lost, D_ROPE),
        )  # fmt: skip
        found.append(better)
    beside = [
        difference(
            f"all correct, {HEAD - D_ROPE}/{D_ROPE} − {HEAD - size}/{size}", _at(right, D_ROPE),
            _at(right, size), "share", "beside",
        )
        for size in others
    ]  # fmt: skip
    return evidence(found, beside, _totals(reader, "table5b_nope_rope_split", "split"))


def plateau(reader: Reader) -> Evidence:
    return _by_size(reader, lambda sizes: [size for size in sizes if size > D_C])


def drop(reader: Reader) -> Evidence:
    return _by_size(reader, lambda sizes: [SMALL] if SMALL in sizes else [])


def _by_size(reader: Reader, choose: Callable[[Sequence[int]], Sequence[int]]) -> Evidence:
    table = scores(reader)
    found: list[Number] = []
    for metric in METRICS:
        mine = _swept(score_rows(table, metric))
        mine = mine[mine["d_rope"] == D_ROPE]
        for size in choose(sorted(set(mine["d_c"]))):
            label = f"{TOLD[metric]}, d_c = {D_C} − d_c = {size}"
            other = mine[mine["d_c"] == size]
            found.append(difference(label, mine[mine["d_c"] == D_C], other, "share"))
    if not found:
        raise MissingError("students of other latent sizes in results/data/study_scores")
    loss = _swept(held_out(curves(reader)))
    loss = loss[loss["d_rope"] == D_ROPE]
    beside = [
        difference(
            f"held-out loss, d_c = {size} − d_c = {D_C}", loss[loss["d_c"] == size],
            loss[loss["d_c"] == D_C], "", "beside",
        )
        for size in sorted(set(loss["d_c"]) - {D_C})
    ]  # fmt: skip
    return evidence(found, beside, _totals(reader, "table5a_latent_dim", "size"))


def _swept(frame: pd.DataFrame) -> pd.DataFrame:
    """Students of the activation-aware init and the usual length, of any size and split."""
    mine = usual(frame, None, None)
    return mine[mine["init"] == "activation"]


def _at(frame: pd.DataFrame, d_rope: int) -> pd.DataFrame:
    return frame[frame["d_rope"] == d_rope]


def _totals(reader: Reader, name: str, what: str) -> list[Number]:
    """The paper's Totals, for comparison."""
    table = reader.paper(name, columns=("total",))
    return [
        Number(
            f"the paper's Total at {row['d_nope']}/{row['d_rope']}" if what == "split"
            else f"the paper's Total at d_c = {row['d_c']}",
            float(row["total"]), role="beside", provenance="paper-quoted",
        )
        for row in table.to_dict("records")
    ]  # fmt: skip


def positions_for_motion(reader: Reader) -> Evidence:
    table = _rolled_out(reader)
    numbers: list[Number] = []
    for name in ("activation", "dense"):
        numbers.append(_plain_less_absolute(table, name, "iou", "IoU", "share"))
        numbers.append(_plain_less_absolute(table, name, "direction", "direction right", "share",
                                            "beside"))  # fmt: skip
        numbers.append(_plain_less_absolute(table, name, "velocity_error", "velocity error",
                                            "px a frame", "beside"))  # fmt: skip
    return evidence(numbers)


def positions_for_captions(reader: Reader) -> Evidence:
    table = _rolled_out(reader)
    numbers: list[Number] = []
    for name in ("activation", "dense"):
        numbers.append(_plain_less_absolute(table, name, "all_correct", "all correct", "share"))
        numbers.append(_plain_less_absolute(table, name, "background", "background right", "share",
                                            "beside"))  # fmt: skip
    return evidence(numbers)


def _rolled_out(reader: Reader) -> pd.DataFrame:
    table = scores(reader)
    rows(table, "study_scores", condition="absolute", clips=10)
    return table


def _plain_less_absolute(
    table: pd.DataFrame, name: str, metric: str, told: str, unit: str, role: Role = "found"
) -> Number:
    plain, other = (
        of_student(score_rows(table, metric, clips=10, scope="all", condition=condition), name)
        for condition in ("plain", "absolute")
    )
    return difference(f"{name}: {told}, window-relative − absolute", plain, other, unit, role)


CLAIMS = (
    Claim(
        id="split-96-32",
        statement="Three quarters content and one quarter rotary channels (96/32) is the best "
        "split of a head.",
        place="Table 5b",
        quantity="held-out loss of other splits minus that of the same ratio (24/8)",
        unit="loss",
        scale="miniature",
        null="no difference between splits",
        query=split_is_best,
        rule=MoreThanNull(),
        figure="table5b_split",
        command=STUDY,
        reading="Supported would need every other split to be worse by more than the seeds "
        "differ. The paper's differences come without error bars.",
    ),
    Claim(
        id="size-plateau",
        statement="Beyond an eighth of the width (d_c = 192) a larger latent brings nothing.",
        place="Table 5a",
        quantity="quality at d_c = d/8 minus that at larger sizes",
        unit="share",
        scale="miniature",
        null="no difference between sizes",
        query=plateau,
        rule=NoWorse(MARGIN),
        figure="table5a_latent_dim",
        command=STUDY,
        reading="Supported means within .05 in both scores; the held-out loss, which sees more, is "
        "listed beside.",
    ),
    Claim(
        id="size-drop",
        statement="A latent of a twenty-fourth of the width (d_c = 64) is too small.",
        place="Table 5a",
        quantity="quality at d_c = d/8 minus that at d/24",
        unit="share",
        scale="miniature",
        null="no difference between sizes",
        query=drop,
        rule=MoreThanNull(MARGIN),
        figure="table5a_latent_dim",
        command=STUDY,
        reading="The miniature's world is simple: a latent that does there may be too small for "
        "Wan.",
    ),
    Claim(
        id="relative-positions-motion",
        statement="Long rollouts need an unrotated cache with window-relative positions: without, "
        "motion goes wrong.",
        place="method",
        quantity="IoU over ten training lengths, window-relative minus absolute positions",
        unit="share",
        scale="miniature",
        null="no difference between positions",
        query=positions_for_motion,
        rule=MoreThanNull(MARGIN),
        figure="fig_drift",
        command=STUDY,
        reading="The same trained weights, rolled out both ways, dense and latent, judged by "
        "the overlap with the true sprite. The next claim judges the same videos by "
        "their captions.",
    ),
    Claim(
        id="relative-positions-caption",
        statement="Long rollouts need window-relative positions: without, videos cease to show "
        "what their captions say.",
        place="method",
        quantity="videos all correct over ten training lengths, window-relative minus absolute",
        unit="share",
        scale="miniature",
        null="no difference between positions",
        query=positions_for_captions,
        rule=MoreThanNull(MARGIN),
        figure="fig_drift",
        command=STUDY,
        reading="The two ways of judging can disagree: all correct counts the background, which "
        "is listed beside.",
    ),
)
