"""Ways to run the model, as data: layout, form, window, cache storage, and what speeds a GPU up.

A :class:`Variant` on a :class:`Scale` becomes a :class:`Running` rollout, its window full. Weights
are random: speed and memory do not depend on them. Before a variant is timed,
:func:`gap` runs it on a small model against attention under a mask in float64; a variant that is
wrong gets no number.

Shapes: B batch, C channels, f frames of a chunk, height x width of the latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Literal, cast

import torch
from torch import Tensor

from mla_study.config import LatentConfig, ModelConfig, WindowConfig, wan_1_3b
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.model_cost import (
    ModelCost,
    chunk_cost,
    frame_tokens,
    video_frames,
)
from mla_study.kernels.latent_attention.calibrations import find
from mla_study.kernels.latent_attention.cost import Shape
from mla_study.kernels.latent_attention.dispatch import decide
from mla_study.kernels.masks import chunk_causal
from mla_study.model.cache import RollingCache
from mla_study.model.storage import DTYPES, Storage
from mla_study.model.transformer import WanTransformer, meta_model
from mla_study.rollout.accelerate import Acceleration, Capture, accelerate, latent_attentions
from mla_study.rollout.stream import Rollout, RolloutConfig

FormChoice = Literal["auto", "reconstruct", "absorbed", "absorbed_triton"]
STEP_TIME = 500.0  # any timestep costs the same


@dataclass(frozen=True)
class Scale:
    """The model that all variants share, and where it runs.

    Attributes:
        config: dense; ``latent`` makes it latent. ``latent_size`` is that of the benchmark.
        note: what of it differs from the model it stands for.
    """

    name: str
    config: ModelConfig
    latent: LatentConfig
    dtype: Literal["bf16", "fp16", "fp32"]
    device: str = "cpu"
    note: str = ""

    @property
    def where(self) -> torch.device:
        """The device."""
        return torch.device(self.device)


def full(device: str = "cuda") -> Scale:
    """Wan2.1 1.3B at 480x832 in bf16, as in the paper's Table 3."""
    return Scale("wan-1.3b", wan_1_3b(), LatentConfig(), "bf16", device, "480x832")


def quarter() -> Scale:
    """A CPU's share: width, heads, feed-forward, latents, text and tokens a frame at a quarter.

    With all of them at a quarter every part has the share of a pass that it has at 1.3B, so that
    factors carry over, but for absorbed attention: its price against dense is that of d_c against
    a head's channels, and heads keep their 128. Variants at ``d_c`` 192 show that one.
    """
    config = replace(
        wan_1_3b(), name="quarter", layers=2, width=384, heads=3, ffn_width=2240, text_len=128,
        latent_size=(30, 52),
    )  # fmt: skip
    note = "2 layers; width, heads, d_c, d_q, text and tokens a frame a quarter of 1.3B's"
    return Scale("quarter", config, LatentConfig(d_c=48, d_q=192), "fp32", "cpu", note)


def small(scale: Scale) -> Scale:
    """Two layers, two heads, six tokens a frame: for checks, on the same device and dtype."""
    heads = scale.config.head_dim
    config = replace(
        scale.config, name="small", layers=2, width=2 * heads, heads=2, ffn_width=64, freq_dim=16,
        text_dim=16, text_len=4, in_channels=4, out_channels=4, latent_size=(4, 6),
    )  # fmt: skip
    latent = replace(scale.latent, d_c=min(64, scale.latent.d_c), d_q=min(64, scale.latent.d_q))
    return replace(scale, name="small", config=config, latent=latent, note="")


