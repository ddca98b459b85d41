"""Operations of VBench's long mode, run by VBench's environment: split, join first frames.

Two ways to split. The exact one calls upstream's own functions, which cut frame rates down to whole
numbers and encode every clip anew with loss. The corrected one keeps the true rate and the decoded
pictures bit for bit (lossless H.264); the rule where clips begin is the same.

:data:`OPERATIONS` holds, by name, functions from a request (REQUEST.json as a dict) to a function
from a driver's line to the answer's fields; what cannot be done is a ValueError of one sentence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

KEPT = ("yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le")
"""Pixel formats that lossless H.264 takes as they are."""
MARK = "clips.json"

Line = dict[str, Any]
Scorer = Callable[[Line], Line]


def split(
    path: str | Path, out_dir: str | Path, seconds: float, exact: bool, threshold: float = 35.0,
    semantic: bool = False, name: str | None = None,
) -> list[Line]:  # fmt: skip
    """Cut a video into clips of a length below ``out_dir/split_clip/PART``.

    The video is linked into ``out_dir`` under its name; where it lies nothing is written. A folder
    that already holds the clips of the same request is used as it is.

    Args:
        out_dir: absent, empty, or of an earlier call.
        exact: upstream's own code; otherwise true rate and lossless pictures.
        threshold: of PySceneDetect's content detector, for ``semantic``.
        semantic: split at cuts first; each scene is then a part, ``NAME-Scene-0`` and so on.
        name: file name of the video, by default that of ``path``.

    Returns:
        For each clip path, clip (file name without ending), part, start_s, stop_s (in the video, by
        its true frame rate), frames.

    Raises:
        ValueError: no readable video, clips of no frames, or a folder with other things in it.
    """
    path, out = Path(path).resolve(), Path(out_dir).absolute()
    name = name or path.name
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    rate, at = rate_of(path), path.stat()
    request = [str(path), at.st_size, at.st_mtime_ns, name, seconds, exact, semantic, threshold]
    mark = out / MARK
    if mark.is_file():
        earlier = json.loads(mark.read_text())
        if earlier["request"] == request and all(
            Path(c["path"]).is_file() for c in earlier["clips"]
        ):
            return earlier["clips"]
        _clear(out, earlier["name"])
    elif out.is_dir() and any(not file.name.startswith(MARK) for file in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no clips of ours: name another folder")
    out.mkdir(parents=True, exist_ok=True)
    # before the clips: an interrupted call leaves a folder that the next one may clear
    _write_mark(mark, {"request": None, "name": name, "clips": []})
    (out / "split_clip").mkdir(exist_ok=True)
    link = out / name
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    way = _split_exact if exact else _split_corrected
    clips = way(link, out, seconds, threshold, semantic)
    for clip in clips:
        clip["start_s"] = float(clip.pop("start") / rate)
        clip["stop_s"] = float(clip.pop("stop") / rate)
    _write_mark(mark, {"request": request, "name": name, "clips": clips})
    return clips


def first_frames(
    clips: list[str], out_file: str | Path, fps: float, exact: bool = False
) -> tuple[str | None, int]:
    """Join the first frames of a part's clips to a video: (its path, number of frames).

    Of a single clip upstream makes no video, so the path is None then.

    Args:
        clips: paths, in order.
        fps: of the video that they are from; upstream's way cuts it down to a whole number.
    """
    if len(clips) < 2:
        return None, len(clips)
    out = Path(out_file).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    if exact:
        import torch
        from vbench2_beta_long.utils import save_segment

        frames = [torch.Tensor(_reader(clip)[0].asnumpy()) for clip in clips]
        save_segment(torch.stack(frames).permute(0, 3, 1, 2), int(fps), str(out))
        return str(out), len(clips)
    rate = Fraction(fps).limit_denominator(10_000)
    with _Writer(out, rate) as writer:
        for clip in clips:
            writer.add(next(_decoded(clip)))
    return str(out), len(clips)


def rate_of(path: str | Path) -> Fraction:
    """Average frames a second, exactly."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            stream = _stream(container, path)
            rate = stream.average_rate or stream.guessed_rate
    except FFmpegError as error:
        raise ValueError(f"{Path(path).name} cannot be read as a video") from error
    if not rate:
        raise ValueError(f"{Path(path).name} does not say how many frames a second it has")
    return Fraction(rate)


