"""What spectra say of a student before it is trained, set against what it reached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mla_study.miniature.results import D_C, D_ROPE, WIDTH, held_out, score_rows, usual
from mla_study.study.runs import round_significant
from mla_study.study.statistics import percentiles, spearman

_RUN = ["run", "variant", "init", "d_c", "d_rope", "seed"]
NULL = "size_loss"
"""The predictor that knows no spectrum: what a cut at d_c loses of a flat one."""
PREDICTORS = {
    NULL: "1 − $d_c$ / d ($d_c$ itself)",
    "rank_loss": "1 − $r_{.99}$ / d of its weights",
    "weight_loss": "1 − E($d_c$) of the teacher's weights",
    "output_loss": "1 − E($d_c$) of its outputs",
    "error": "output error after conversion",
}
EXPECTED = {"held_out": 1, "all_correct": -1}
"""Quality -> sign of its correlation with a loss that predicts it."""
SCOPES = {
    "d_c": "sizes (activation, 24/8)",
    "split": "splits (activation, $d_c$ = 12)",
    "init": "inits ($d_c$ = 12, 24/8)",
    "all": "all of them",
}


def energy(spectra: pd.DataFrame, gauge: str) -> np.ndarray:
    """Energy E(k) [layers, k] of the teacher's [W_K; W_V], of the weights or of their outputs."""
    mine = spectra[(spectra["state"] == "teacher") & (spectra["gauge"] == gauge)]
    sigma = mine.pivot_table(index="layer", columns="index", values="sigma").to_numpy()
    square = np.cumsum(np.square(sigma), axis=1)
    return square / square[:, -1:]


def predictors(
    ranks: pd.DataFrame, spectra: pd.DataFrame, conversion: pd.DataFrame
) -> pd.DataFrame:
    """Losses that the spectra predict for each latent run before its first step, a row a run.

    Columns beside those of the run: ``size_loss`` (1 - d_c / d, which needs no spectrum),
    ``rank_loss`` (1 - r_.99 / d, r_.99 of the composed weights, interpolated, median of layers),
    ``weight_loss`` and ``output_loss`` (1 - E(d_c) of the teacher's [W_K; W_V], of the weights and
    of the outputs on real inputs, mean of layers; of one teacher they follow from d_c, and order
    runs as ``size_loss`` does), ``error`` (of the attention's output after conversion, mean of
    layers).
    """
    start = ranks[
        (ranks["operator"] == "composed") & (ranks["gauge"] == "raw") & (ranks["step"] == 0)
        & (ranks["metric"] == "r_0.99_interp")
    ]  # fmt: skip
    start = start.drop_duplicates(["run", "layer"])
    made = start.groupby(_RUN, as_index=False)["value"].median()
    made[NULL] = 1 - made["d_c"] / WIDTH
    made["rank_loss"] = 1 - made.pop("value") / WIDTH
    for name, gauge in (("weight_loss", "raw"), ("output_loss", "weighted-raw")):
        kept = energy(spectra, gauge).mean(axis=0)
        made[name] = [1 - kept[min(int(d_c), len(kept)) - 1] for d_c in made["d_c"]]
    last = conversion[conversion["decision"] == "latent_norm"]
    error = last.groupby("run")["output_error"].mean()
    return round_significant(made.assign(error=made["run"].map(error)))


def predicted(
    ranks: pd.DataFrame, spectra: pd.DataFrame, conversion: pd.DataFrame, curves: pd.DataFrame,
    scores: pd.DataFrame,
) -> pd.DataFrame:  # fmt: skip
    """:func:`predictors` of usual runs, and what they reached: ``held_out``, ``all_correct``.

    ``config`` names init, d_c and split; each of :data:`SCOPES` has a column that says who is in.
    """
    made = usual(predictors(ranks, spectra, conversion), None, None)
    made = made[made["init"] != "untrained"].copy()
    lost, shown = held_out(curves), score_rows(scores, "all_correct")
    made["held_out"] = made["run"].map(lost.set_index("run")["value"])
    made["all_correct"] = made["run"].map(shown.set_index("run")["value"])
    made["config"] = [
        f"{init}-{d_c}-{d_rope}"
        for init, d_c, d_rope in zip(made["init"], made["d_c"], made["d_rope"], strict=True)
    ]
    usual_init, size, split = (
        made["init"] == "activation", made["d_c"] == D_C, made["d_rope"] == D_ROPE,
    )  # fmt: skip
    made["d_c_"], made["split_"] = usual_init & split, usual_init & size
    return made.assign(init_=size & split, all_=True)


def correlations(runs: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations of :func:`predicted` runs, by ``predictor, quality, scope``.

    ``rho`` with its bootstrap interval ``low, high`` over the ``configs`` configurations;
    ``gain``, how much larger it is than that of :data:`NULL` over the same runs (in the direction
    of :data:`EXPECTED`), with its interval ``gain_low, gain_high`` from the same resamples; NaN
    where d_c is the same for all.
    """
    rows: list[dict[str, Any]] = []
    for predictor in PREDICTORS:
        for quality, expected in EXPECTED.items():
            for scope in SCOPES:
                mine = runs[runs[f"{scope}_"]].dropna(subset=[predictor, quality])
                if mine["config"].nunique() < 3:
                    continue
                reached, groups = mine[quality].to_numpy(float), list(mine["config"])
                rho, draws = spearman(mine[predictor].to_numpy(float), reached, groups)
                null, null_draws = spearman(mine[NULL].to_numpy(float), reached, groups)
                low, high = percentiles(draws)
                gain_low, gain_high = percentiles(expected * (draws - null_draws))
                rows.append(
                    {"predictor": predictor, "quality": quality, "scope": scope, "rho": rho,
                     "low": low, "high": high, "configs": len(set(groups)),
                     "gain": expected * (rho - null), "gain_low": gain_low, "gain_high": gain_high}
                )  # fmt: skip
    columns = ["predictor", "quality", "scope", "rho", "low", "high", "configs", "gain",
               "gain_low", "gain_high"]  # fmt: skip
    return round_significant(pd.DataFrame(rows, columns=columns))
