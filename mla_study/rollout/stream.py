"""The chunk-causal rollout: a few denoising steps a chunk, against a cache of constant size.

A chunk of noise is denoised at the warped few steps, with fresh noise between them, while it sees
the sink and the recent frames in the cache; a last pass at t = 0 over the clean chunk leaves the
entries that later chunks read (method, section "Chunk-causal rollout").

Shapes: B batch, C channels, f frames of a chunk, height x width of the latent.

Example::

    for chunk in stream(model, ["a red disc"], frames=12, seed=1):
        print(chunk.index, chunk.latents.shape)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.config import ModelConfig, WindowConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import Positions
from mla_study.model.attention import Piece
from mla_study.model.cache import RollingCache
from mla_study.model.storage import NAMES, Storage
from mla_study.model.transformer import Conditioning, WanTransformer
from mla_study.rollout.accelerate import Acceleration, Predict, accelerate
from mla_study.rollout.faults import first_fault
from mla_study.rollout.prompts import (
    Encoder,
    Prompts,
    batch_of,
    conditioning_for,
    embed,
    philox,
)
from mla_study.rollout.sampler import add_noise, warped_steps, x0_from_flow

Noise = Callable[[int, int], Tensor]
"""(chunk, draw) -> noise [B, C, f, height, width]; draw 0 starts a chunk, draw k follows step k."""


@dataclass(frozen=True)
class Chunk:
    """Finished latents [B, C, f, height, width] of the ``frames`` with these ids."""

    index: int
    frames: tuple[int, ...]
    latents: Tensor


@dataclass(frozen=True)
class RolloutConfig:
    """How a rollout runs; None takes the model's own (window, size) or what suits it.

    ``positions`` default to those of :func:`positions_of`, ``storage`` to the model's dtype.
    Without ``clean_pass`` the entries of the last denoising step stay in the cache. With
    ``recache`` a prompt switch recomputes the cached frames' entries under the new prompt.
    ``size`` is (height, width) of the latent.
    """

    seed: int = 0
    batch: int | None = None
    window: WindowConfig | None = None
    size: tuple[int, int] | None = None
    positions: Positions | None = None
    storage: Storage | None = None
    clean_pass: bool = True
    recache: bool = False
    steps: tuple[int, ...] | None = None


def positions_of(config: ModelConfig, chosen: Positions | None = None) -> Positions:
    """Temporal positions of keys, where nothing else is chosen.

    Relative to the window for latent attention and for the miniature, absolute for dense Wan.
    """
    if chosen is not None:
        return chosen
    return "relative" if config.latent is not None or config.learned_positions else "absolute"


def resolved(config: RolloutConfig, model: WanTransformer, batch: int) -> RolloutConfig:
    """The same with every None filled in.

    Raises:
        UserError: a latent size that does not divide into patches, a batch below 1.
    """
    own = model.config
    size = config.size or own.latent_size
    if min(size) < 1 or any(s % p for s, p in zip(size, own.patch[1:], strict=True)):
        raise UserError(f"a latent of {size} does not divide into patches of {own.patch[1:]}")
    if config.batch is not None and config.batch < 1:
        raise UserError(f"a batch of {config.batch} is none: give at least 1")
    return RolloutConfig(
        seed=config.seed,
        batch=config.batch or batch,
        window=config.window or own.window,
        size=size,
        positions=positions_of(own, config.positions),
        storage=config.storage or NAMES[model.patch_embedding.weight.dtype],
        clean_pass=config.clean_pass,
        recache=config.recache,
        steps=config.steps or own.flow.denoise_steps,
    )


@dataclass(frozen=True)
class SeededNoise:
    """Noise of a chunk that depends on (seed, chunk, draw, sample) alone, whatever came before."""

    seed: int
    shape: tuple[int, int, int, int, int]

    def __call__(self, chunk: int, draw: int) -> Tensor:
        """Standard Gaussian [B, C, f, height, width], float32 on the CPU."""
        drawn = (philox("noise", self.seed, chunk, draw, i) for i in range(self.shape[0]))
        samples = [stream.standard_normal(self.shape[1:], dtype=np.float32) for stream in drawn]
        return torch.from_numpy(np.stack(samples))


class Rollout:
    """One rollout, endless: each call of :meth:`advance` makes the next chunk.

    Args:
        model: a text-to-video model, dense or latent; it is used as it is (dtype, device, mode).
        prompts: for the whole batch, see :data:`~mla_study.rollout.prompts.Prompts`.
        config: how to run.
        prompt_at: further prompts, by the index of the first chunk that hears them.
        encode: text encoder where prompts are text.
        noise: replaces the seeded noise.
        predict: the model's pass, from :func:`~mla_study.rollout.accelerate.accelerate`.

    Raises:
        UserError: prompts, sizes or a model that do not fit.
    """

    def __init__(
        self,
        model: WanTransformer,
        prompts: Prompts,
        config: RolloutConfig | None = None,
        *,
        prompt_at: Mapping[int, Prompts] | None = None,
        encode: Encoder | None = None,
        noise: Noise | None = None,
        predict: Predict | None = None,
    ) -> None:
        self.model = model
        self.predict: Predict = predict or accelerate(model, Acceleration())
        _text_to_video(model.config)
        self.script = {0: embed(prompts, model.config, encode)}
        for chunk, later in (prompt_at or {}).items():
            if chunk < 1:
                raise UserError(
                    f"a prompt switch at chunk {chunk} is none: chunk 0 has the first prompt, "
                    "so switch at 1 or later"
                )
            self.script[chunk] = embed(later, model.config, encode)
        self.config = resolved(
            config or RolloutConfig(), model, max(batch_of(told) for told in self.script.values())
        )
        window, size, batch = self.config.window, self.config.size, self.config.batch
        steps, storage = self.config.steps, self.config.storage
        assert window and size and batch and steps and storage and self.config.positions
        self.window = window
        self.positions: Positions = self.config.positions
        weight = model.patch_embedding.weight
        self._device = weight.device
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        self._grid = (size[0] // model.config.patch[1], size[1] // model.config.patch[2])
        self.cache = RollingCache(
            model.config, window, batch, self._grid[0] * self._grid[1], storage, self._device
        )
        shape = (batch, model.config.in_channels, window.chunk, *size)
        self.noise: Noise = noise or SeededNoise(self.config.seed, shape)
        self._times = warped_steps(steps, model.config.flow.shift).tolist()
        self.memory = self.cache.layers()
        self.recent: dict[int, Tensor] = {}
        self.next_chunk = 0
        self.conditioning = self.told_at(0)

    def told_at(self, chunk: int) -> Conditioning:
        """The conditioning that ``chunk`` hears."""
        latest = max(start for start in self.script if start <= chunk)
        return conditioning_for(self.model, self.script[latest], self.cache.batch)

    @torch.no_grad()
    def advance(self) -> Chunk:
        """Make the next chunk.

        Raises:
            UserError: the model's output is not finite (names chunk, step and layer).
        """
        index, size = self.next_chunk, self.window.chunk
        frames = tuple(range(index * size, (index + 1) * size))
        if index > 0 and index in self.script:
            self.conditioning = self.told_at(index)
            if self.config.recache:
                self._recache(frames[0])
        pieces = self._pieces(frames)
        x = self._draw(index, 0)
        clean = x
        for step, t in enumerate(self._times):
            flow = self._pass(x, t, pieces)
            more = step + 1 < len(self._times)
            # drawn while a GPU is still at the pass, and looked at only then
            noise = self._draw(index, step + 1) if more else x
            self._check(flow, x, t, pieces, f"chunk {index}, step {step + 1}")
            clean = x0_from_flow(x, flow, torch.tensor(t, dtype=torch.float64))
            if more:
                later = torch.tensor(self._times[step + 1], dtype=torch.float64)
                x = add_noise(clean, noise, later)
        if self.config.clean_pass:
            flow = self._pass(clean, 0.0, pieces)
            self._check(flow, clean, 0.0, pieces, f"chunk {index}, clean pass")
        if self.config.recache:
            self.recent.update(zip(frames, clean.unbind(2), strict=True))
            kept = set(self.cache.visible_before(frames[-1] + 1))
            self.recent = {f: x for f, x in self.recent.items() if f in kept}
        self.next_chunk = index + 1
        return Chunk(index, frames, clean)

    def resume(self, chunk: int) -> None:
        """Go on at ``chunk``, once the cache and :attr:`recent` are restored."""
        self.next_chunk = chunk
        self.conditioning = self.told_at(max(chunk - 1, 0))

    def _draw(self, chunk: int, draw: int) -> Tensor:
        return self.noise(chunk, draw).to(self._device, self._dtype)

    def _pass(
        self, x: Tensor, t: float, pieces: Sequence[Piece]
    ) -> Float[Tensor, "B C f height width"]:
        return self.predict(
            x, self._filled(x, t), self.conditioning, pieces=pieces, memory=self.memory
        )

    def _filled(self, x: Tensor, t: float) -> Tensor:
        return torch.full((x.shape[0],), t, dtype=torch.float32, device=self._device)

    def _check(
        self, flow: Tensor, x: Tensor, t: float, pieces: Sequence[Piece], where: str
    ) -> None:
        if bool(torch.isfinite(flow).all()):
            return

        def call() -> Tensor:
            times, memory = self._filled(x, t), self.memory
            return self.model(x, times, self.conditioning, pieces=pieces, memory=memory)

        raise UserError(f"{where} (t = {t:.6g}): {first_fault(self.model, call)}")

    def _recache(self, start: int) -> None:
        """Fill the cache anew with what a chunk at ``start`` sees, oldest frames first."""
        visible = self.cache.visible_before(start)
        self.cache.reset()
        for group in sorted({frame // self.window.chunk for frame in visible}):
            mine = tuple(f for f in visible if f // self.window.chunk == group)
            pieces = self._pieces(mine, gap=True)
            latents = torch.stack([self.recent[f] for f in mine], dim=2)
            where = f"re-cache of frames {mine[0]} to {mine[-1]}"
            self._check(self._pass(latents, 0.0, pieces), latents, 0.0, pieces, where)

    def _pieces(self, chunk: tuple[int, ...], gap: bool = False) -> list[Piece]:
        """Begin ``chunk`` in the cache, and what its passes need of masks and rotations."""
        held = self.cache.begin(chunk, gap)
        return self.model.step_pieces(chunk, held, self.positions, *self._grid, self._device)


def stream(
    model: WanTransformer,
    prompts: Prompts,
    *,
    frames: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    window: WindowConfig | None = None,
    size: tuple[int, int] | None = None,
    positions: Positions | None = None,
    storage: Storage | None = None,
    clean_pass: bool = True,
    recache: bool = False,
    steps: tuple[int, ...] | None = None,
    prompt_at: Mapping[int, Prompts] | None = None,
    encode: Encoder | None = None,
    noise: Noise | None = None,
) -> Generator[Chunk, None, None]:
    """Generate latents chunk after chunk, at constant time and memory.

    Args:
        model: from ``load_model`` or built from a config.
        prompts: one prompt, one a sample, text embeddings [B, T, E], or a conditioning.
        frames: latent frames to make, rounded up to whole chunks; None never ends.
        seed: chunk n's noise depends on (seed, n, sample) only.
        encode: text encoder; a model of a text width of its own takes the stand-in by default.
        prompt_at: further prompts by chunk; noise: replaces the seeded noise.
        batch, window, size, positions, storage, clean_pass, recache, steps: see
            :class:`RolloutConfig`.

    Yields:
        :class:`Chunk` with latents [B, C, f, height, width].

    Raises:
        UserError: at once where the input does not fit; during the rollout where the model's output
            is not finite.
    """
    config = RolloutConfig(
        seed, batch, window, size, positions, storage, clean_pass, recache, steps
    )
    rollout = Rollout(model, prompts, config, prompt_at=prompt_at, encode=encode, noise=noise)
    count = None if frames is None else whole_chunks(frames, rollout.window.chunk)
    return _generate(rollout, count)


def _generate(rollout: Rollout, count: int | None) -> Generator[Chunk, None, None]:
    while count is None or rollout.next_chunk < count:
        yield rollout.advance()


def whole_chunks(frames: int, chunk: int) -> int:
    """Chunks that hold ``frames`` latent frames, the last one filled up.

    Raises:
        UserError: fewer than one frame.
    """
    if frames < 1:
        raise UserError(f"{frames} frames are none: give at least 1")
    return -(-frames // chunk)


def random_model(config: ModelConfig, seed: int = 0) -> WanTransformer:
    """A model of random weights, in eval mode: shapes and speed are real, the video is noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer(config).eval()


def _text_to_video(config: ModelConfig) -> None:
    if config.model_type != "t2v" or config.in_channels != config.out_channels:
        raise UserError(
            f"model '{config.name}' ({config.model_type}, {config.in_channels} channels in, "
            f"{config.out_channels} out) is no text-to-video model: a rollout streams only those"
        )
