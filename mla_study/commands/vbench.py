"""``mla-study vbench``: VBench's scores of videos, short and long, and what they need."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mla_study.commands.vbench_compare import Compare
from mla_study.commands.vbench_sample import Sample
from mla_study.commands.vbench_weights import Doctor, FetchWeights
from mla_study.errors import UserError, tell

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_EXIT_INTERRUPTED, _EXIT_UNFINISHED = 130, 2
_MODES = {
    "static-filter": ("short", "long"), "detectron2": ("short", "long"),
    "upstream-exact": ("long",), "clip-to-clip": ("long",), "split-scenes": ("long",),
    "long-configs": ("long",),
}  # fmt: skip
"""The modes that options are of, where that is not all."""


@dataclass(frozen=True)
class Run:
    """Score a folder of videos by VBench's own code, in its own environment.

    short: videos named {prompt}-{index}.mp4 by VBench's prompts, or a table of prompts beside them.
    custom: any clips, by the dimensions that need no prompt. long: videos of 30 s and more. What is
    scored is kept: the same command goes on after an interruption, and scores changed videos only.

    Example: mla-study vbench run clips --mode custom --dimensions temporal_flickering --out scores
    """

    videos: tyro.conf.Positional[Path]
    """A folder of .mp4 videos, or one video."""
    out: Path
    """Folder for scores, tables and logs."""
    mode: Literal["short", "long", "custom"] = "short"
    """Which protocol."""
    dimensions: tuple[str, ...] = ()
    """Dimensions (default: all that the mode has), or all, quality, semantic, overall_6,
    substitutes."""
    prompts: Path | None = None
    """CSV or JSONL with file, prompt, index (default: prompts.csv in the folder, or the names)."""
    extended: Path | None = None
    """File of the longer prompts that the model was told, for the record (default: what vbench
    sample recorded beside the folder)."""
    model: str | None = None
    """Name of the model in tables (default: the folder's)."""
    weights: Path | None = None
    """Folder of metric weights (default: VBENCH_CACHE_DIR, or ~/.cache/vbench)."""
    trust_weights: bool = False
    """Take weights whose hash nobody published; VBench unpickles them."""
    detectron2: Path | None = None
    """Checkout of detectron2, for object_class, multiple_objects, color, spatial_relationship."""
    environment: Path | None = None
    """VBench's environment (default: MLA_STUDY_VBENCH_ENV, or what make setup-vbench made)."""
    static_filter: bool = False
    """Leave moving videos out of temporal flickering, or do not start (default: where its weights
    are there; in long mode no)."""
    no_static_filter: bool = False
    """Take moving videos too."""
    upstream_exact: bool = False
    """Long mode: cut and average as upstream's code does (default)."""
    no_upstream_exact: bool = False
    """Long mode: by true frame rates, and over clips, then videos. The corrected average is
    reported beside upstream's in any case."""
    clip_to_clip: bool = False
    """Long mode: let half of subject and background consistency compare clips (default; needs
    DINOv2 and DreamSim)."""
    no_clip_to_clip: bool = False
    """Long mode: compare no clips."""
    split_scenes: bool = False
    """Long mode: cut at changes of scene first."""
    long_configs: Path | None = None
    """Folder with upstream's four YAML files (default: their published values)."""
    workers: int | None = None
    """Processes (default: one a core, or one a GPU)."""
    threads: int | None = None
    """Threads of a process (default: the cores, shared evenly)."""
    device: str = "auto"
    """cpu, cuda (all GPUs that are visible), cuda:1, or auto."""
    shard: str | None = None
    """I/N: every N-th video from the I-th, into OUT/shard-I-of-N; a run without it joins them."""
    take: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Folder of another run whose scores are taken over; may be repeated."""
    skip_bad: bool = False
    """Go on without videos that cannot be scored."""
    json: bool = False
    """Print the scores as JSON."""

    def run(self) -> int:
        """Score, and return the exit code."""
        from mla_study.evaluation.vbench import dimensions
        from mla_study.evaluation.vbench.long.configs import load_configs
        from mla_study.evaluation.vbench.needs import environment, weights
        from mla_study.evaluation.vbench.runs.origin import seeds_text, told_text
        from mla_study.evaluation.vbench.runs.plan import Place, scorers_for
        from mla_study.evaluation.vbench.runs.protocol import Protocol
        from mla_study.evaluation.vbench.runs.run import run
        from mla_study.evaluation.vbench.runs.scoring import FLICKER, LongOptions, Request
        from mla_study.evaluation.vbench.runs.tables import text_table
        from mla_study.evaluation.vbench.sampling.plan import parse_shard

        names = [name for given in self.dimensions for name in given.replace(",", " ").split()]
        scorers = scorers_for(self.mode, names or ["all"])
        shard = parse_shard(self.shard)
        static_filter = _either("static-filter", self.static_filter, self.no_static_filter)
        exact = _either("upstream-exact", self.upstream_exact, self.no_upstream_exact)
        dev = _either("clip-to-clip", self.clip_to_clip, self.no_clip_to_clip)
        _fits_mode(
            self.mode,
            {
                "static-filter": static_filter, "upstream-exact": exact, "clip-to-clip": dev,
                "split-scenes": self.split_scenes or None, "long-configs": self.long_configs,
                "detectron2": self.detectron2,
            },
        )  # fmt: skip
        if static_filter and FLICKER not in scorers:
            raise UserError(
                f"--static-filter is about {FLICKER}, which is not among --dimensions: leave it out"
            )
        other = [name for name in scorers if name not in dimensions.NATIVE]
        long_mode = self.mode == "long"
        found = environment.find_environment(self.environment) if other or long_mode else None
        if found is not None:
            environment.require_versions(found, long_mode)
        folder, detectron2 = weights.weights_folder(self.weights), self.detectron2
        known = dimensions.DIMENSIONS
        if found and any(known[name].detectron2 for name in scorers if name in known):
            installed = "detectron2" in found.versions
            detectron2 = weights.find_detectron2(
                detectron2, folder, installed, trust=self.trust_weights
            )
        place = Place(folder, found, detectron2, self.trust_weights)
        devices, threads = _slots(self.device, self.workers, found)
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads is {self.threads}, but it must be at least 1")
        long = None
        if long_mode:
            configs = load_configs(self.long_configs)
            long = LongOptions(configs, exact is not False, dev is not False, self.split_scenes)
        request = Request(
            self.videos, self.out, scorers, place, self.mode,
            self.model or self.videos.resolve().stem, self.prompts, self.extended,
            static_filter, devices, self.threads or threads,
            None if shard[1] == 1 else shard, self.take,
            self.skip_bad,
            long,
        )  # fmt: skip
        try:
            done = run(request, tell)
        except KeyboardInterrupt:
            tell("interrupted: the same command goes on")
            return _EXIT_INTERRUPTED
        if self.json:
            print(done.table.to_json(orient="records", indent=1))
        else:
            print(text_table(done.table))
        if odd := done.odd():
            tell(odd)
        record = done.record
        observed = record["observed"]
        told = told_text(Protocol.read(record["identity"]["config"]), observed)
        for line in filter(None, (told, seeds_text(observed))):
            print(line, file=sys.stderr)
        print(
            f"class {record['provenance']}, {record['validity']}, run {record['run_hash'][:12]}: "
            f"{done.folder}",
            file=sys.stderr,
        )
        return _EXIT_UNFINISHED if done.failures or done.stopped else 0


VBenchCommand = (
    Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[FetchWeights, tyro.conf.subcommand("fetch-weights")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


@dataclass(frozen=True)
class VBench:
    """VBench and VBench-Long: score videos, compare runs, see what is missing.

    Example: mla-study vbench run clips --mode custom --dimensions temporal_flickering --out scores
    """

    command: VBenchCommand = field()

    def run(self) -> int:
        """Run the subcommand."""
        return self.command.run()


def _either(option: str, yes: bool, no: bool) -> bool | None:
    """What was said by ``--option`` or ``--no-option``; None where neither was given.

    Raises:
        UserError: both.
    """
    if yes and no:
        raise UserError(f"--{option} and --no-{option} contradict each other: give one")
    return None if yes == no else yes


def _fits_mode(mode: str, given: Mapping[str, object]) -> None:
    """Refuse an option that the mode would ignore.

    Args:
        given: option -> its value, None where it was not given.

    Raises:
        UserError: one was given that is another mode's.
    """
    for option, value in given.items():
        modes = _MODES[option]
        if value is None or mode in modes:
            continue
        no = "no-" if value is False else ""
        of = " and ".join(modes)
        raise UserError(
            f"--{no}{option} says nothing in {mode} mode, it is of {of} mode: leave it out, or "
            f"give --mode {modes[0]}"
        )


def _slots(device: str, workers: int | None, found: object) -> tuple[tuple[str, ...], int]:
    """Devices, one a process, and threads of each.

    Raises:
        UserError: no device, fewer than one worker, or a GPU that is not there.
    """
    from mla_study.evaluation.vbench.needs import environment

    if not _DEVICE.fullmatch(device):
        raise UserError(f"--device is '{device}': give auto, cpu, cuda, or cuda:1 and so on")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}, but it must be at least 1")
    cores = len(os.sched_getaffinity(0))
    gpus = 0
    if device != "cpu" and isinstance(found, environment.Environment):
        gpus = environment.gpus(found)
    if device.startswith("cuda") and not gpus:
        raise UserError(f"--device {device}, but VBench's PyTorch sees no GPU: give cpu or auto")
    if ":" in device and int(device.partition(":")[2]) >= gpus:
        raise UserError(f"--device {device}, but VBench's PyTorch sees {gpus} GPUs, from cuda:0 on")
    if device == "cpu" or not gpus:
        count = workers or cores
        return ("cpu",) * count, max(1, cores // count)
    local = os.environ.get("LOCAL_RANK")
    if ":" in device:
        cards = [device]
    elif local is not None:
        cards = [f"cuda:{local}"]
    else:
        cards = [f"cuda:{i}" for i in range(gpus)]
    count = workers or len(cards)
    return tuple(cards[i % len(cards)] for i in range(count)), max(1, cores // count)
