"""``mla-study plan``: how many streams so many GPUs serve, by layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mla_study.evaluation.efficiency.plan import Plan as Made


@dataclass(frozen=True)
class Plan:
    """Memory, frames a second and streams in real time for each layout, from the cost model.

    Modelled, not measured: every assumption is printed below the table.

    Example: mla-study plan --gpus 8 --viewers 100 --device H100
    """

    gpus: int = 1
    """GPUs at hand."""
    viewers: int = 1
    """Streams at the same time."""
    seconds: float = 60.0
    """Length of a stream's video."""
    device: str = "H100"
    """A100, L40S, RTX4090, RTX5090, H100, H200, B200; or a calibration file (.json) of
    mla-study calibrate."""
    window: str | None = None
    """sink,history,chunk in latent frames, such as 1,6,3 (default: the model's)."""
    preset: str = "wan-1.3b"
    """wan-1.3b, wan-14b or mini."""
    d_c: int | None = None
    """Latent dimension in place of the preset's."""
    achieved: float | None = None
    """Share of the device's rates that is reached, in (0, 1]."""
    memory: float | None = None
    """GB of a GPU in place of the data sheet's."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights and arithmetic."""
    fps: float | None = None
    """Frames a second of the video (default: the model's, 16 for Wan)."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Plan and print."""
        from mla_study.config import parse_window, preset
        from mla_study.evaluation.efficiency.devices import device
        from mla_study.evaluation.efficiency.memory import with_latent_dim
        from mla_study.evaluation.efficiency.plan import plan

        config = preset(self.preset, latent=True)
        if self.d_c is not None:
            config = with_latent_dim(config, self.d_c)
        if self.fps is not None:
            config = replace(config, fps=self.fps)
        made = plan(
            config,
            device(self.device, self.achieved, self.dtype, self.memory),
            gpus=self.gpus,
            viewers=self.viewers,
            seconds=self.seconds,
            window=None if self.window is None else parse_window(self.window),
        )
        print(json.dumps(made.plain(), indent=1) if self.json else _text(made, self))
        return 0


def _text(made: Made, given: Plan) -> str:
    heads: tuple[str, ...] = (
        "layout", "GB a stream", "fit", "TF a chunk", "FPS bound", "FPS alone", "chunk s",
        "real time", "FPS all", f"GPUs for {given.viewers}", f"served by {given.gpus}",
        "GPU s a video",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [heads]
    for row in made.rows:
        bound = "-" if row.bound_fps is None else f"{row.bound_fps:.1f}"
        need = "none" if row.gpus_needed is None else str(row.gpus_needed)
        rows.append(
            (
                row.name, f"{row.slope_gb:.3f}", str(row.fits), f"{row.tflop_chunk:.1f}", bound,
                f"{row.fps:.1f}", f"{row.latency_s:.3f}", str(row.real_time), f"{row.fps_all:.1f}",
                need, str(row.viewers_served), f"{row.clip_gpu_s:.1f}",
            )
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    told = [f"  {line}" for line in made.assumptions]
    return "\n".join([*lines, "", "modelled, under these assumptions:", *told])