@dataclass(frozen=True)
class Variant:
    """One way to run the model; ``window`` counts as :class:`~mla_study.config.WindowConfig` does.

    Attributes:
        form: of latent attention; ``auto`` asks the device's calibration.
        d_c: another latent size than the scale's.
        storage: of the cache; None: the scale's dtype.
    """

    window: WindowConfig
    latent: bool = False
    form: FormChoice = "auto"
    d_c: int | None = None
    clean_pass: bool = True
    storage: Storage | None = None
    head_group: int | None = None
    batch: int = 1
    how: Acceleration = field(default_factory=Acceleration)

    @property
    def name(self) -> str:
        """Such as ``latent auto 1+6+3 int8-channel``; tells variants of a scale apart."""
        w = self.window
        parts = [f"latent {self.form}" if self.latent else "dense"]
        parts += [f"d_c={self.d_c}"] if self.d_c else []
        parts += [f"{w.sink}+{w.history}+{w.chunk}"]
        parts += [] if self.clean_pass else ["no clean pass"]
        parts += [self.storage] if self.storage else []
        parts += [f"heads by {self.head_group}"] if self.head_group else []
        parts += [f"batch {self.batch}"] if self.batch != 1 else []
        parts += [self.how.text()] if self.how.any else []
        return " ".join(parts)

    def config(self, scale: Scale) -> ModelConfig:
        """The model's config."""
        latent = None
        if self.latent:
            latent = scale.latent if self.d_c is None else replace(scale.latent, d_c=self.d_c)
        return replace(scale.config, latent=latent, window=self.window)

    def passes(self, scale: Scale) -> int:
        """Passes of the model that a chunk takes."""
        return len(scale.config.flow.denoise_steps) + self.clean_pass

    def resolved(self, scale: Scale) -> str:
        """The form that runs: ``dense``, or one of latent attention's."""
        if not self.latent:
            return "dense"
        if self.form != "auto":
            return self.form
        rates = find(scale.dtype, scale.device, torch.get_num_threads())
        return decide(self.shape(scale), scale.device, calibration=rates).form

    def shape(self, scale: Scale) -> Shape:
        """The attention of a step; of a latent variant."""
        config, tokens = self.config(scale), frame_tokens(scale.config)
        latent = config.latent or scale.latent
        return Shape(
            self.window.chunk * tokens, self.window.key_frames * tokens, self.batch, config.heads,
            latent.d_c, latent.d_rope, config.head_dim, scale.dtype, self.passes(scale),
        )  # fmt: skip

    def cost(self, scale: Scale, passes: int | None = None) -> ModelCost:
        """FLOPs and bytes of a chunk (or of ``passes`` passes), without what a kernel wastes."""
        form = self.resolved(scale).removesuffix("_triton")
        return chunk_cost(
            self.config(scale), self.window, form, batch=self.batch, dtype=scale.dtype,
            passes=passes or self.passes(scale),
        )  # fmt: skip

    def frames(self, scale: Scale) -> int:
        """Video frames of a chunk, of all samples."""
        return self.batch * video_frames(scale.config, self.window)


def places(window: WindowConfig) -> int:
    """Places that a chunk takes in the ring, one after the other, before they repeat."""
    ring = window.history + window.chunk
    return ring // gcd(ring, window.chunk)


class Weights:
    """Models by config, made once; :meth:`twin` gives one whose tensors are shared."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._made: dict[ModelConfig, WanTransformer] = {}

    def twin(self, config: ModelConfig) -> WanTransformer:
        """A model of its own modules, so that forms and compiled blocks stay apart."""
        key = replace(config, window=WindowConfig())
        if key not in self._made:
            with torch.random.fork_rng(devices=[]), torch.device(self._scale.where):
                torch.manual_seed(0)
                made = WanTransformer(key).to(DTYPES[self._scale.dtype])
            self._made[key] = made.requires_grad_(False)
        model = meta_model(config)
        model.load_state_dict(self._made[key].state_dict(), assign=True)
        return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class NoisePool:
    """Noise that lies ready on the device, a few draws in turn: the benchmark's input."""

    draws: tuple[Tensor, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], device: torch.device, count: int = 7) -> NoisePool:
        """``count`` Gaussian draws [B, C, f, height, width], float32."""
        make = torch.Generator().manual_seed(0)
        return cls(tuple(torch.randn(shape, generator=make).to(device) for _ in range(count)))

    def __call__(self, chunk: int, draw: int) -> Tensor:
        """The next in turn."""
        return self.draws[(5 * chunk + draw) % len(self.draws)]


