"""``mla-study latentize``: a dense checkpoint to latent attention, with what that changes."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import tyro

from mla_study.config import LatentConfig
from mla_study.errors import UserError


@dataclass(frozen=True)
class Latentize:
    """Convert dense self-attention to latent attention, and measure each decision, layer by layer.

    The gains of QK-norm fold into W_q and W_k, its 1 / rms becomes a constant. The fastest rotary
    pairs stay, with one key for all heads; other channels lose their rotation and their key bias.
    The bias of v folds into o; biases of q and of the rotary key stay. An RMSNorm follows each
    latent. The table shows what each of these costs; at d_c = d_q = width rank cuts cost nothing.

    The model runs once over noised latents (or noise), block by block; a few GB of memory do for
    14B. DST gets the checkpoint and conversion/ (tables, run.json). The same command goes on after
    an interruption. With --sweep all inits are measured at each d_c; no weights are written.

    Example: mla-study latentize Wan2.1-T2V-1.3B latent-1.3b --init activation --latents clips.pt
    """

    src: tyro.conf.Positional[str]
    """Dense checkpoint of any layout: file, sharded index or folder."""
    dst: tyro.conf.Positional[Path]
    """Folder to make."""
    d_c: int = 192
    """Latent of keys and values, cached."""
    d_q: int | None = None
    """Latent of queries, not cached (default: half the width)."""
    split: str | None = None
    """Content/rotary channels of a head, such as 96/32 (default: three quarters to one)."""
    pairs: str | None = None
    """Rotary pairs kept for time,height,width (default: in Wan's proportion, 6,5,5 for 32)."""
    init: Literal["spectral", "spectral-raw", "random", "activation"] = "spectral"
    """SVD of [W_K; W_V], balanced or as it is; Gaussian; or output PCA on the inputs."""
    rope_key: Literal["svd", "mean"] = "svd"
    """The one rotary key of all heads: complex rank-1 SVD a frequency, or their mean."""
    config: str | None = None
    """Config where none lies beside SRC: a JSON file, a folder with one, or a preset's name."""
    weights: str | None = None
    """Which dictionary of a PyTorch file, such as generator_ema."""
    covariance: Path | None = None
    """Covariances of the attention inputs (safetensors) in place of those collected on the way."""
    latents: Path | None = None
    """Clean latents, and context if there is text (safetensors or .pt); default: Gaussian noise."""
    samples: int = 4
    """Samples to calibrate on; two more are held out for measuring."""
    seed: int = 0
    """Seed of noise, timesteps and the random init."""
    sweep: str | None = None
    """d_c=64,128,192,256,512 measures all inits at each, into one table and one plot."""

    def run(self) -> int:
        """Convert or sweep, print the table."""
        if find_spec("torch") is None:
            raise UserError("this command needs the package torch: pip install 'mla-study[torch]'")
        from tqdm import tqdm

        from mla_study.checkpoints.wan.load import WanSource
        from mla_study.model.conversion_tables import conversion_text, plot_sweep, sweep_text
        from mla_study.model.latentize import Options, latentize

        sweep = () if self.sweep is None else parse_sweep(self.sweep)
        source = WanSource(self.src, self.weights)
        try:
            model = source.describe(self.config).config
        finally:
            source.close()
        latent = latent_config(
            model.width, model.head_dim, self.d_c, self.d_q, self.split, self.pairs
        )
        options = Options(latent, self.init, self.rope_key, self.seed, self.samples, sweep)
        with tqdm(unit="layer", disable=None, file=sys.stderr) as bar:

            def show(finished: int, total: int) -> None:
                bar.total = total
                bar.update(finished - bar.n)

            done = latentize(
                self.src,
                self.dst,
                options,
                config=self.config,
                weights=self.weights,
                covariance=self.covariance,
                latents=self.latents,
                progress=show,
                say=lambda note: bar.write(f"note: {note}", file=sys.stderr),
            )
        if sweep:
            print(sweep_text(done.rows))
            for path in plot_sweep(done.rows, done.run, self.dst / "sweep").values():
                print(f"wrote {path}", file=sys.stderr)
        else:
            print(conversion_text(done.rows, done.ranks))
        run = done.run
        print(f"class {run['provenance']}, {run['validity']}, run {run['run_hash'][:12]}")
        print(f"wrote {done.path}", file=sys.stderr)
        return 0


def parse_sweep(text: str) -> tuple[int, ...]:
    """``d_c=64,128`` as (64, 128); UserError for anything else."""
    match = re.fullmatch(r"\s*d_c\s*=\s*(\d+(?:\s*,\s*\d+)*)\s*", text)
    if match is None:
        raise UserError(f"--sweep {text} is not understood: write d_c=64,128,192")
    return tuple(int(part) for part in match[1].split(","))


def _numbers(text: str, option: str, count: int, example: str) -> list[int]:
    parts = re.split(r"[/,:+ ]+", text.strip())
    if len(parts) != count or not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"{option} {text} is not understood: write it as {example}")
    return [int(part) for part in parts]


def latent_config(
    width: int, head_dim: int, d_c: int, d_q: int | None, split: str | None, pairs: str | None
) -> LatentConfig:
    """The sizes that a command line asks for, defaults in the paper's proportions.

    Raises:
        UserError: a split that is no split of the head, an odd or oversized rotary part, pairs that
            do not sum to it.
    """
    from mla_study.model.latent_init import default_pairs

    d_rope = head_dim // 8 * 2
    d_nope = head_dim - d_rope
    if split is not None:
        d_nope, d_rope = _numbers(split, "--split", 2, "96/32")
    if d_nope + d_rope != head_dim:
        raise UserError(
            f"the split {d_nope}/{d_rope} has {d_nope + d_rope} channels, but a head of this model "
            f"has {head_dim}: the two must sum to it"
        )
    kept = default_pairs(d_rope, head_dim)
    if pairs is not None:
        t, h, w = _numbers(pairs, "--pairs", 3, "6,5,5")
        kept = (t, h, w)
    return LatentConfig(d_c, width // 2 if d_q is None else d_q, d_nope, d_rope, kept)