def _load_split(request: Line) -> Scorer:
    def score(line: Line) -> Line:
        clips = split(
            line["path"], line["out"], line["seconds"], line["exact"],
            line.get("threshold", 35.0), line.get("semantic", False), line.get("name"),
        )  # fmt: skip
        frames, rate = _length(line["path"]), rate_of(line["path"])
        more = {"frames": frames, "fps": str(rate), "clips": clips}
        return {"value": float(len(clips)), "terms": 1, "frames": frames, "more": more}

    return score


def _load_first_frames(request: Line) -> Scorer:
    def score(line: Line) -> Line:
        path, frames = first_frames(line["clips"], line["out"], line["fps"], line["exact"])
        return {"value": float(frames), "terms": 1, "frames": frames, "more": {"path": path}}

    return score


OPERATIONS: dict[str, Callable[[Line], Scorer]] = {
    "long.split": _load_split,
    "long.first_frames": _load_first_frames,
}


def _split_exact(
    link: Path, out: Path, seconds: float, threshold: float, semantic: bool
) -> list[Line]:
    from vbench2_beta_long.utils import split_video_into_clips, split_video_into_scenes

    if link.suffix != ".mp4":
        raise ValueError(f"{link.name}: upstream's code reads .mp4 only; convert the video")
    if int(float(rate_of(link))) * int(seconds) < 1:
        raise ValueError(f"{link.name}: upstream's code makes clips of no frames of {seconds:g} s")
    parts = [(link, 0)]
    if semantic:
        scenes = out / "split_scene" / link.stem
        scenes.mkdir(parents=True, exist_ok=True)
        if split_video_into_scenes(str(link), str(scenes), threshold):
            parts, begin = [], 0
            for number in range(len(list(scenes.glob("*.mp4")))):
                scene = scenes / f"{link.stem}-Scene-{number}.mp4"
                parts.append((scene, begin))
                begin += _length(scene)
    found: list[Line] = []
    for video, begin in parts:
        folder = Path(split_video_into_clips(str(video), str(out / "split_clip"), int(seconds)))
        files = sorted(folder.iterdir(), key=lambda file: (len(file.name), file.name))
        total, before = _length(video), 0
        for file in files:
            frames = _length(file)
            # the last one was moved back
            start = total - frames if file is files[-1] else before
            before += frames
            found.append(_clip(file, begin + start, frames))
    return found


def _split_corrected(
    link: Path, out: Path, seconds: float, threshold: float, semantic: bool
) -> list[Line]:
    rate, total = rate_of(link), _length(link)
    cuts = _scenes(link, threshold) if semantic else []
    for _ in range(2):
        scenes = [(start, min(stop, total)) for start, stop in cuts] or [(0, total)]
        plan: list[tuple[Path, int, int]] = []
        for number, (begin, end) in enumerate(scenes):
            part = f"{link.stem}-Scene-{number}" if cuts else link.stem
            folder = out / "split_clip" / part
            folder.mkdir(parents=True, exist_ok=True)
            for place, (start, stop, short) in enumerate(_clips_of(end - begin, rate, seconds)):
                file = folder / (f"{part}_full.mp4" if short else f"{part}_{place:03d}.mp4")
                plan.append((file, begin + start, begin + stop))
        decoded = _write_clips(link, plan, rate)
        if decoded == total:
            return [_clip(file, start, stop - start) for file, start, stop in plan]
        # the header was wrong about the number of frames
        shutil.rmtree(out / "split_clip")
        total = decoded
    raise ValueError(f"{link.name} decodes to a different number of frames each time")


def _clips_of(frames: int, rate: Fraction, seconds: float) -> list[tuple[int, int, bool]]:
    """(start, stop, shorter than a clip): full clips, the last moved back to full length."""
    size = max(1, int(rate * Fraction(seconds).limit_denominator(10_000) + Fraction(1, 2)))
    if frames < size:
        return [(0, frames, True)]
    starts = list(range(0, frames - size + 1, size))
    if frames % size:
        starts.append(frames - size)
    return [(start, start + size, False) for start in starts]


