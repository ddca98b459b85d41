"""Does one node of a plan in a folder of its own; a folder with ``done.json`` is finished.

Run by the store as a process of its own: ``python -m mla_study.miniature.work``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.config import LatentConfig, from_dict, mini
from mla_study.errors import EXIT_BAD_INPUT, UserError
from mla_study.miniature.judge import Trial, judge
from mla_study.miniature.store import DONE, FRAMES, MODEL, VIDEOS
from mla_study.study.runs import atomic_write, code_hash, file_sha256, parquet_bytes

if TYPE_CHECKING:
    from mla_study.miniature.watch import Compared
    from mla_study.model.transformer import WanTransformer
    from mla_study.training.data.world_data import WorldData

SHOWN = 6
"""Videos of a trial whose frames are kept."""
_CALIBRATION = 64
MODULES = ("mla_study.miniature.work",)


@dataclass(frozen=True)
class Task:
    """A node to do: where, and where what it needs was done.

    Attributes:
        teacher: the shipped teacher's file, for the node that takes it.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    folder: Path
    needs: Mapping[str, Path]
    about: Mapping[str, Any]
    teacher: Path | None
    codec: Path


def do(task: Task) -> None:
    """Do the node, or go on with it.

    Raises:
        UserError: what it is made from is missing or not what the plan says.
    """
    import torch

    torch.set_num_threads(1)
    task.folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    _KINDS[task.kind](task)
    done = {
        "name": task.name,
        "about": dict(task.about),
        "cpu_s": round(time.process_time() - began, 2),
        "code": code_hash(*MODULES),
    }
    atomic_write(task.folder / DONE, (json.dumps(done, indent=1) + "\n").encode())


def data(seed: int, codec: Path) -> WorldData:
    """Clips of the world for a run's seed."""
    from mla_study.training.data.world_data import WorldData
    from mla_study.world.codec import load_codec
    from mla_study.world.text import CaptionEncoder

    held = load_codec(codec)
    return WorldData(held.world, held, CaptionEncoder.of(mini()), seed)


def _load(folder: Path) -> WanTransformer:
    import torch

    from mla_study.checkpoints.wan.load import load_model

    return load_model(folder / MODEL, dtype=torch.float32)


def _teacher(task: Task) -> None:
    if "sha256" in task.settings:
        found = task.teacher
        if found is None or file_sha256(found) != task.settings["sha256"]:
            raise UserError("the shipped teacher is missing or another than was planned")
        shutil.copyfile(found, task.folder / MODEL)
        return
    from mla_study.training.start import fresh_model

    stage = _stage(task)
    _train(task, stage, fresh_model(mini(), stage.seed), None)


def _untrained(task: Task) -> None:
    from mla_study.checkpoints.wan.save import save_model
    from mla_study.training.start import fresh_model

    seed = 1000 + int(task.settings["seed"])
    save_model(fresh_model(mini(), seed), task.folder / MODEL, "latent", overwrite=True)


def _convert(task: Task) -> None:
    from safetensors.torch import save_file

    from mla_study.model.latentize import Options, latentize

    source = task.needs["teacher"] / MODEL
    latent = from_dict(task.settings["latent"], LatentConfig)
    clips = task.folder / "calibration.safetensors"
    seed = int(task.settings["seed"])
    batch = data(seed, task.codec).batch(range(10**9, 10**9 + _CALIBRATION))
    assert batch.latents is not None
    save_file({"latents": batch.latents.contiguous(), "context": batch.context}, clips)
    target = task.folder / "converted"
    shutil.rmtree(target, ignore_errors=True)
    options = Options(latent, init=task.settings["init"], seed=seed, samples=_CALIBRATION - 2)
    latentize(source, target, options, latents=clips)
    from mla_study.checkpoints.wan.load import load_model
    from mla_study.checkpoints.wan.save import save_model

    save_model(load_model(target), task.folder / MODEL, "latent", overwrite=True)


def _stage(task: Task) -> Any:
    from mla_study.training.recipe import Stage

    return from_dict(task.settings["stage"], Stage)


def _train(task: Task, stage: Any, start: WanTransformer, teacher: WanTransformer | None) -> None:
    from mla_study.miniature.watch import Watch
    from mla_study.training.loop import Run, Trainer
    from mla_study.training.ranks import ranks

    clips = data(stage.seed, task.codec)
    observe = tuple(task.settings.get("observe", ()))
    with ranks("cpu", stage.precision) as alone:
        run = Run(
            stage,
            task.folder,
            start,
            clips,
            teacher,
            observers=(Watch(clips, start.config, _compared(task)),) if observe else (),
            observe_at=observe,
            inputs={
                role: file_sha256(task.needs[role] / MODEL)
                for role in ("start", "teacher")
                if role in task.needs
            },
        )
        Trainer(run, alone, progress=False).train()


def _compared(task: Task) -> Compared | None:
    from safetensors.torch import load_file

    from mla_study.miniature.watch import Compared

    if "untrained" not in task.needs:
        return None
    states = {role: load_file(folder / MODEL) for role, folder in task.needs.items()}
    others = {n.removeprefix("other."): s for n, s in states.items() if n.startswith("other.")}
    return Compared(states["origin"], states["source"], states["untrained"], others)


def _student(task: Task) -> None:
    start = _load(task.needs["start"])
    teacher = _load(task.needs["teacher"]) if "teacher" in task.needs else None
    _train(task, _stage(task), start, teacher)


def _judge(task: Task) -> None:
    import pandas as pd
    import torch
    from safetensors.torch import save_file

    from mla_study.world.codec import load_codec

    trial = from_dict(task.settings["trial"], Trial)
    bidirectional = task.about.get("stage") == "teacher"
    model, codec = _load(task.needs["model"]).eval(), load_codec(task.codec)
    kept: list[torch.Tensor] = []
    rows = judge(model, codec, trial, bidirectional, kept.append)
    shown = torch.cat(kept)[:SHOWN]
    pixels = shown.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
    atomic_write(task.folder / FRAMES, lambda path: save_file({"frames": pixels}, path))
    atomic_write(task.folder / VIDEOS, parquet_bytes(pd.DataFrame(rows)))


_KINDS = {
    "teacher": _teacher,
    "untrained": _untrained,
    "convert": _convert,
    "train": _student,
    "judge": _judge,
}


def main() -> int:
    """Do the task that comes as a line of JSON on standard input; end when that closes."""
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_until_closed, daemon=True).start()
    task = Task(
        told["name"],
        told["kind"],
        told["settings"],
        Path(told["folder"]),
        {role: Path(folder) for role, folder in told["needs"].items()},
        told["about"],
        None if told["teacher"] is None else Path(told["teacher"]),
        Path(told["codec"]),
    )
    try:
        do(task)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _until_closed() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
