"""Claims about what the trained students reach, in short and in long videos."""

from __future__ import annotations

import numpy as np

from mla_study.miniature.results import LONG, MARGIN, held_out, of_student, score_rows, steps_to
from mla_study.study.claims.definitions.common import (
    STUDY,
    TOLD,
    Reader,
    against,
    curves,
    difference,
    over_seeds,
    scores,
)
from mla_study.study.claims.model import Claim, Evidence, Number, evidence
from mla_study.study.claims.rules import NoWorse

METRICS = ("all_correct", "iou")


def random_in_the_end(reader: Reader) -> Evidence:
    table, losses = scores(reader), curves(reader)
    long = not of_student(score_rows(table, "all_correct"), LONG).empty
    last = LONG if long else "random"
    lost = held_out(losses)
    numbers: list[Number] = [against(table, last, "spectral", metric) for metric in METRICS]
    beside: list[Number] = []
    if long:
        beside += [against(table, "random", "spectral", m, role="beside") for m in METRICS]
    steps = {name: of_student(lost, name)["step"].max() for name in dict.fromkeys((last, "random"))}
    beside += [
        Number(f"teacher-forcing steps of {name}", float(value), unit="steps", role="beside")
        for name, value in steps.items()
    ]
    beside.append(
        difference(
            f"{last} − spectral, held-out loss", of_student(lost, last),
            of_student(lost, "spectral"), "", "beside",
        )
    )  # fmt: skip
    rows = losses[(losses["name"] == "held_out") & (losses["stage"] == "tf")]
    ends = of_student(lost, "random").set_index("seed")
    needed = [
        {"seed": seed, "value": steps_to(mine, float(ends["value"][seed])) / ends["step"][seed]}
        for seed, mine in of_student(rows, "spectral").groupby("seed")
        if seed in ends.index
    ]
    if needed:
        import pandas as pd

        share = pd.DataFrame(needed)["value"]
        label = "steps that spectral needs to random's last loss, over random's own"
        beside.append(over_seeds(label, share, "share"))
    return evidence(numbers, beside)


def short_parity(reader: Reader) -> Evidence:
    table = scores(reader)
    return evidence(
        [against(table, "spectral", "dense", metric) for metric in METRICS],
        [against(table, "random", "dense", metric, role="null") for metric in METRICS],
        [against(table, "activation", "dense", metric, role="beside") for metric in METRICS],
    )


def long_parity(reader: Reader) -> Evidence:
    table = scores(reader)

    def at(name: str, metric: str, role: str, clips: int) -> Number:
        kind = "found" if role == "found" else "null" if role == "null" else "beside"
        return against(table, name, "dense", metric, clips=clips, scope="last", role=kind)

    late = score_rows(table, "iou", clips=100, scope="last")
    far = not of_student(late, "activation").empty and not of_student(late, "dense").empty
    return evidence(
        [at("spectral", metric, "found", 10) for metric in METRICS],
        [at("random", metric, "null", 10) for metric in METRICS],
        [at("activation", metric, "beside", 10) for metric in METRICS],
        [at("activation", metric, "beside", 100) for metric in METRICS if far],
    )


def long_holds(reader: Reader) -> Evidence:
    table = scores(reader)
    numbers: list[Number] = []
    for name in ("spectral", "activation", "dense"):
        for metric in METRICS:
            late = of_student(score_rows(table, metric, clips=10, scope="last"), name)
            early = of_student(score_rows(table, metric), name)
            role = "found" if name == "spectral" else "null" if name == "dense" else "beside"
            label = f"{name}: {TOLD[metric]}, end of 10x − 1x"
            numbers.append(difference(label, late, early, "share", role))
    kept = of_student(score_rows(table, "background", clips=10, scope="last"), "spectral")
    held = kept["value"].to_numpy(float)
    if np.isfinite(held).any():
        told = "spectral: background right at the end of 10x"
        numbers.append(over_seeds(told, kept["value"], "share"))
    return evidence(numbers)


CLAIMS = (
    Claim(
        id="spectral-equals-random",
        statement="Random initialisation ends where spectral initialisation does.",
        place="Fig. 8 and what is said of it",
        quantity="quality of the student of random init, given the most steps, minus the spectral "
        "one's",
        unit="share",
        scale="miniature",
        null="no difference",
        query=random_in_the_end,
        rule=NoWorse(MARGIN),
        figure="fig_training_curves",
        command=STUDY,
        reading="The comparison that favours random most: the random start with the most steps. "
        "Equal steps and steps to equal loss are listed beside; longer training than "
        "was tried is not excluded.",
    ),
    Claim(
        id="short-horizon-parity",
        statement="On short videos latent attention is as good as dense attention.",
        place="Tables 3 and 5",
        quantity="quality of the latent student (spectral init) minus the dense one's, all stages, "
        "training length",
        unit="share",
        scale="miniature",
        null="a latent student of random init, equal steps",
        query=short_parity,
        rule=NoWorse(MARGIN),
        figure="table5a_latent_dim",
        command=STUDY,
        reading=f"Parity is a difference of less than {MARGIN:g} in both scores; a smaller cost "
        "can still be real, see the intervals.",
    ),
    Claim(
        id="long-horizon-parity",
        statement="On long videos latent attention is as good as dense attention.",
        place="Table 2",
        quantity="quality at the end of ten training lengths, latent (spectral init) minus dense",
        unit="share",
        scale="miniature",
        null="a latent student of random init, equal steps",
        query=long_parity,
        rule=NoWorse(MARGIN),
        figure="fig_drift",
        command=STUDY,
        reading="Compares two students at the same age of the video; whether either holds is "
        "long-horizon-holds.",
    ),
    Claim(
        id="long-horizon-holds",
        statement="Quality holds far beyond the training length.",
        place="Figs. 4 and 6",
        quantity="quality at the end of ten training lengths minus that of the first, spectral "
        "init",
        unit="share",
        scale="miniature",
        null="the dense student, rolled out the same way",
        query=long_holds,
        rule=NoWorse(MARGIN),
        figure="fig_drift",
        command=STUDY,
        reading="What dense students lose as well (the null) is no fault of the latent. All "
        "correct counts the background too, which is listed beside.",
    ),
)
