"""Checkpoints of a run: every state of every rank, complete or absent, and the log up to there.

A checkpoint is a folder ``step-00000100`` of torch.distributed.checkpoint, written under a
temporary name and renamed when it is complete; it loads on another number of ranks. The last two
stay.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from mla_study.errors import UserError
from mla_study.training.ranks import Ranks

FOLDER = "checkpoints"
LOG = "log.json"
KEPT = 2
_UNFINISHED = ".tmp"
_INDEX = ".metadata"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in ``out``.

    Attributes:
        models: what is saved of each role.
        optimisers: of the roles that are trained.
    """

    out: Path
    models: Mapping[str, nn.Module]
    optimisers: Mapping[str, Sequence[torch.optim.Optimizer]]
    ranks: Ranks

    @property
    def folder(self) -> Path:
        return self.out / FOLDER

    def latest(self) -> Path | None:
        """The newest complete one."""
        return max(complete(self.out), default=None)

    def _state(self) -> dict[str, Any]:
        options = StateDictOptions(cpu_offload=False)
        state: dict[str, Any] = {}
        for role, model in self.models.items():
            state[role] = get_model_state_dict(model, options=options)
            if role in self.optimisers:
                state[f"{role}.optimiser"] = get_optimizer_state_dict(
                    model, self.optimisers[role], options=options
                )
        return state

    def save(self, step: int, log: Sequence[Mapping[str, Any]]) -> Path:
        """Write the state after ``step`` steps, and the log.

        Raises:
            UserError: weights that nothing can go on from, or it cannot be written; the checkpoint
                before stays.
        """
        self._require_sound(step)
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + _UNFINISHED)
        try:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.ranks.wait()
            with _alone_is_meant():
                state_dict_saver.save(
                    self._state(), checkpoint_id=partial, no_dist=self.ranks.count == 1
                )
            if self.ranks.first:
                (partial / LOG).write_text(json.dumps(list(log)))
                # what stands there and was not gone on from is incomplete
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                self._prune()
        except (OSError, CheckpointException) as error:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"step {step} cannot be saved in {self.folder} ({_reason(error)}): "
                f"{self._last()}; free some space and start again"
            ) from None
        self.ranks.wait()
        return final

    def _require_sound(self, step: int) -> None:
        """Refuse weights that are not finite, or too large for the sum of their squares to be."""
        for role, model in self.models.items():
            if self.ranks.which(not _sound(model)):
                raise UserError(
                    f"step {step}: the {role}'s weights became NaN, infinite or as good as that, "
                    f"and are not saved; {self._last()}: lower the learning rate, or look at "
                    "the data before this step"
                )

    def _last(self) -> str:
        latest = self.latest()
        return "there is no checkpoint yet" if latest is None else f"{latest.name} stays"

    def _prune(self) -> None:
        for old in complete(self.out)[:-KEPT]:
            shutil.rmtree(old)
        for left in self.folder.glob(f"step-*{_UNFINISHED}"):
            shutil.rmtree(left)

    def load(self, path: Path) -> tuple[int, list[dict[str, Any]]]:
        """Take back a state; (steps done, the log up to there).

        Raises:
            UserError: files are missing, damaged, or of other shapes.
        """
        state = self._state()
        try:
            with _alone_is_meant():
                state_dict_loader.load(state, checkpoint_id=path, no_dist=self.ranks.count == 1)
            log = json.loads((path / LOG).read_text())
        except (Exception, CheckpointException) as error:
            before = [found for found in complete(self.out) if found < path]
            on = "goes on from the one before" if before else "begins anew, for there is no other"
            raise UserError(
                f"checkpoint {path} cannot be read ({_reason(error)}): remove it, and the run {on}"
            ) from None
        for role, model in self.models.items():
            set_model_state_dict(model, state[role])
            if role in self.optimisers:
                set_optimizer_state_dict(
                    model, list(self.optimisers[role]), state[f"{role}.optimiser"]
                )
        return step_of(path), log


def complete(out: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first: their index and their log were written last."""
    found = [p for p in (out / FOLDER).glob("step-*") if p.suffix != _UNFINISHED]
    return sorted(p for p in found if (p / _INDEX).exists() and (p / LOG).exists())


def step_of(path: Path) -> int:
    """Steps done at a checkpoint."""
    return int(path.name.removeprefix("step-"))


@contextmanager
def _alone_is_meant() -> Generator[None, None, None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


@torch.no_grad()
def _sound(model: nn.Module) -> bool:
    """Whether the squares of all weights that lie here have a finite sum in float32."""
    total = torch.zeros(())
    for parameter in model.parameters():
        here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        total = total.to(here.device) + here.float().square().sum()
    return bool(total.isfinite())


def _reason(error: BaseException) -> str:
    causes = getattr(error, "failures", None)
    first = next(iter(causes.values())) if causes else error
    inner = first[0] if isinstance(first, tuple) else first
    said = getattr(inner, "strerror", None) or str(inner).strip()
    if not said and isinstance(inner, EOFError):
        said = "a file ends too early"
    # some errors say nothing but their name
    return (said or type(inner).__name__).splitlines()[0][:200]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Unsharded parameters and buffers on the CPU; empty on all ranks but the first."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_model_state_dict(model, options=options)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
