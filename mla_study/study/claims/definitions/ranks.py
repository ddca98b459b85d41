"""Claims about the effective rank of the composed operator of latent attention."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from mla_study.miniature.results import D_C, D_ROPE, MARGIN, is_long, of_student, usual
from mla_study.probes.nulls import gaussian_product_null
from mla_study.study.claims.definitions.cache import sizes
from mla_study.study.claims.definitions.common import STUDY, Reader, difference, over_seeds
from mla_study.study.claims.model import Claim, Evidence, Number, evidence
from mla_study.study.claims.rules import MoreThanNull
from mla_study.study.claims.sources import MissingError, rows

TOLD = {"svd": "spectral", "random": "random"}
RANK = "r_0.99_interp"
PRODUCT = "gaussian_product"
DRAWS = 8
COLUMNS = ("run", "variant", "init", "d_c", "d_rope", "seed", "step", "metric", "value", "layer",
           "operator", "gauge", "null", "null_value")  # fmt: skip
ROLES = {"spectral": "found", "random": "found", "activation": "beside"}


def quoted_rank(reader: Reader) -> Evidence:
    size = sizes(reader)
    d_c = int(size["d_c"])
    made = int(size["heads"] * (size["d_nope"] + size["head_dim"]))
    chance, spread = gaussian_product_null(made, d_c, int(size["width"]), draws=DRAWS)["r_0.99"]
    table = reader.paper("fig8_rank_saturation", columns=("init", "training_step_k", "d_c"))
    last = table[(table["d_c"] == d_c)].sort_values("training_step_k")
    found: list[Number] = []
    told: list[Number] = []
    for init, name in TOLD.items():
        rank = float(rows(last, "fig8_rank_saturation.csv", init=init).iloc[-1]["r_0.99_median"])
        off = 2 * spread + 0.5
        found.append(
            Number(f"{name}, trained − Gaussian product", (rank - chance) / d_c,
                   (rank - chance - off) / d_c, (rank - chance + off) / d_c, "share of d_c",
                   provenance="paper-quoted", bounds="rounding and 2 s.d. of the null")
        )  # fmt: skip
        told.append(
            Number(f"{name}, trained", rank, rank - 0.5, rank + 0.5, f"of {d_c}", "stated",
                   "paper-quoted", "rounding")
        )  # fmt: skip
    null = Number(
        f"Gaussian product of the same shapes, r_.99 of {d_c}", chance, chance - 2 * spread,
        chance + 2 * spread, "", "null", "null-model", "2 s.d. of one draw",
    )  # fmt: skip
    return evidence(found, null, told)


def rank_by_size(reader: Reader) -> Evidence:
    table = usual(composed(reader), None, D_ROPE)
    mine = table[(table["init"] == "activation") & (table["null"] == PRODUCT)]
    found: list[Number] = []
    nulls: list[Number] = []
    beside: list[Number] = []
    for size, own in mine.groupby("d_c"):
        d_c = int(str(size))
        value, null = _ends(own, d_c)[1], _ends(own, d_c, "null_value")[1]
        found.append(difference(f"d_c = {d_c}: trained − Gaussian product", value, null, "of d_c"))
        nulls.append(_mean(f"Gaussian product, d_c = {d_c}", null))
        beside.append(over_seeds(f"r_.99 / d_c, trained, d_c = {d_c}", value["value"]))
    if not found:
        raise MissingError("a trained student of the activation-aware init")
    return evidence(found, nulls, beside)


def change_by_training(reader: Reader) -> Evidence:
    table = composed(reader)
    numbers: list[Number] = []
    for init, role in ROLES.items():
        start, last = _ends(_null_rows(table, init, PRODUCT), D_C)
        made = difference(f"{init}: trained − start", last, start, "of d_c")
        numbers.append(_as(made, role))
    none = Number("doing nothing changes it by", 0.0, 0.0, 0.0, "of d_c", "null", "null-model")
    fresh = [
        difference(
            f"{init}: trained − untrained model", _ends(mine, D_C)[1],
            _ends(mine, D_C, "null_value")[1], "of d_c", "beside",
        )
        for init in ROLES
        for mine in [_null_rows(table, init, "untrained")]
    ]  # fmt: skip
    return evidence(numbers, none, fresh)


def both_inits(reader: Reader) -> Evidence:
    table = composed(reader)
    numbers: list[Number] = []
    for init, role in ROLES.items():
        mine = _null_rows(table, init, PRODUCT)
        last, null = _ends(mine, D_C)[1], _ends(mine, D_C, "null_value")[1]
        made = difference(f"{init}: trained − Gaussian product", last, null, "of d_c")
        numbers += [_as(made, role), _mean(f"Gaussian product ({init})", null)]
        numbers.append(over_seeds(f"r_.99 / d_c, {init}, trained", last["value"]))
    return evidence(numbers)


def composed(reader: Reader) -> pd.DataFrame:
    """r_.99 of the composed weights, interpolated, a row a layer, step and null."""
    table = reader.table("study_ranks", columns=COLUMNS)
    return rows(table, "study_ranks", operator="composed", gauge="raw", metric=RANK)


def _null_rows(table: pd.DataFrame, init: str, null: str) -> pd.DataFrame:
    mine = of_student(table, init)
    return rows(mine[~is_long(mine)], "study_ranks", null=null)


def _ends(mine: pd.DataFrame, d_c: int, column: str = "value") -> tuple[pd.DataFrame, pd.DataFrame]:
    """First and last step: median of layers over d_c in ``value``, a row a seed."""
    kept: list[pd.DataFrame] = []
    for end in (mine["step"].min(), mine["step"].max()):
        median = mine[mine["step"] == end].groupby("seed")[column].median() / d_c
        kept.append(median.rename("value").reset_index())
    return kept[0], kept[1]


def _as(number: Number, role: str) -> Number:
    return replace(number, role="found" if role == "found" else "beside")


def _mean(label: str, null: pd.DataFrame) -> Number:
    value = float(null["value"].mean())
    return Number(label, value, unit="of d_c", role="null", provenance="null-model")


CLAIMS = (
    Claim(
        id="rank-filled-quoted",
        statement="Training fills the latent: the composed operator's r_.99 is about 0.98 d_c (189 "
        "and 187 of 192).",
        place="Fig. 8",
        quantity="the paper's r_.99 minus that of a product of random matrices, over d_c",
        unit="share of d_c",
        scale="full",
        null="product of Gaussian matrices of the same shapes, never trained",
        query=quoted_rank,
        rule=MoreThanNull(MARGIN),
        figure="fig8_rank_saturation",
        command="make figures FIG=fig8",
        reading="If random matrices of these shapes give the same number, it does not tell a "
        "trained model from an untrained one.",
    ),
    Claim(
        id="rank-set-by-bottleneck",
        statement="The size of the latent, not depth or data, sets the effective rank, at every "
        "d_c.",
        place="Fig. 2",
        quantity="r_.99 after training minus that of a Gaussian product, over d_c",
        unit="share of d_c",
        scale="miniature",
        null="product of Gaussian matrices of the same shapes",
        query=rank_by_size,
        rule=MoreThanNull(MARGIN),
        figure="fig2_composed_operator",
        command=STUDY,
        reading="Where it equals the null it is a property of the shapes, true of any matrices; "
        "a difference would be what training adds or takes.",
    ),
    Claim(
        id="rank-kept-by-training",
        statement="Training preserves the rank budget that the initialisation sets.",
        place="Fig. 8",
        quantity="r_.99 after all stages minus that at the start, over d_c",
        unit="share of d_c",
        scale="miniature",
        null="doing nothing, which preserves it too",
        query=change_by_training,
        rule=MoreThanNull(MARGIN),
        figure="fig8_rank_saturation",
        command=STUDY,
        reading="'Preserves' means that nothing changed; to be news it would have to be more than "
        "what no training gives.",
    ),
    Claim(
        id="rank-both-inits",
        statement="Spectral and random initialisation both end with a filled latent.",
        place="Fig. 8",
        quantity="r_.99 after all stages minus that of a Gaussian product, over d_c",
        unit="share of d_c",
        scale="miniature",
        null="product of Gaussian matrices of the same shapes",
        query=both_inits,
        rule=MoreThanNull(MARGIN),
        figure="fig8_rank_saturation",
        command=STUDY,
        reading="A filled latent counts for something only if chance does not fill it as well. "
        "What the two reach in quality is spectral-equals-random.",
    ),
)
