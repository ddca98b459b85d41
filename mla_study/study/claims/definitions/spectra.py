"""Claims about the spectra of pretrained attention, and what they predict."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mla_study.miniature.prediction import energy
from mla_study.miniature.results import D_C, MARGIN, WIDTH
from mla_study.probes.nulls import marchenko_pastur
from mla_study.study.claims.definitions.common import STUDY, Reader, against, scores
from mla_study.study.claims.model import Claim, Evidence, Number, Role, evidence
from mla_study.study.claims.rules import AboveLevel, Despite, MoreThanNull
from mla_study.study.claims.sources import MissingError, one, rows
from mla_study.study.statistics import median_interval

WAN = "wan_spectra"
WAN_COMMAND = f"rank-probe Wan2.1-T2V-1.3B --operators kv --out results/data/{WAN}"
ROWS_OF_KV, WAN_WIDTH, WAN_D_C = 3072, 1536, 192
STATED_RANK = 1300
HALF = 0.5
PROBE = ("checkpoint", "layer", "attention", "operator", "gauge", "metric", "value", "null_value",
         "null_se", "m", "n")  # fmt: skip
LANGUAGE = {"minilm": "MiniLM", "smollm2": "SmolLM2"}


def wan_rank(reader: Reader) -> Evidence:
    quoted = reader.paper("wan_spectrum", columns=("quantity", "low", "high"))
    rank = one(quoted, "wan_spectrum.csv", quantity="r_0.99")
    told = _quoted("r_.99 / 1536, read off the paper's figure", rank, WAN_WIDTH)
    chance = marchenko_pastur(ROWS_OF_KV, WAN_WIDTH)["r_0.99"] / WAN_WIDTH
    null = _null("Gaussian matrix of that shape", chance, 0.0)
    if not reader.has(WAN):
        return evidence(told, null, missing=f"Wan's weights, probed: `{WAN_COMMAND}`")
    table = _kv(reader.table(WAN, columns=PROBE), WAN)
    ranks = rows(table, WAN, metric="r_0.99", gauge="raw")
    share = (ranks["value"] / ranks[["m", "n"]].min(axis=1)).to_numpy(float)
    low = float(share.min())
    kept = rows(table, WAN, metric=f"energy_at_{WAN_D_C}", gauge="raw")["value"]
    return evidence(
        Number(f"r_.99 / d, lowest of {len(share)} layers", low, low, low),
        null,
        told,
        _median("r_.99 / d, median layer", share, "beside"),
        _median(f"energy in {WAN_D_C} directions, median layer", kept.to_numpy(float), "beside"),
    )


def miniature_rank(reader: Reader) -> Evidence:
    table = reader.table("study_ranks")
    start = rows(table, "study_ranks", variant="dense", operator="kv", step=0, null="gaussian")

    def layers(metric: str, gauge: str, column: str) -> np.ndarray:
        mine = rows(start, "study_ranks", metric=metric, gauge=gauge)
        return mine.groupby("layer")[column].mean().to_numpy(float)

    numbers: list[Number] = []
    for gauge, told, own in (
        ("raw", "its weights", "found"),
        ("weighted-raw", "its outputs on real inputs", "beside"),
    ):
        role: Role = "found" if own == "found" else "beside"
        share = layers("r_0.99", gauge, "value") / WIDTH
        null = layers("r_0.99", gauge, "null_value") / WIDTH
        wide = 2 * layers("r_0.99", gauge, "null_se") / WIDTH
        numbers.append(_median(f"r_.99 / d of {told}, median layer", share, role))
        name = "Gaussian matrix" if own == "found" else "Gaussian matrix on the same inputs"
        numbers.append(
            _null(name, float(np.median(null)), float(wide.max()), "null" if role == "found" else
                  "beside")
        )  # fmt: skip
    for gauge, told in (("raw", "its weights"), ("weighted-raw", "its outputs on real inputs")):
        kept = layers("energy_at_n/8", gauge, "value")
        numbers.append(_median(f"energy in d/8 directions of {told}", kept, "beside"))
    return evidence(numbers)


def language_models(reader: Reader) -> Evidence:
    table = _kv(reader.table("fig1_spectra", columns=PROBE), "fig1_spectra")
    table = rows(table, "fig1_spectra", gauge="raw")
    kept, ranks = _wan(reader)
    found: list[Number] = []
    beside: list[Number] = [kept, ranks]
    for name, told in LANGUAGE.items():
        mine = rows(table, "fig1_spectra", checkpoint=name)
        share = rows(mine, "fig1_spectra", metric="energy_at_n/8")
        own = _median(f"{told}, energy in d/8", share["value"].to_numpy(float), "beside")
        chance = float(share["null_value"].median())
        beside += [own, _null(f"Gaussian of {told}'s shape, energy in d/8", chance, 0.0, "beside")]
        found.append(
            Number(f"{told} − Wan, energy in d/8", own.value - kept.value, own.low - kept.high,
                   own.high - kept.low, "share", bounds="of the median layer")
        )  # fmt: skip
    for name, told in LANGUAGE.items():
        mine = rows(table, "fig1_spectra", checkpoint=name, metric="r_0.99")
        over = (mine["value"] / mine["null_value"]).to_numpy(float)
        own = _median(f"{told}, r_.99 over its Gaussian null", over, "beside")
        beside.append(own)
        found.append(
            Number(f"Wan − {told}, r_.99 over the null", ranks.value - own.value,
                   ranks.low - own.high, ranks.high - own.low, "share",
                   bounds="of the median layer")
        )  # fmt: skip
    return evidence(found, beside)


def _wan(reader: Reader) -> tuple[Number, Number]:
    """Wan's energy in an eighth of the directions and r_.99 over the null, probed or quoted."""
    chance = marchenko_pastur(ROWS_OF_KV, WAN_WIDTH)["r_0.99"]
    if reader.has(WAN):
        table = rows(_kv(reader.table(WAN, columns=PROBE), WAN), WAN, gauge="raw")
        kept = rows(table, WAN, metric="energy_at_n/8")["value"].to_numpy(float)
        ranks = rows(table, WAN, metric="r_0.99")
        over = (ranks["value"] / ranks["null_value"]).to_numpy(float)
        return _median("Wan, energy in d/8", kept, "beside"), _median(
            "Wan, r_.99 over its Gaussian null", over, "beside"
        )
    quoted = reader.paper("wan_spectrum", columns=("quantity", "low", "high"))
    kept = one(quoted, "wan_spectrum.csv", quantity="energy_at_192")
    rank = one(quoted, "wan_spectrum.csv", quantity="r_0.99")
    return _quoted("Wan, energy in d/8, quoted", kept, 1, "beside"), _quoted(
        "Wan, r_.99 over its Gaussian null, quoted", rank, chance, "beside"
    )


