"""A rollout that can be differentiated: the student's own history, as it will be at inference.

As in Self-Forcing, denoising stops after a random number of steps, the same for every chunk of the
batch; the step it stops at is the only one with gradients, and the clean pass that leaves the
chunk's cache entries has none. The cache keeps no graph between chunks.

Shapes: B batch, C channels, F latent frames, h x w latent, T text tokens, E text channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.kernels.masks import Positions, chunks_of
from mla_study.model.cache import RollingCache
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.sampler import add_noise, warped_steps, x0_from_flow
from mla_study.rollout.stream import positions_of
from mla_study.training.batch import Draws
from mla_study.training.flow import wide


def draw_exit(steps: int, draws: Draws) -> int:
    """The step (0 .. steps - 1) after which a rollout stops denoising; one for all samples."""
    return int(torch.randint(steps, (1,), generator=draws.shared))


@dataclass(frozen=True)
class SelfRollout:
    """Rollouts of a student for training.

    Attributes:
        positions: temporal positions of keys; None: those of the model's rollouts.
        learnt_from: first frame whose last denoising step has gradients (where they are enabled).
    """

    model: WanTransformer
    positions: Positions | None = None
    learnt_from: int = 0

    def run(
        self, context: Float[Tensor, "B T E"], frames: int, exit_step: int, draws: Draws
    ) -> Float[Tensor, "B C F h w"]:
        """Clean latents of ``frames`` frames, float32 at least.

        Args:
            context: text embeddings.
            exit_step: the last denoising step that is done, 0 .. len(denoise_steps) - 1.
            draws: of the noise.

        Raises:
            UserError: frames that do not fill whole chunks, a step beyond the schedule.
        """
        model, config = self.model, self.model.config
        times = warped_steps(config.flow.denoise_steps, config.flow.shift)
        if not 0 <= exit_step < len(times):
            raise UserError(f"step {exit_step} leaves the schedule of {len(times)} steps")
        height, width = config.latent_size
        grid = (height // config.patch[1], width // config.patch[2])
        told = model.condition(context)
        cache = RollingCache(
            config, config.window, len(context), grid[0] * grid[1], device=context.device
        )
        memory, positions = cache.layers(), positions_of(config, self.positions)
        made: list[Tensor] = []
        for chunk in chunks_of(frames, config.window.chunk):
            held = cache.begin(chunk)
            pieces = model.step_pieces(chunk, held, positions, *grid, context.device)

            def x0_at(x: Tensor, t: Tensor, pieces: object = pieces) -> Tensor:
                filled = t.float().expand(len(x)).to(x.device)
                flow = model(x, filled, told, pieces=pieces, memory=memory)  # type: ignore[arg-type]
                return x0_from_flow(x, wide(flow), t)

            shape = (config.out_channels, len(chunk), height, width)
            x = draws.noise(*shape)
            with torch.no_grad():
                for step in range(exit_step):
                    clean = x0_at(x, times[step])
                    x = add_noise(clean, draws.noise(*shape), times[step + 1])
            with torch.set_grad_enabled(torch.is_grad_enabled() and chunk[0] >= self.learnt_from):
                clean = x0_at(x, times[exit_step])
            made.append(clean)
            with torch.no_grad():
                x0_at(clean.detach(), torch.zeros((), dtype=torch.float64))
        return torch.cat(made, dim=2)
