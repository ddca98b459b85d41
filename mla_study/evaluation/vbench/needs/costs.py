"""What a scorer costs: memory, and seconds on two CPU cores, both as measured on single clips.

Each time holds the loading of its model, and most were taken on 33 to 81 frames of 832 x 480, so
these are upper bounds for a run that loads once and rough ones for other sizes. What was not
measured has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mla_study.evaluation.vbench.runs.videos import files_of, passed_over

SETTING = "2 CPU cores, 832 x 480, model loading included in each video"
_LOOKED_AT = 40


@dataclass(frozen=True)
class Cost:
    """Attributes:
    gib: memory at the peak, GiB.
    frame_s: seconds a frame, where every frame is looked at.
    video_s: seconds a video, where a fixed number of its frames is.
    frames: that number.
    """

    gib: float | None = None
    frame_s: float | None = None
    video_s: float | None = None
    frames: int | None = None

    def seconds(self, videos: int, frames: float | None) -> float | None:
        """For a folder, or None where it is not known."""
        if self.video_s is not None:
            return self.video_s * videos
        if self.frame_s is not None and frames is not None:
            return self.frame_s * frames
        return None


COSTS: dict[str, Cost] = {
    "subject_consistency": Cost(1.4, frame_s=53 / 81),
    "background_consistency": Cost(2.8, frame_s=18 / 81),
    "temporal_flickering": Cost(0.8, frame_s=3.4 / 676),
    "motion_smoothness": Cost(1.6, frame_s=42 / 33),
    "aesthetic_quality": Cost(7.1, frame_s=95 / 33),
    "imaging_quality": Cost(1.8, frame_s=40 / 33),
    "object_class": Cost(2.2, video_s=100, frames=16),
    "human_action": Cost(4.4, video_s=62, frames=16),
    "scene": Cost(23.3, video_s=178, frames=16),
    "appearance_style": Cost(2.9, frame_s=13.5 / 33),
    "temporal_style": Cost(3.9, video_s=26, frames=8),
    "overall_consistency": Cost(3.9, video_s=23, frames=8),
    "dynamic_degree[raft-small]": Cost(frame_s=49 / 81),
}
"""Of real runs with VBench's own code. Scene's memory is that without gradients switched off."""


def cost_of(scorer: str) -> Cost:
    """Its cost, an empty one where nothing was measured."""
    return COSTS.get(scorer, Cost())


@dataclass(frozen=True)
class Folder:
    """Videos of a folder: how many, and their frames (None where they cannot be counted).

    Attributes:
        passed_over: a sentence on those that a run would leave out.
    """

    path: Path
    videos: int
    frames: float | None
    passed_over: str = ""


def look_into(path: Path) -> Folder:
    """Count the videos that a run would look at; frames by the headers of up to 40 of them.

    Raises:
        UserError: no such place, or one that cannot be read.
    """
    files, _ = files_of(path)
    step = max(1, -(-len(files) // _LOOKED_AT))
    counts = [count for file in files[::step] if (count := _frames(file)) is not None]
    total = sum(counts) / len(counts) * len(files) if counts else None
    return Folder(path, len(files), total, passed_over(path))


def _frames(file: Path) -> int | None:
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        return None
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            if stream.frames:
                return stream.frames
            if stream.average_rate and container.duration:
                return round(float(stream.average_rate) * container.duration / av.time_base)
    except (FFmpegError, IndexError, OSError):
        return None
    return None


def time_text(seconds: float | None) -> str:
    """``45 s``, ``12 min``, ``3.4 h``, or a dash."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
