"""Open any checkpoint for reading."""

from __future__ import annotations

from collections.abc import Callable

from mla_study.checkpoints.formats.container import Container
from mla_study.checkpoints.formats.opening import open_container
from mla_study.checkpoints.locate import locate, read_json
from mla_study.checkpoints.lora import LoraCheckpoint
from mla_study.checkpoints.lora_names import is_lora
from mla_study.checkpoints.reader import Checkpoint, OpenSpec
from mla_study.errors import UserError


def open_checkpoint(
    spec: OpenSpec | str, on_bytes: Callable[[int], None] | None = None
) -> Checkpoint:
    """Open any checkpoint for reading; raises :class:`UserError` for whatever is wrong with it.

    ``spec.config`` names a config that replaces the one beside the weights; ``spec.base`` the dense
    checkpoint that a LoRA file is merged into.
    """
    if isinstance(spec, str):
        spec = OpenSpec(spec)
    located = locate(spec.path)
    config, config_path = located.config, located.config_path
    if spec.config is not None:
        config, config_path = read_json(spec.config), spec.config
    containers: list[Container] = []
    try:
        for file in located.files:
            containers.append(open_container(file, weights=spec.weights, on_bytes=on_bytes))
        checkpoint = Checkpoint(spec, located, containers, config, config_path)
        if is_lora(checkpoint):
            base = None
            if spec.base is not None:
                base = open_checkpoint(OpenSpec(spec.base, config=spec.config), on_bytes)
            return LoraCheckpoint(checkpoint, base)
    except UserError:
        for container in containers:
            container.close()
        raise
    if spec.base is not None:
        checkpoint.close()
        raise UserError(f"{spec.path} holds no LoRA tensors to merge: leave out --base")
    return checkpoint