def _scenes(path: Path, threshold: float) -> list[tuple[int, int]]:
    """(first frame, frame behind the last) of each scene; none where there is no cut."""
    from scenedetect import ContentDetector, SceneManager, open_video

    video, manager = open_video(str(path)), SceneManager()
    manager.add_detector(ContentDetector(threshold=threshold))
    manager.detect_scenes(video)
    return [(start.get_frames(), stop.get_frames()) for start, stop in manager.get_scene_list()]


def _write_clips(path: Path, plan: list[tuple[Path, int, int]], rate: Fraction) -> int:
    """Write each (file, start, stop) in one pass over the video; return how many frames it has."""
    open_now: dict[Path, _Writer] = {}
    number = 0
    try:
        for number, frame in enumerate(_decoded(path), 1):
            for file, start, stop in plan:
                if start < number <= stop:
                    if file not in open_now:
                        open_now[file] = _Writer(file, rate)
                    open_now[file].add(frame)
                    if number == stop:
                        open_now.pop(file).close()
    finally:
        for writer in open_now.values():
            writer.close()
    return number


def _decoded(path: str | Path) -> Any:
    import av

    with av.open(str(path)) as container:
        yield from container.decode(_stream(container, path))


def _stream(container: Any, path: str | Path) -> Any:
    """The video stream; among several the one that VBench's reader shows."""
    streams = list(container.streams.video)
    if not streams:
        raise ValueError(f"{Path(path).name} holds no video")
    if len(streams) == 1:
        return streams[0]
    reader = _reader(path)
    height, width = reader[0].shape[:2]
    frames, rate = len(reader), reader.get_avg_fps()
    return min(
        streams,
        key=lambda s: (
            (s.width, s.height) != (width, height),
            abs(float(s.average_rate or 0) - rate) > 1e-3,
            abs(s.frames - frames),
        ),
    )


class _Writer:
    """Lossless H.264 at a constant rate, in the pixel format and colours of its first frame."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        import av

        self.container = av.open(str(path), "w")
        self.stream = self.container.add_stream("libx264", rate=rate)
        self.stream.options = {"qp": "0", "preset": "ultrafast"}
        self.base, self.count, self.format = 1 / rate, 0, ""

    def add(self, frame: Any) -> None:
        if not self.count:
            even = frame.width % 2 == 0 and frame.height % 2 == 0
            kept = frame.format.name in KEPT and (even or "444" in frame.format.name)
            self.format = frame.format.name if kept else "yuv444p"
            context = self.stream.codec_context
            context.width, context.height = frame.width, frame.height
            context.pix_fmt, context.time_base = self.format, self.base
            context.colorspace, context.color_range = frame.colorspace, frame.color_range
        picture = frame.reformat(format=self.format) if frame.format.name != self.format else frame
        # a frame may belong to two clips, each with its own clock
        stamp, base = frame.pts, frame.time_base
        picture.pts, picture.time_base = self.count, self.base
        self.container.mux(self.stream.encode(picture))
        frame.pts, frame.time_base = stamp, base
        self.count += 1

    def close(self) -> None:
        if self.count:
            self.container.mux(self.stream.encode(None))
        self.container.close()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reader(path: str | Path) -> Any:
    from decord import DECORDError, VideoReader

    try:
        return VideoReader(str(path), num_threads=1)
    except DECORDError as error:
        raise ValueError(f"{Path(path).name} cannot be read as a video") from error


def _length(path: str | Path) -> int:
    """Frames, as VBench's own reader counts them."""
    return len(_reader(path))


def _clip(file: Path, start: int, frames: int) -> Line:
    return {
        "path": str(file), "clip": file.stem, "part": file.parent.name, "start": start,
        "stop": start + frames, "frames": frames,
    }  # fmt: skip


def _write_mark(mark: Path, content: Line) -> None:
    temporary = mark.with_name(f"{MARK}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(mark)


def _clear(out: Path, name: str) -> None:
    """Remove what an earlier call wrote, and nothing else."""
    for folder in ("split_clip", "split_scene"):
        shutil.rmtree(out / folder, ignore_errors=True)
    link = out / name
    if link.is_symlink():
        link.unlink()