def _spectral_error(reader: Reader, gauge: str, told: str, null: str) -> Evidence:
    spectra = reader.table(
        "study_spectra", columns=("state", "gauge", "operator", "layer", "index", "sigma")
    )
    teacher = rows(spectra, "study_spectra", state="teacher", gauge=gauge, operator="kv")
    lost = 1 - energy(teacher, gauge)[:, D_C - 1]
    predicted = _median(f"energy that rank {D_C} of {WIDTH} loses, {told}", lost, "premise")
    ranks = reader.table("study_ranks")
    where = {"variant": "dense", "operator": "kv", "step": 0, "null": "gaussian"}
    start = rows(ranks, "study_ranks", metric="energy_at_n/8", gauge=gauge, **where)
    chance = 1 - float(start["null_value"].median())
    wide = 2 * float(start["null_se"].max())
    table = scores(reader)
    return evidence(
        [against(table, "spectral", "dense", metric) for metric in ("all_correct", "iou")],
        predicted,
        _null(f"{null}, the same loss", chance, wide),
        [
            against(table, "activation", "dense", metric, role="beside")
            for metric in ("all_correct", "iou")
        ],
    )


def weights_error(reader: Reader) -> Evidence:
    return _spectral_error(reader, "raw", "weights", "Gaussian matrix")


def outputs_error(reader: Reader) -> Evidence:
    return _spectral_error(
        reader, "weighted-raw", "outputs on real inputs", "Gaussian matrix on the same inputs"
    )


