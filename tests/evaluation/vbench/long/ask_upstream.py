"""Run by VBench's own interpreter: what upstream's code makes of a request on standard input.

``FOLDER_OF_THE_WORKER < REQUEST.json > ANSWER.json``; a request is {"task": ..., ...} and each
function below is a task.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def worker(module: str) -> Any:
    """A module of the worker, whose folder stays off the path."""
    spec = importlib.util.spec_from_file_location(module, Path(sys.argv[1]) / f"{module}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def averages(cases: list[dict[str, Any]]) -> list[Any]:
    """[overall, scores] of upstream's reorganize and fuse; the error's name where it stops."""
    from vbench2_beta_long.utils import fuse_inclip_clip2clip, reorganize_clips_results

    told = []
    for case in cases:
        try:
            overall, _, items = reorganize_clips_results(case["clips"], case["dimension"])
            if case["fuse"]:
                # VBench's own mean over the clips takes the place of reorganize's
                overall, items = fuse_inclip_clip2clip(
                    case["vbench"], case["pairs_mean"], items, case["pairs"], case["dimension"],
                    **case["options"],
                )  # fmt: skip
            told.append(
                [overall, [item["video_results"] for item in items if "video_path" in item]]
            )
        except ZeroDivisionError as error:
            told.append(type(error).__name__)
    return told


def interpolated(points: list[list[float]]) -> list[float]:
    from vbench2_beta_long.utils import linear_interpolate

    return [linear_interpolate(*point) for point in points]


def found(folder: str, info: str, dimension: str, samples: int) -> list[str]:
    """Clips that the standard mode takes for a dimension."""
    from vbench.utils import load_dimension_info
    from vbench2_beta_long import VBenchLong

    listed = os.listdir
    os.listdir = lambda *where: sorted(listed(*where))  # upstream takes the first one's ending
    asked = VBenchLong("cpu", info, str(Path(info).parent / "out"))
    made = asked.build_full_info_json(
        folder, "found", [dimension], mode="long_vbench_standard", num_of_samples_per_prompt=samples
    )
    paths, _ = load_dimension_info(made, dimension, "en")
    return sorted(Path(path).stem for path in paths)


def lengths(names: list[str], info: list[Any], seconds: dict[str, float]) -> list[float]:
    from vbench2_beta_long.utils import get_duration_from_json

    return [get_duration_from_json(name, info, seconds) for name in names]


def clips(path: str, **asked: Any) -> dict[str, Any]:
    """The worker's clips, with what upstream's reader and scorer say of them."""
    import numpy as np
    from decord import VideoReader
    from vbench.temporal_flickering import cal_score

    operation = worker("long_ops").OPERATIONS["long.split"]({})
    try:
        answer = operation({"id": "0", "path": path, "name": Path(path).name, **asked})
    except ValueError as error:
        return {"reason": str(error)}
    source = VideoReader(path, num_threads=1)
    rate = source.get_avg_fps()
    for clip in answer["more"]["clips"]:
        reader = VideoReader(clip["path"], num_threads=1)
        begin = round(clip["start_s"] * rate)
        clip["written"] = Path(clip["path"]).stat().st_mtime_ns
        own = reader.get_batch(range(len(reader))).asnumpy().astype(int)
        gap = np.abs(own - source.get_batch(range(begin, begin + len(own))).asnumpy())
        clip |= {"read": len(reader), "fps": reader.get_avg_fps(), "score": cal_score(clip["path"])}
        clip |= {"largest": int(gap.max()), "mean_gap": float(gap.mean())}
    return answer


def joined(clips: list[str], out: str, fps: float, exact: bool) -> dict[str, Any]:
    """The worker's video of first frames: how far it is from the clips' own, and upstream's."""
    import numpy as np
    from decord import VideoReader
    from vbench2_beta_long.utils import create_video_from_first_frames

    operation = worker("long_ops").OPERATIONS["long.first_frames"]({})
    answer = operation({"id": "0", "path": clips[0], "clips": clips, "out": out, "fps": fps,
                        "exact": exact})  # fmt: skip
    firsts = np.stack([VideoReader(clip)[0].asnumpy() for clip in clips]).astype(int)
    reader = VideoReader(out)
    own = reader.get_batch(range(len(reader))).asnumpy().astype(int)
    theirs = Path(out).parent / "theirs"
    theirs.mkdir(exist_ok=True)
    create_video_from_first_frames(
        str(Path(clips[0]).parents[1]), str(theirs), [{"video_path": clip} for clip in clips]
    )
    (made,) = theirs.iterdir()
    other = VideoReader(str(made)).get_batch(range(len(own))).asnumpy()
    gaps = {"from_clips": own - firsts, "from_upstream": own - other}
    return {**answer, **{name: int(np.abs(gap).max()) for name, gap in gaps.items()}}


def compared(dimension: str, dev: bool, weights: str, path: str, stand_in: bool) -> dict[str, Any]:
    """Clip-to-clip score on the CPU, if need be with a stand-in for DreamSim's 1 GB."""
    devices = []
    if stand_in:
        import dreamsim
        import torch

        class Mean(torch.nn.Module):
            def embed(self, images: Any) -> Any:
                return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

        def load(**options: Any) -> Any:
            devices.append(str(options["device"]))
            return Mean(), None

        dreamsim.dreamsim = load
    operation = worker("long_features").OPERATIONS[f"long.clip2clip.{dimension}"]
    request = {
        "scorer": f"long.clip2clip.{dimension}", "options": {"dev": dev}, "device": "cpu",
        "weights": weights,
    }  # fmt: skip
    try:
        return {**operation(request)({"id": "0", "path": path}), "devices": devices}
    except ValueError as error:
        return {"reason": str(error)}


def main() -> None:
    requests = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answers = [globals()[request.pop("task")](**request) for request in requests]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