class Running:
    """A variant's rollout, its window full from the start.

    Raises:
        UserError: the device cannot run the variant.
    """

    def __init__(
        self, variant: Variant, scale: Scale, weights: Weights, capture: Capture | None = None
    ) -> None:
        self.variant, self.scale = variant, scale
        config = variant.config(scale)
        model = weights.twin(config)
        self.form = variant.resolved(scale)
        if variant.latent:
            decide(variant.shape(scale), scale.device, form=self.form)  # or says why it cannot run
        for attention in latent_attentions(model):
            attention.form, attention.head_group = self.form, variant.head_group
        device, dtype = scale.where, DTYPES[scale.dtype]
        make = torch.Generator().manual_seed(2)
        text = torch.randn(1, config.text_len, config.text_dim, generator=make).to(device, dtype)
        shape = (variant.batch, config.in_channels, variant.window.chunk, *config.latent_size)
        with torch.no_grad():
            told = model.condition(text)
        self.rollout = Rollout(
            model,
            told,
            RolloutConfig(
                batch=variant.batch, storage=variant.storage, clean_pass=variant.clean_pass
            ),
            noise=NoisePool.of(shape, device),
            predict=accelerate(model, variant.how, capture),
        )
        # what a chunk's passes get, so that graphs of steps and of chunks are the same
        self._memory = self.rollout.memory
        self._latents = list(cast(NoisePool, self.rollout.noise).draws)
        self._times = torch.full((variant.batch,), STEP_TIME, device=device)
        self.prime()

    def prime(self) -> None:
        """Fill the ring with random entries, as after as many chunks as that takes."""
        cache = self.rollout.cache
        cache.reset()
        self.rollout.next_chunk = 0
        while len(cache.frames) < cache.window.key_frames:
            cache.begin(self._ids(self.rollout.next_chunk))
            self.rollout.next_chunk += 1
        randomise(cache)
        self._begin(self.rollout.next_chunk)

    def _ids(self, chunk: int) -> range:
        size = self.variant.window.chunk
        return range(chunk * size, (chunk + 1) * size)

    def _begin(self, chunk: int) -> None:
        model, config = self.rollout.model, self.rollout.model.config
        rows, columns = (s // p for s, p in zip(config.latent_size, config.patch[1:], strict=True))
        held = self.rollout.cache.begin(self._ids(chunk))
        self._pieces = model.step_pieces(
            self._ids(chunk), held, self.rollout.positions, rows, columns, self.scale.where
        )

    @torch.no_grad()
    def step(self) -> Tensor:
        """One denoising pass over the chunk in progress, on the next of a few latents."""
        self._latents.append(self._latents.pop(0))
        told = self.rollout.conditioning
        return self.rollout.predict(
            self._latents[0], self._times, told, pieces=self._pieces, memory=self._memory
        )

    def chunk(self) -> None:
        """One chunk of the steady state."""
        self.rollout.advance()

    def restart(self) -> None:
        """Back to an empty cache."""
        self.rollout.cache.reset()
        self.rollout.next_chunk = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters and of what replaced them."""
        model = self.rollout.model
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def randomise(cache: RollingCache) -> None:
    """Gaussian entries of order one in every slot."""
    make = torch.Generator().manual_seed(0)
    for name, held in cache.state().items():
        if name == "frames":
            continue
        if held.dtype == torch.int8:
            values = torch.randint(-127, 128, held.shape, generator=make)
        elif name.endswith("scales"):
            values = torch.full(held.shape, 1 / 64)
        else:
            values = torch.randn(held.shape, generator=make)
        held.copy_(values)


TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2}
INT8_TOLERANCE, FP8_TOLERANCE = 5e-2, 0.15


def tolerance(variant: Variant, scale: Scale) -> float:
    """Largest :func:`gap` that is rounding."""
    extra = INT8_TOLERANCE * (variant.storage in ("int8-channel", "int8-token"))
    return max(TOLERANCE[scale.dtype], extra, FP8_TOLERANCE * variant.how.fp8)


@torch.no_grad()
def gap(
    variant: Variant,
    scale: Scale,
    capture: Capture | None = None,
    spoil: Callable[[Running], object] = lambda running: None,
) -> float:
    """Relative error of the variant's passes, chunk after chunk, on a small model.

    The truth is one pass over all chunks under the window's mask in float64, with the reference
    form of latent attention, on the same rounded weights.

    Args:
        spoil: called with what is about to run, for tests of this check.
    """
    tiny = small(scale)
    variant = replace(variant, d_c=None, head_group=variant.head_group and 1)
    weights = Weights(tiny)
    for name, weight in weights.twin(variant.config(tiny)).named_parameters():
        if ".self_attn." in name and weight.ndim == 2:
            weight.mul_(3)  # attention far from uniform, so that a wrong key shows
    running = Running(variant, tiny, weights, capture)
    running.restart()
    spoil(running)
    rollout, config, size = running.rollout, running.rollout.model.config, variant.window.chunk
    truth = weights.twin(config).double()
    for attention in latent_attentions(truth):
        attention.form = "reference"
    chunks = -(-variant.window.key_frames // size) + places(variant.window) + 1
    make = torch.Generator().manual_seed(1)
    shape = (variant.batch, config.in_channels, chunks * size, *config.latent_size)
    x = torch.randn(shape, generator=make).to(tiny.where, DTYPES[tiny.dtype])
    told = type(rollout.conditioning)(
        tuple(
            tuple((k.double(), v.double()) for k, v in block) for block in rollout.conditioning.keys
        )
    )
    rule = chunk_causal(chunks * size, size, variant.window, rollout.positions)
    times = torch.full((variant.batch,), STEP_TIME, device=tiny.where)
    wanted = truth(x.double(), times, told, rule)
    outs: list[Tensor] = []
    for index in range(chunks):
        running._begin(index)  # pyright: ignore[reportPrivateUsage]
        mine = x[:, :, index * size : (index + 1) * size]
        pieces, memory = running._pieces, running._memory  # pyright: ignore[reportPrivateUsage]
        outs.append(
            rollout.predict(mine, times, rollout.conditioning, pieces=pieces, memory=memory)
        )
    made = torch.cat(outs, dim=2).double()
    return float((made - wanted).norm() / wanted.norm())


def refusal(variant: Variant, scale: Scale, capture: Capture | None = None) -> str | None:
    """Why the variant gets no number here; None where it is right."""
    try:
        error = gap(variant, scale, capture)
    except UserError as reason:
        return f"refused: {reason}"
    limit = tolerance(variant, scale)
    return None if error < limit else f"wrong: error {error:.2g} exceeds {limit:g}"
