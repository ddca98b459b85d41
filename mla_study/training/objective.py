"""What the trainer asks of an objective. A further objective is one file, here or anywhere.

An objective is a frozen dataclass whose fields are its options. It names the roles that it needs
beside the ``generator`` (``teacher`` and ``fake_score`` start as copies of the teacher's weights,
``ema`` as one of the generator's), the role that each update of a step trains, and its loss.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from mla_study.config import from_dict
from mla_study.errors import UserError
from mla_study.model.transformer import Conditioning, WanTransformer
from mla_study.training.batch import Batch, Draws

Role = Literal["generator", "teacher", "fake_score", "ema"]
ROLES: tuple[Role, ...] = get_args(Role)
TRAINED: tuple[Role, ...] = ("generator", "fake_score")
"""Roles that gradients reach; the others are constants or follow."""
PACKAGE = "mla_study.training.objectives"


@dataclass(frozen=True)
class Roles:
    """The models of a run; a role that the objective does not name is None.

    Attributes:
        null: text embedding [1, T, E] of a dropped caption.
    """

    generator: WanTransformer
    teacher: WanTransformer | None = None
    fake_score: WanTransformer | None = None
    ema: WanTransformer | None = None
    null: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1, 1, 1))

    def get(self, role: Role) -> WanTransformer:
        """The model of a role.

        Raises:
            UserError: there is none of that name, or the objective did not name it.
        """
        model = self.named().get(role)
        if model is None:
            raise UserError(
                f"the objective asks for the role '{role}', which is not there: name it in "
                f"`roles`, of {', '.join(ROLES)}"
            )
        return model

    def named(self) -> dict[Role, WanTransformer]:
        """All roles that there are."""
        found: dict[Role, WanTransformer] = {}
        for role in ROLES:
            model: WanTransformer | None = getattr(self, role)
            if model is not None:
                found[role] = model
        return found


@dataclass(frozen=True)
class Objective(ABC):
    """Base of all objectives; see :mod:`mla_study.training.objectives.flow` for the shortest."""

    roles: ClassVar[tuple[Role, ...]] = ()
    needs_latents: ClassVar[bool] = True

    def turns(self) -> tuple[Role, ...]:
        """The role that each update of a step trains, in order."""
        return ("generator",)

    @abstractmethod
    def loss(self, turn: Role, roles: Roles, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Scalars by name: ``loss`` is minimised in the role ``turn``, all are logged.

        The trainer refuses what is no dict of tensors of shape [], has no ``loss``, or whose
        ``loss`` carries no gradient (:func:`require_loss`).
        """


def both_flows(
    model: WanTransformer,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    null: Tensor,
) -> tuple[Tensor, Tensor]:
    """A bidirectional model's flow with the prompt and without, in one pass of twice the batch."""
    joined = condition_both(model, context, null)
    cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), joined).chunk(2)
    return cond, uncond


def condition_both(model: WanTransformer, context: Tensor, null: Tensor) -> Conditioning:
    """Conditioning of prompts and, after them, of as many dropped ones."""
    return model.condition(torch.cat([context, null.to(context).expand_as(context)]))


def objective_class(name: str) -> type[Objective]:
    """The objective in ``mla_study/training/objectives/NAME.py``, or in a file of one's own.

    Args:
        name: a module's name, or a path that ends with ``.py``; the file defines ``OBJECTIVE``.

    Raises:
        UserError: there is none of that name, or the file defines none.
    """
    if name.endswith(".py"):
        module = _from_file(Path(name))
    else:
        package = importlib.import_module(PACKAGE)
        known = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
        if name.replace("-", "_") not in known:
            raise UserError(
                f"There is no objective '{name}'; there are {', '.join(known)}, or give a .py file."
            )
        module = importlib.import_module(f"{PACKAGE}.{name.replace('-', '_')}")
    found = getattr(module, "OBJECTIVE", None)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UserError(
            f"{name} defines no OBJECTIVE, a subclass of mla_study.training.objective.Objective"
        )
    if inspect.isabstract(found):
        raise UserError(
            f"{name}: {found.__name__} defines no loss(self, turn, roles, batch, draws)"
        )
    return found


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective with these options; unknown ones and wrong types are told as config's are.

    Raises:
        UserError: also where ``roles`` or ``turns()`` name what no objective can have.
    """
    made = from_dict(dict(options or {}), objective_class(name), f"objective {name}")
    _require_roles(made, name)
    return made


def _require_roles(objective: Objective, name: str) -> None:
    roles: object = objective.roles
    listed = ", ".join(ROLES)
    if not isinstance(roles, tuple | list):
        raise UserError(
            f"objective {name}: roles is {roles!r}, but a tuple is wanted, such as ('teacher',), "
            f"of {listed}"
        )
    if unknown := [role for role in roles if role not in ROLES]:
        raise UserError(f"objective {name}: roles names {unknown[0]!r}; there are {listed}")
    turns: object = objective.turns()
    trained = [role for role in ("generator", *roles) if role in TRAINED]
    if not isinstance(turns, tuple | list) or not turns or any(t not in trained for t in turns):
        raise UserError(
            f"objective {name}: turns() gives {turns!r}, but a tuple of roles that are trained and "
            f"named in `roles` is wanted, here of {', '.join(dict.fromkeys(trained))}"
        )


def require_loss(found: object, name: str, turn: Role) -> dict[str, Tensor]:
    """What an objective's ``loss`` gave, where the trainer can use it.

    Args:
        found: what it gave.
        name: the objective's, for the message.
        turn: the role that is trained.

    Raises:
        UserError: no dict of scalars, none called ``loss``, or one without a gradient.
    """
    where = f"objective {name}, in the {turn}'s turn: loss()"
    wanted = 'return {"loss": a tensor of shape [] made of that role\'s output, ...}'
    if not isinstance(found, Mapping):
        raise UserError(f"{where} gave {type(found).__name__}, but a dict is wanted: {wanted}")
    if "loss" not in found:
        keys = ", ".join(map(repr, found)) or "nothing"
        raise UserError(f"{where} gave {keys} and no 'loss': {wanted}")
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.ndim:
            what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise UserError(f"{where} gave {what} for {key!r}, but it logs scalars: {wanted}")
    if not found["loss"].requires_grad:
        raise UserError(
            f"{where} gave a 'loss' that carries no gradient, as after detach() or under no_grad: "
            f"{wanted}"
        )
    return dict(found)


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"objective_file_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file with an objective")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their annotations up there
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{path} cannot be run ({type(error).__name__}: {error}): mend it"
        ) from None
    return module
