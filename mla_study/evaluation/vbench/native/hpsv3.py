"""HPSv3 (Ma et al., ICCV 2025) of a video: mean human-preference score of frames and prompt.

The score is the model's mean (its first output); its deviation is not used. Frames: 8, evenly. The
package ``hpsv3`` 1.0.0 pins transformers 4.45.2, which does not go with ours: install it in an
environment of its own, together with this project's ``video`` extra, and name that environment's
interpreter by ``MLA_STUDY_HPSV3_PYTHON``; the worker then goes on in it.

Nothing is fetched: the checkpoint lies in ``hpsv3/`` of the weights folder, and the model that it
is built on in ``hpsv3/Qwen2-VL-7B-Instruct/`` there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mla_study.errors import UserError
from mla_study.evaluation.vbench.native.scoring import Job, Score

INTERPRETER = "MLA_STUDY_HPSV3_PYTHON"
CHECKPOINT = "hpsv3/HPSv3.safetensors"
BASE = "hpsv3/Qwen2-VL-7B-Instruct"
FRAMES = 8


class Hpsv3:
    """The scorer.

    Raises:
        UserError: the package, the checkpoint or the base model is absent.
    """

    def __init__(self, job: Job) -> None:
        self.frames = job.count("frames", FRAMES)
        checkpoint, base = preflight(job)
        self._model = _inferencer(checkpoint, base, job.device)
        self.versions: Mapping[str, str] = {"hpsv3": metadata.version("hpsv3")}

    def score(self, path: Path, prompt: str) -> Score:
        """Mean score of a video's frames. UserError: there is no prompt."""
        from PIL import Image

        from mla_study.evaluation.vbench.native.frames import sampled

        if not prompt.strip():
            raise UserError("HPSv3 compares with the prompt, and the video has none")
        values: list[float] = []
        for frame in sampled(path, self.frames):
            told = self._model.reward([Image.fromarray(frame)], [prompt])
            values.append(float(told[0][0]))
        return Score(
            sum(values) / len(values),
            len(values),
            {"direction": "higher is better", "model": "HPSv3", "highest": max(values)},
        )


def preflight(job: Job) -> tuple[Path, Path]:
    """The checkpoint and the base model, once all that is needed is there.

    Raises:
        UserError: what is absent, how large it is, where to get it and where to put it.
    """
    if importlib.util.find_spec("hpsv3") is None:
        raise UserError(
            f"HPSv3 needs the package hpsv3 1.0.0 in an environment of its own (it pins "
            f"transformers 4.45.2), named by {INTERPRETER}, and its checkpoint "
            f"HPSv3.safetensors (about 17 GB, MizzenAI/HPSv3 of the Hugging Face hub) at "
            f"{job.weights / CHECKPOINT}"
        )
    checkpoint = job.file(CHECKPOINT, "about 17 GB", "MizzenAI/HPSv3 of the Hugging Face hub")
    base = job.weights / BASE
    if not (base / "config.json").is_file():
        raise UserError(
            f"HPSv3 is built on Qwen2-VL-7B-Instruct (about 17 GB), which is missing: get "
            f"Qwen/Qwen2-VL-7B-Instruct of the Hugging Face hub, put it into {base}"
        )
    return checkpoint, base


def other_interpreter() -> str | None:
    """The interpreter to go on in, where the package is not in this one and another is named.

    Raises:
        UserError: the one named is not there.
    """
    named = os.environ.get(INTERPRETER)
    if not named or importlib.util.find_spec("hpsv3") is not None:
        return None
    if not Path(named).is_file():
        raise UserError(f"{INTERPRETER} is {named}, which is no file: name a Python interpreter")
    # an environment's interpreter is a link: resolved, it would be that of the system
    return None if Path(named).absolute() == Path(sys.executable).absolute() else named


def _inferencer(checkpoint: Path, base: Path, device: str) -> Any:
    """The package's model with the local base in place of the hub's."""
    hpsv3: Any = importlib.import_module("hpsv3")
    packaged = Path(hpsv3.__file__).parent / "config" / "HPSv3_7B.yaml"
    lines = packaged.read_text(encoding="utf-8").splitlines()
    lines = [
        f'model_name_or_path: "{base}"' if line.startswith("model_name_or_path:") else line
        for line in lines
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / packaged.name
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return hpsv3.HPSv3RewardInferencer(
            config_path=str(config), checkpoint_path=str(checkpoint), device=device
        )
