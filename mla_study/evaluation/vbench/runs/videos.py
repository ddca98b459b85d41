"""The videos of a run, each looked at before any model is loaded: what is missing is one table."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.errors import UserError, counted
from mla_study.evaluation.vbench.prompts import Told, read_table, split_name, table_beside
from mla_study.study.runs import file_sha256

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".mp4",)
"""What VBench's own readers agree on."""
OTHER = (".webm", ".webp", ".gif", ".mov", ".avi", ".mkv", ".m4v")
LEAST_FRAMES = 2
LOOK = 2
"""Of :func:`look`: what an earlier one saw of a file is not taken for what this one would see."""


@dataclass(frozen=True)
class Video:
    """One video that can be scored.

    Attributes:
        name: of its file. sha256: of its bytes.
        fps: frames a second as a fraction, such as "30000/1001".
        prompt, index, told: None where nothing is known of them.
        note: what is odd about it, but no hindrance.
    """

    path: Path
    name: str
    sha256: str
    frames: int
    fps: str
    width: int
    height: int
    prompt: str | None = None
    index: int | None = None
    told: str | None = None
    note: str = ""

    @property
    def rate(self) -> Fraction:
        return Fraction(self.fps)

    @property
    def seconds(self) -> float:
        return float(self.frames / self.rate)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be; ``fatal`` if the video cannot be scored."""

    name: str
    what: str
    fatal: bool = True


Remember = Callable[[Path], Mapping[str, Any] | None]


def files_of(place: Path) -> tuple[list[Path], list[Path]]:
    """The video files of a folder (or one file) that are looked at, and those that are passed over.

    Raises:
        UserError: no such place, or one that cannot be read.
    """
    if not place.exists():
        raise UserError(f"{place} is not there: give a folder of videos, or a video")
    if place.is_file():
        return [place], []
    try:
        listed = sorted(file for file in place.iterdir() if file.is_file())
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror})") from None
    taken, other = (
        [file for file in listed if file.suffix.lower() in suffixes]
        for suffixes in (SUFFIXES, OTHER)
    )
    return taken, other


def passed_over(place: Path) -> str:
    """A sentence on the videos of a folder that are of no format that is read; '' without any."""
    _, other = files_of(place)
    if not other:
        return ""
    more = f" and {len(other) - 1} more are" if len(other) > 1 else " is"
    return f"{other[0].name}{more} left out: only .mp4 is read, convert what should count"


def find(place: Path, prompts: Path | None = None) -> dict[Path, Told | None]:
    """The video files of a folder (or one file), with what a table or their names say.

    Args:
        prompts: table of prompts; by default ``prompts.csv`` or ``prompts.jsonl`` in the folder,
            and without one the names.

    Raises:
        UserError: no such place, no video, or a table that names files that are not there.
    """
    files, other = files_of(place)
    if not files:
        hint = f" ({other[0].name} must be converted first)" if other else ""
        raise UserError(f"{place} holds no .mp4 video{hint}: VBench reads nothing else well")
    if prompts is None and place.is_dir():
        prompts = table_beside(place)
    if prompts is None:
        return {file: split_name(file.name) for file in files}
    table = read_table(prompts)
    there = {file.name for file in files}
    lost = [name for name in table if name not in there]
    if lost and place.is_dir():
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"{prompts} names {lost[0]}{more}, which {place} does not hold")
    return {file: table.get(file.name) for file in files}


def look(path: Path) -> dict[str, Any]:
    """Frames, rate, size and hash of a file; every frame is decoded once (2 to 5 ms each at 480p).

    Nothing less will do: readers stop at the first damaged frame, go on with the last good one, or
    paint over what they cannot read, and none tells.

    Returns:
        ``sha256, frames, fps, width, height, note`` or ``problem`` with a sentence.
    """
    import av
    from av.error import FFmpegError

    sizes, errors, corrupt, decoded = dict[tuple[int, int], None](), list[str](), 0, 0
    times, packets, hidden = list[int](), 0, 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return {"problem": "has no picture, only sound"}
            streams, stream = len(container.streams.video), container.streams.video[0]
            promised, rate = stream.frames, stream.average_rate
            # with more, the mark of a frame that was painted over gets lost
            stream.codec_context.thread_count = 1
            for packet in container.demux(stream):
                if packet.size:
                    packets += 1
                    hidden += packet.is_discard
                if packet.size and packet.pts is not None and not packet.is_discard:
                    times.append(packet.pts)
                try:
                    for frame in packet.decode():
                        decoded += 1
                        corrupt += frame.is_corrupt
                        sizes[frame.width, frame.height] = None
                except FFmpegError as error:
                    errors.append(str(error))
    except (FFmpegError, OSError, ValueError, IndexError) as error:
        return {"problem": f"does not decode ({error})"}
    shown = packets - hidden
    if packets < LEAST_FRAMES:
        return {"problem": f"holds {counted(packets, 'frame')}, 2 are the least"}
    if promised > packets:
        return {"problem": f"is cut off: {packets} of {promised} frames are there"}
    if decoded < max(shown, LEAST_FRAMES) or errors or corrupt:
        what = f" ({errors[0]})" if errors else ""
        return {"problem": f"is damaged: {decoded - corrupt} of {shown} frames decode{what}"}
    if len(sizes) > 1:
        return {"problem": "changes its size on the way"}
    if not rate:
        return {"problem": "has no frame rate"}
    ((width, height),) = sizes
    notes = _odd(times, hidden, streams, width, height)
    return {
        "sha256": file_sha256(path), "frames": decoded, "fps": str(Fraction(rate)),
        "width": width, "height": height, "note": "; ".join(notes),
    }  # fmt: skip


def _odd(times: list[int], hidden: int, streams: int, width: int, height: int) -> list[str]:
    """What is odd about a video that decodes well."""
    times.sort()
    steps = {later - sooner for sooner, later in itertools.pairwise(times)}
    notes = list[str]()
    if len(steps) > 1 and max(steps) - min(steps) > 1:
        notes.append("frames are not evenly spaced in time, scores take them as if they were")
    if hidden:
        notes.append(f"an edit list hides {hidden} frames, which some of VBench's readers show")
    if streams > 1:
        notes.append(f"{streams} video streams, and VBench's readers do not take the same one")
    if width % 2 or height % 2:
        notes.append(f"odd size {width} x {height}")
    return notes


def examine(
    found: Mapping[Path, Told | None], remembered: Remember | None = None,
    remember: Callable[[Path, Mapping[str, Any]], None] | None = None, workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Video], list[Problem]]:  # fmt: skip
    """Look at every video; those that can be scored, and what is wrong with the others.

    Args:
        remembered: what was seen of a file that has not changed since, or None.
        remember: called with what was seen now, from this thread.
        workers: threads (default: one a core).
    """
    facts = {path: remembered(path) if remembered else None for path in found}
    new = [path for path, known in facts.items() if known is None]
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for count, (path, seen) in enumerate(zip(new, pool.map(look, new), strict=True), 1):
            facts[path] = seen
            if remember is not None and "problem" not in seen:
                remember(path, seen)
            if progress is not None:
                progress(count)
    videos, problems = list[Video](), list[Problem]()
    for path, told in found.items():
        seen = facts[path]
        assert seen is not None
        if "problem" in seen:
            problems.append(Problem(path.name, str(seen["problem"])))
            continue
        video = Video(path, path.name, **seen)
        if told is not None:
            video = replace(video, **asdict(told))
        if video.note:
            problems.append(Problem(video.name, video.note, fatal=False))
        videos.append(video)
    return videos, problems


def problem_table(problems: Iterable[Problem]) -> pd.DataFrame:
    """Problems as a table ``name, what, fatal``."""
    import pandas as pd

    return pd.DataFrame(
        [asdict(problem) for problem in problems], columns=["name", "what", "fatal"]
    )
