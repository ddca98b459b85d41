"""Which videos which scorer is asked about, and what identifies the answer."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import (
    DIMENSIONS,
    EXTRAS,
    SAMPLES,
    SCORERS,
    SUBSTITUTES,
    VERSION,
    choose,
    is_free,
)
from mla_study.evaluation.vbench.native import MODULES
from mla_study.evaluation.vbench.needs import environment, weights
from mla_study.evaluation.vbench.prompts import Entry
from mla_study.evaluation.vbench.runs.drive import SCHEMA, Job, Launch
from mla_study.evaluation.vbench.runs.store import Key
from mla_study.evaluation.vbench.runs.videos import Video
from mla_study.study.runs import code_hash, json_sha256

Mode = Literal["short", "long", "custom"]
STATIC_FILTER = "static_filter"
NATIVE_MODULE = "mla_study.evaluation.vbench.native"


@dataclass(frozen=True)
class Place:
    """Where scorers find what they need: VBench's environment, weights, detectron2.

    Attributes:
        environment: None where only scorers of our own environment are asked for.
        trust: take weights whose hash nobody published.
    """

    weights: Path
    environment: environment.Environment | None
    detectron2: Path | None = None
    trust: bool = False


@dataclass(frozen=True)
class Question:
    """One video for one scorer."""

    scorer: str
    video: Video
    key: Key
    job: Job


@dataclass
class Plan:
    """All questions of a run, and the hashes of the weights that answer them."""

    questions: list[Question] = field(default_factory=list[Question])
    weights: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    random: bool = False


def base_of(scorer: str) -> str:
    """The dimension that a scorer is, or stands in for; extras are their own."""
    return SUBSTITUTES.get(scorer, scorer)


def scorers_for(mode: Mode, names: Sequence[str]) -> tuple[str, ...]:
    """The scorers that are asked for by name or group in this mode.

    Raises:
        UserError: unknown, or needs what the mode does not have.
    """
    if mode == "short":
        return choose(names)
    allowed = [s for s in SCORERS if is_free(s) or mode == "long" or s in EXTRAS]
    return choose(names, allowed)


def subjects(
    scorer: str, mode: Mode, videos: Iterable[Video], suite: Mapping[str, Entry]
) -> list[Video]:
    """The videos that a scorer looks at: those of its prompts, or in custom mode all."""
    wanted = base_of(scorer)
    if mode == "custom" or wanted not in DIMENSIONS or not suite:
        return [video for video in videos if video.prompt is not None or takes_any(scorer)]
    return [
        video
        for video in videos
        if (entry := suite.get(video.prompt or "")) and wanted in entry.dimensions
    ]


def takes_any(scorer: str) -> bool:
    """Whether it looks at a video of unknown prompt too, where there is no suite."""
    return scorer not in EXTRAS or is_free(scorer)


def wanted_videos(scorer: str, suite: Mapping[str, Entry], mode: Mode = "short") -> dict[str, int]:
    """Prompt -> number of videos that the protocol wants for a scorer; nothing for extras.

    Of temporal flickering these are the videos before its static filter. The long mode filters
    clips, and wants as many videos as of any dimension.
    """
    dimension = base_of(scorer)
    if dimension not in DIMENSIONS:
        return {}
    count = SAMPLES if mode == "long" else DIMENSIONS[dimension].samples
    return {prompt: count for prompt, entry in suite.items() if dimension in entry.dimensions}


@lru_cache
def worker_hash() -> str:
    """Hash of the code that runs in VBench's environment."""
    digest = hashlib.sha256()
    for file in sorted(environment.WORKER.rglob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def version_of(scorer: str, hashes: Mapping[str, str]) -> str:
    """Hash of what makes a scorer's answers what they are: code, weights, options."""
    made = {
        "code": code_hash(MODULES[scorer]) if scorer in MODULES else worker_hash(),
        "vbench": None if scorer in MODULES else VERSION,
        "weights": dict(hashes),
        "options": options_of(scorer),
    }
    return json_sha256(made)


def told(scorer: str, video: Video, suite: Mapping[str, Entry]) -> dict[str, Any]:
    """What a scorer is told beside the video: nothing, for those that need no prompt."""
    if is_free(scorer):
        return {}
    entry = suite.get(video.prompt or "")
    auxiliary = (entry.auxiliary if entry else {}).get(scorer)
    return {"prompt": video.prompt, "auxiliary": auxiliary, "name": video_name(video)}


def video_name(video: Video) -> str:
    """The name that VBench expects: some of its dimensions read the prompt from there."""
    if video.prompt is None or video.index is None:
        return video.name
    return f"{video.prompt}-{video.index}.mp4"


def preflight(scorers: Iterable[str], place: Place, mode: Mode) -> None:
    """Look for the weights of scorers, which VBench would unpickle without a look.

    Raises:
        UserError: weights are missing or damaged, or unknown and not trusted.
    """
    for scorer in scorers:
        try:
            weights.require([scorer], place.weights, mode, trust=place.trust)
        except UserError as error:
            sentence = str(error).rstrip(".")
            raise UserError(f"{scorer}: {sentence}; mla-study vbench doctor lists all") from None


def make_plan(
    scorers: Sequence[str], asked: Mapping[str, Sequence[Video]], suite: Mapping[str, Entry],
    place: Place, mode: Mode = "short",
) -> Plan:  # fmt: skip
    """The questions of a run, see :func:`preflight`.

    Args:
        asked: scorer -> its videos.
    """
    plan = Plan()
    preflight(scorers, place, mode)
    for scorer in scorers:
        hashes = weights.fingerprint(scorer, place.weights, mode)
        plan.weights[scorer] = dict(hashes)
        plan.random |= weights.is_random(
            place.weights, weights.keys_for(scorer, place.weights, mode)
        )
        version = version_of(scorer, hashes)
        for number, video in enumerate(asked[scorer]):
            facts = told(scorer, video, suite)
            key = Key(video.sha256, scorer, version, json_sha256(facts))
            job = Job(
                str(number), video.path.resolve(), video_name(video), video.prompt,
                facts.get("auxiliary"),
            )  # fmt: skip
            plan.questions.append(Question(scorer, video, key, job))
    return plan


def options_of(scorer: str) -> dict[str, Any]:
    """What a worker is told of its scorer; clips are compared with upstream's dev_flag only."""
    return {"dev": True} if scorer.startswith("long.clip2clip") else {}


def launcher(place: Place, threads: int) -> Any:
    """How the worker of a scorer is started on a device, as :func:`drive.drive` asks."""

    def launch(scorer: str, device: str) -> Launch:
        request = {
            "schema": SCHEMA, "scorer": scorer, "device": device, "threads": threads,
            "weights": str(place.weights.resolve()), "versions": {}, "options": options_of(scorer),
            "detectron2": None if place.detectron2 is None else str(place.detectron2.resolve()),
        }  # fmt: skip
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        if scorer in MODULES:
            command = [sys.executable, "-m", NATIVE_MODULE]
            return Launch(command, {**os.environ, **limits}, Path.cwd(), request)
        if place.environment is None:
            raise UserError(f"{scorer} runs in VBench's environment: make setup-vbench")
        variables = environment.variables(place.weights, place.detectron2)
        command = [str(place.environment.python), str(environment.WORKER)]
        request["versions"] = dict(environment.PINS)
        folder = environment.working_folder(place.weights)
        folder.mkdir(parents=True, exist_ok=True)
        return Launch(command, {**os.environ, **variables, **limits}, folder, request)

    return launch
