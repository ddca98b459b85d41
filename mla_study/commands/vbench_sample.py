"""``mla-study vbench sample``: make the videos that VBench scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mla_study.errors import UserError, counted, tell

_EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Sample:
    """Sample videos from VBench's prompts, or other ones, into files that VBench takes.

    946 prompts with 5 seeds each, 25 for temporal flickering, named {prompt}-{index}.mp4 by the
    short prompt. Without a checkpoint the shipped miniature makes videos of its own captions.
    Finished videos are kept: the same command goes on after an interruption.

    Example: mla-study vbench sample --count 8 --samples 2 --out clips
    """

    out: Path
    """Folder for the videos; records go beside it, into OUT.sampling."""
    prompts: str = "mini"
    """mini (captions of the miniature's world), vbench, vbench-extended, or a file with a prompt a
    line."""
    extended: Path | None = None
    """File with the longer prompts that the model is told, line by line as --prompts."""
    checkpoint: str | None = None
    """Weights: original Wan, diffusers, Self-Forcing, or a folder of ours (default: the shipped
    miniature)."""
    seconds: float = 5.0
    """Length of a video: 5, or 30 and 60 for the long mode."""
    dimensions: tuple[str, ...] = ()
    """Only prompts that these dimensions of VBench need (names, all, quality, semantic,
    overall_6)."""
    count: int | None = None
    """Only the first prompts; captions of mini to draw (default 8)."""
    samples: int | None = None
    """Videos a prompt (default: 5, of temporal flickering's prompts 25, of mini 2)."""
    seed: int = 0
    """A video's own seed follows from this, its prompt and its index."""
    shard: str | None = None
    """I/N: every N-th prompt from the I-th, I from 0 (default: all, or the rank's under
    torchrun)."""
    variant: Literal["dense", "latent"] | None = None
    """Which shipped miniature (default latent); of a checkpoint, a check."""
    preset: str | None = None
    """What a checkpoint without config is."""
    weights: str | None = None
    """Which dictionary of a PyTorch file, such as generator_ema."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An adapter to merge; may be repeated."""
    wan: Path | None = None
    """Wan folder with the VAE and the text encoder (default: the checkpoint's own)."""
    embeddings: Path | None = None
    """Embeddings of what is told, made by mla-study text encode."""
    fps: float | None = None
    """Frames a second (default: the model's)."""
    size: str | None = None
    """HEIGHTxWIDTH of the latent (default: the model's)."""
    window: str | None = None
    """sink,history,chunk in latent frames (default: the model's)."""
    positions: Literal["absolute", "relative"] | None = None
    """Temporal positions of keys (default: as generate's)."""
    storage: Literal["bf16", "fp16", "fp32", "fp64", "int8-channel", "int8-token"] | None = None
    """What the cache holds entries in (default: the model's dtype)."""
    clean_pass: bool = True
    """Write cache entries by a last pass at t = 0."""
    dtype: Literal["bf16", "fp16", "fp32", "fp64"] | None = None
    """Of the weights (default: as stored, and fp32 for the miniature)."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""
    threads: int | None = None
    """Threads of torch on the CPU (default: its own choice, and one for the miniature)."""
    upscale: int | None = None
    """Side of the square that a pixel of the miniature is shown as."""
    environment: Path | None = None
    """VBench's environment, for its prompts (default: MLA_STUDY_VBENCH_ENV, or what make
    setup-vbench made)."""

    def run(self) -> int:
        """Sample, and return the exit code."""
        from mla_study.evaluation.vbench.needs.environment import find_environment
        from mla_study.evaluation.vbench.sampling.plan import parse_shard, prompt_set, samples
        from mla_study.evaluation.vbench.sampling.records import TABLE
        from mla_study.evaluation.vbench.sampling.sample import sample
        from mla_study.evaluation.vbench.sampling.sampler import Recipe

        shard = parse_shard(self.shard)
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds is {self.seconds}, but it must be a length above 0")
        suite = self.prompts in ("vbench", "vbench-extended")
        package = find_environment(self.environment).package if suite else None
        prompts = prompt_set(self.prompts, self.extended, package, self.count, self.seed)
        names = [name for given in self.dimensions for name in given.replace(",", " ").split()]
        wanted = samples(prompts, names, self.samples, self.seed)
        recipe = Recipe(
            self.checkpoint, self.preset, self.variant, self.weights, self.lora, self.wan,
            self.embeddings, self.seconds, self.fps, self.size, self.window, self.positions,
            self.storage, self.clean_pass, self.dtype, self.device, self.threads, self.upscale,
        )  # fmt: skip
        if prompts.extended_sha256 is not None:
            tell(f"longer prompts: {prompts.extended_by}")
        try:
            done = sample(prompts, wanted, recipe, self.out, base=self.seed, shard=shard, say=tell)
        except KeyboardInterrupt:
            tell("interrupted: the same command goes on")
            return _EXIT_INTERRUPTED
        videos = counted(done.there, "video")
        print(f"{done.folder}: {videos}, {done.made} of them new; {done.records / TABLE}")
        return 0
