"""Whether a stage, its models and its data belong together, asked before anything is trained."""

from __future__ import annotations

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.training.batch import Data
from mla_study.training.objective import Objective
from mla_study.training.recipe import Stage

_SHARED = ("in_channels", "out_channels", "latent_size", "patch", "text_dim", "text_len")


def require_fit(
    stage: Stage, objective: Objective, model: ModelConfig, teacher: ModelConfig | None, data: Data
) -> None:
    """Compare shapes: teacher with generator, and the first sample with both.

    Raises:
        UserError: what does not fit, and how it could.
    """
    other = model if teacher is None else teacher
    for name in _SHARED:
        mine, theirs = getattr(model, name), getattr(other, name)
        if mine != theirs:
            raise UserError(
                f"the teacher's {name} is {theirs}, but the generator's is {mine}: give a teacher "
                "of the same latents and text"
            )
    first = data.batch([0])
    channels = first.context.shape[2]
    if channels != model.text_dim:
        raise UserError(
            f"the data's text has {channels} channels, but model '{model.name}' reads "
            f"{model.text_dim}: give that model's text encoder"
        )
    if not objective.needs_latents:
        return
    if first.latents is None:
        raise UserError(
            f"{stage.objective} learns from videos, but the data are prompts alone: give the world "
            "or a folder of videos"
        )
    found = tuple(first.latents.shape[1:])
    wanted = (model.in_channels, stage.frames, *model.latent_size)
    if found != wanted:
        raise UserError(
            f"a clip of the data is {found}, but the stage and model '{model.name}' take {wanted} "
            "(channels, frames, height, width of latents): set frames, or give other data"
        )
