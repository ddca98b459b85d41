from pathlib import Path

import numpy as np
import pytest
import torch
from training.clips import levels, write_video

from mla_study.rollout.clips import fitted, read_clip


def greys(path: Path, limit: int | None = None, fps: float | None = None) -> np.ndarray:
    pieces = [piece[0] for piece in read_clip(path, limit, 3, fps)]
    return torch.cat(pieces).float().mean(dim=(1, 2, 3)).numpy()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])  # mkv rounds its times to milliseconds
@pytest.mark.parametrize("fps", [24, 8, 11.5, 48])
def test_frames_are_the_nearest_in_time(tmp_path: Path, suffix: str, fps: float) -> None:
    path = write_video(tmp_path / f"a.{suffix}", frames=15, fps=24)
    made = greys(path, fps=fps)
    moments = np.arange(len(made)) / fps
    shown = (made - 20) / 12  # in frames
    # half a frame, the milliseconds, and what the coding changes
    assert np.abs(shown - moments * 24).max() <= 0.5 + 0.024 + 0.1
    assert abs(len(made) - 15 * fps / 24) <= 1
    if fps == 24:
        np.testing.assert_allclose(made, levels(15), atol=1.2)
    assert len(greys(path, limit=4, fps=fps)) == 4


def test_bicubic_fitting_stays_in_range_and_in_the_middle() -> None:
    frames = torch.zeros(1, 2, 31, 64, 3, dtype=torch.uint8)
    frames[:, :, :, 32:] = 255
    made = fitted(frames, (15, 15), "bicubic")
    assert made.shape == (1, 3, 2, 15, 15)
    assert float(made.min()) == -1 and float(made.max()) == 1
    # the step stays in the middle of the crop
    torch.testing.assert_close(made.mean(), torch.tensor(0.0), atol=0.1, rtol=0)
    assert not torch.equal(made, fitted(frames, (15, 15)))