def _kv(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return rows(table, name, operator="kv", attention="self")


def _median(label: str, values: np.ndarray, role: Role = "found") -> Number:
    value, low, high = median_interval(values)
    bounds = f"of the median of {len(values)} layers" + (
        ", 95 %" if len(values) > 5 else ": their extremes"
    )
    return Number(label, value, low, high, "share", role, bounds=bounds)


def _null(label: str, value: float, wide: float, role: Role = "null") -> Number:
    return Number(
        label, value, value - wide, value + wide, "share", role, "null-model", "2 s.d. of one draw"
    )


def _quoted(label: str, row: pd.Series, over: float, role: Role = "stated") -> Number:
    low, high = float(row["low"]) / over, float(row["high"]) / over
    if not np.isfinite([low, high]).all():
        raise MissingError(f"bounds of {row['quantity']} in results/paper/wan_spectrum.csv")
    return Number(
        label, (low + high) / 2, low, high, "share", role, "paper-quoted", "read off a figure"
    )


CLAIMS = (
    Claim(
        id="full-rank-wan",
        statement="The keys and values of pretrained video attention are not low-rank: in every "
        "layer of Wan 1.3B 99 % of the energy takes more than 1300 of 1536 directions.",
        place="Fig. 1",
        quantity="r_.99 of [W_K; W_V] over the width, lowest layer",
        unit="share of d",
        scale="full",
        null="a Gaussian matrix of the same shape (Marchenko and Pastur)",
        query=wan_rank,
        rule=AboveLevel(STATED_RANK / WAN_WIDTH),
        figure="fig1_spectra",
        command=WAN_COMMAND,
        reading="Needs Wan's own weights. A random matrix is not low-rank either, so that the "
        "question is also how far below it the weights lie.",
    ),
    Claim(
        id="full-rank-miniature",
        statement="The keys and values of pretrained video attention are not low-rank (tested on "
        "the miniature's video model: 99 % of the energy takes more than half of the directions).",
        place="Fig. 1",
        quantity="r_.99 of the teacher's [W_K; W_V] over the width, median layer",
        unit="share of d",
        scale="miniature",
        null="a Gaussian matrix of the same shape",
        query=miniature_rank,
        rule=AboveLevel(HALF),
        figure="fig1_spectra",
        command=STUDY,
        reading="Low rank would mean that half of the directions hold 99 % of the energy. "
        "Weights are what the paper measures; the same measure of what they put out for "
        "real inputs is listed beside.",
    ),
    Claim(
        id="unlike-language-models",
        statement="Language models' keys and values have a fast-decaying spectrum, video models' "
        "do not.",
        place="Fig. 1 and what is said of it",
        quantity="energy in an eighth of the directions, and r_.99 over the Gaussian null: two "
        "language models against Wan",
        unit="share",
        scale="other models",
        null="no difference",
        query=language_models,
        rule=MoreThanNull(MARGIN),
        figure="fig1_spectra",
        command="make data FIG=fig1",
        reading="Supported would need more energy in few directions in both language models, by "
        "both measures. Two small models are no survey, and Wan's values are quoted "
        "until its weights are given.",
    ),
    Claim(
        id="spectral-error-weights",
        statement="Latent attention works where cutting the weights' spectrum at d_c predicts a "
        "large error.",
        place="Fig. 1 against Table 5a",
        quantity="energy that a cut at d_c loses (weights), and quality of the trained student "
        "minus that of the dense one",
        unit="share",
        scale="miniature",
        null="the loss of a Gaussian matrix of the same shape",
        query=weights_error,
        rule=Despite(HALF, MARGIN),
        figure="fig_spectrum_vs_quality",
        command=STUDY,
        reading="Two conditions: the cut loses more than half of the energy, and the trained "
        "student keeps up. This prediction is of the weights alone; the next claim asks "
        "the same of what they put out.",
    ),
    Claim(
        id="spectral-error-outputs",
        statement="The same holds for the error that matters, that of keys and values on real "
        "inputs.",
        place="Fig. 1 against Table 5a",
        quantity="energy that a cut at d_c loses (outputs on real inputs), and quality as above",
        unit="share",
        scale="miniature",
        null="the loss of a Gaussian matrix on the same inputs",
        query=outputs_error,
        rule=Despite(HALF, MARGIN),
        figure="fig_spectrum_vs_quality",
        command=STUDY,
        reading="If the cut loses little on real inputs, success at d_c is what the spectrum "
        "predicts, and the weights were the wrong thing to look at.",
    ),
)
