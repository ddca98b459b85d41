"""How scores of clips change along the videos."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.evaluation.vbench.dimensions import scale_of
from mla_study.evaluation.vbench.long.clips import NAN
from mla_study.evaluation.vbench.scores import DRAWS

if TYPE_CHECKING:
    import pandas as pd


def drift(clips: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Score against time: how much of a dimension is left late in a video.

    Clips of all videos meet in bins as wide as a clip, by their middle; two of one video in a bin
    (the last clip overlaps) are averaged first, so that every video counts once.

    Args:
        clips: columns video, dimension, start_s, stop_s, value, terms.
        draws: of whole videos, with replacement, for the band.

    Returns:
        Columns dimension, seconds (mean middle of the bin's clips), mean, se, low, high (95 %),
        videos; se and band are NaN for a single video.
    """
    import pandas as pd

    told = list[dict[str, Any]]()
    for dimension in dict.fromkeys(clips["dimension"].tolist()):
        rows = clips[(clips["dimension"] == dimension) & (clips["terms"] > 0)]
        rows = rows[np.isfinite(rows["value"].to_numpy(dtype=float))]
        if rows.empty:
            continue
        start, stop = rows["start_s"].to_numpy(dtype=float), rows["stop_s"].to_numpy(dtype=float)
        middle, width = (start + stop) / 2, float(np.median(stop - start))
        names, place = np.unique(rows["video"].to_numpy(dtype=str), return_inverse=True)
        # the small share keeps 1.9999999 and 2 together
        bins, bin_of = np.unique(np.floor(middle / width + 1e-6), return_inverse=True)
        sums, terms, times = (np.zeros((len(names), len(bins))) for _ in range(3))
        weights = rows["terms"].to_numpy(dtype=float)
        np.add.at(sums, (place, bin_of), weights * rows["value"].to_numpy(dtype=float))
        np.add.at(times, (place, bin_of), weights * middle)
        np.add.at(terms, (place, bin_of), weights)
        seen = terms > 0
        safe = np.where(seen, terms, 1.0)
        scores = np.where(seen, sums / safe, 0.0) * scale_of(dimension)
        count = seen.sum(axis=0)
        mean = scores.sum(axis=0) / count
        picked = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
        for i in range(len(bins)):
            own = scores[seen[:, i], i]
            se, low, high = NAN, NAN, NAN
            if len(own) > 1:
                drawn = seen[picked, i].sum(axis=1)
                means = scores[picked, i].sum(axis=1)[drawn > 0] / drawn[drawn > 0]
                low, high = (float(x) for x in np.percentile(means, [2.5, 97.5]))
                se = float(own.std(ddof=1) / math.sqrt(len(own)))
            seconds = float((times[:, i] / safe[:, i])[seen[:, i]].mean())
            told.append(
                {
                    "dimension": dimension, "seconds": seconds, "mean": float(mean[i]), "se": se,
                    "low": low, "high": high, "videos": int(count[i]),
                }
            )  # fmt: skip
    columns = ["dimension", "seconds", "mean", "se", "low", "high", "videos"]
    return pd.DataFrame(told, columns=columns)
