"""How well the parser reads: clips whose captions are known, as they are and damaged.

Shapes: B clips, F frames, H = W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.world.codec import Codec, fit_codec, psnr_db
from mla_study.world.grammar import SLOTS
from mla_study.world.render import render, scenery
from mla_study.world.scenes import World, sample_scenes
from mla_study.world.score import score

if TYPE_CHECKING:
    import pandas as pd

Damage = Callable[[Float[Tensor, "B 3 F H W"], torch.Generator], Float[Tensor, "B 3 F H W"]]

CONDITIONS = ("clean", "codec", "noise_0.05", "noise_0.1", "blur_0.7", "blur_1", "codec_noise_0.05")
EMPTY = ("empty", "empty_noise_0.1", "noise_only", "grey")
SIZES = (24, 32, 64)
UNITS = {
    "size": "pixels",
    "psnr": "dB against the clean clip",
    "accuracy": "share of clips",
    "se": "binomial standard error",
    "lower": "lower end of the 95 % Wilson interval",
    "iou": "mean over clips",
    "velocity_error": "pixels a frame, at the world's own size",
    "phase_error": "pixels",
    "sprite_found": "share of clips",
}
_PIECE = 64


@dataclass(frozen=True)
class CheckConfig:
    """What is checked: sizes, clips a condition, frames a clip."""

    sizes: tuple[int, ...] = SIZES
    clips: int = 512
    frames: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise UserError(f"--clips is {self.clips}, but it must be at least 1")


def damage(name: str, codec: Codec) -> Damage:
    """What a condition does to clips in [-1, 1]; noise and blur are told in shares of [0, 1]
    and in pixels.

    Raises:
        UserError: a condition that is not known.
    """
    kind, _, amount = name.rpartition("_")
    if name in ("clean", "empty"):
        return lambda video, rng: video
    if name == "codec":
        return lambda video, rng: codec.decode(codec.encode(video))
    if name == "noise_only":
        return lambda video, rng: 2 * _uniform(video, rng) - 1
    if name == "grey":
        return lambda video, rng: torch.zeros_like(video)
    if kind == "blur":
        return lambda video, rng: blurred(video, float(amount))
    if kind in ("noise", "empty_noise"):
        return lambda video, rng: video + 2 * float(amount) * _normal(video, rng)
    if kind == "codec_noise":
        return lambda video, rng: (
            codec.decode(codec.encode(video)) + 2 * float(amount) * _normal(video, rng)
        )
    raise UserError(f"there is no condition '{name}': give {', '.join(CONDITIONS + EMPTY)}")


def _normal(video: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(video.shape, generator=rng)


def _uniform(video: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(video.shape, generator=rng)


def blurred(video: Float[Tensor, "B 3 F H W"], sigma: float) -> Float[Tensor, "B 3 F H W"]:
    """Gaussian blur of ``sigma`` pixels on the torus."""
    height, width = video.shape[3:]
    waves = torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()
    soft = torch.exp(-2 * (math.pi * sigma) ** 2 * waves)
    return torch.fft.irfft2(torch.fft.rfft2(video) * soft, s=(height, width))


def check_condition(world: World, codec: Codec, name: str, clips: int, seed: int) -> dict[str, Any]:
    """One row: the shares of clips that are read right, and what was measured on them."""
    act, empty = damage(name, codec), name in EMPTY
    rng = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Tensor]] = []
    squares: list[float] = []
    for first in range(0, clips, _PIECE):
        count = min(_PIECE, clips - first)
        scenes = sample_scenes(world, count, seed, first)
        clean = _backgrounds(world, first, count) if empty else render(scenes)
        video = act(clean, rng)
        squares += [10 ** (-psnr_db(video, clean) / 10)] * count
        scores = score(video, scenes.captions, world, None if empty else scenes, signed=True)
        rows.append(
            {
                **scores.correct,
                "all_correct": scores.all_correct,
                "sprite_found": scores.has_sprite,
                "iou": scores.iou,
                "velocity_error": scores.velocity_error,
                "phase_error": scores.phase_error.nanmean(1),
            }
        )
    joined = {key: torch.cat([row[key] for row in rows]).float() for key in rows[0]}
    mean = {key: float(values.nanmean()) for key, values in joined.items()}
    found = mean.pop("sprite_found")
    right = 1 - found if empty else mean["all_correct"]
    told = {key: math.nan if empty else value for key, value in mean.items()}
    return {
        "size": world.size,
        "frames": world.frames,
        "condition": name,
        "clips": clips,
        "psnr": math.nan if empty or name == "clean" else -10 * math.log10(sum(squares) / clips),
        "accuracy": right,
        "se": math.sqrt(right * (1 - right) / clips),
        "lower": wilson(right, clips),
        "sprite_found": found,
        **{key: told[key] for key in (*SLOTS, "iou", "velocity_error", "phase_error")},
    }


def _backgrounds(world: World, first: int, count: int) -> Float[Tensor, "B 3 F H W"]:
    """Clips without a sprite, each background in turn."""
    made = scenery(world, world.frames, 0, torch.device("cpu"))
    turn = torch.arange(first, first + count) % len(made)
    return made[turn] * 2 - 1


def wilson(share: float, count: int, z: float = 1.96) -> float:
    """Lower end of the Wilson interval of a share."""
    middle = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, (middle - half) / (1 + z**2 / count))


def check_rows(config: CheckConfig) -> Iterator[dict[str, Any]]:
    """Rows of all sizes and conditions, as they are measured."""
    for size in config.sizes:
        world = World(size, config.frames)
        codec = fit_codec(world, seed=config.seed + 1)
        for name in (*CONDITIONS, *EMPTY):
            yield check_condition(world, codec, name, config.clips, config.seed)


def render_ms(world: World, clips: int = 16, repeats: int = 20) -> float:
    """Milliseconds to draw and render a batch, the median of several."""
    spent: list[float] = []
    for step in range(repeats):
        before = time.perf_counter()
        render(sample_scenes(world, clips, 0, step))
        spent.append(1000 * (time.perf_counter() - before))
    return sorted(spent)[repeats // 2]


def row_text(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    share = f"{row['accuracy']:.4f} +- {row['se']:.4f} (95 % above {row['lower']:.3f})"
    if row["condition"] in EMPTY:
        return f"{row['size']:>3} px  {row['condition']:<17} no sprite   {share}"
    psnr = "" if math.isnan(row["psnr"]) else f"  {row['psnr']:.1f} dB"
    return (
        f"{row['size']:>3} px  {row['condition']:<17} all correct {share}  IoU {row['iou']:.3f}  "
        f"position {row['phase_error']:.3f} px{psnr}"
    )


def check_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a tidy table, rounded to what is reproducible."""
    import pandas as pd

    from mla_study.study.runs import round_significant

    return round_significant(pd.DataFrame(list(rows)), 4)


def write_check(
    rows: Sequence[dict[str, Any]], config: CheckConfig, milliseconds: float, folder: Path
) -> None:
    """Write the table with its provenance.

    Raises:
        UserError: the folder cannot be written.
    """
    from mla_study.study.runs import write_result

    write_result(
        folder,
        {"table": check_table(rows)},
        config=config,
        inputs={},
        seed=config.seed,
        modules=["mla_study.world.check"],
        provenance="measured",
        validity="full",
        units=UNITS,
        notes=["accuracy: all seven facts right, or, on clips without a sprite, none found"],
        observed={"render_ms_16_clips_24px": milliseconds},
    )
