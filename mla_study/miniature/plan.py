"""What the study trains and judges, as a graph of nodes whose keys say all that they depend on.

A node is a conversion, a training stage, or a judgement; its key is the SHA-256 of its kind, its
settings and the keys of what it needs. So equal work is done once, whoever asks, and goes on after
an interruption; a changed setting makes what follows from it anew, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from mla_study.config import LatentConfig, WindowConfig, mini
from mla_study.errors import UserError
from mla_study.miniature.judge import Trial
from mla_study.model.latent_init import default_pairs
from mla_study.study.runs import json_sha256
from mla_study.training.recipe import Stage, stages

Kind = Literal["teacher", "untrained", "convert", "train", "judge"]

SEEDS = (0, 1, 2)
D_C = (2, 4, 12, 24, 48)
ROPES = (6, 8, 16, 24)
"""Rotary channels of a head of 32 in the sweep of the split."""
OBSERVED = {
    "tf": (0, 10, 25, 50, 100, 150, 200, 250),
    "cd": (50, 100),
    "dmd": (20, 40),
}
LONG = 6
"""How many times the steps of teacher forcing the long run of the random init gets."""


@dataclass(frozen=True)
class Node:
    """A piece of work.

    Attributes:
        name: such as ``activation-12-s0/tf``; for people and folders.
        settings: plain values that say what is done.
        needs: role -> name of the node whose result takes it.
        about: columns that describe the result in tables.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any]
    needs: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


class Plan:
    """Nodes by name, each after what it needs."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes: dict[str, Node] = {}
        for node in nodes:
            missing = [name for name in node.needs.values() if name not in self.nodes]
            if missing:
                raise ValueError(f"{node.name} needs {missing[0]}, which is not planned before it")
            self.nodes.setdefault(node.name, node)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def keys(self) -> dict[str, str]:
        """SHA-256 (hex) of each node."""
        made: dict[str, str] = {}
        for node in self:
            parts = {
                "kind": node.kind,
                "settings": node.settings,
                "needs": {role: made[name] for role, name in node.needs.items()},
            }
            made[node.name] = json_sha256(parts)
        return made

    def folder(self, name: str) -> str:
        """Where a node's result lies inside a store."""
        return f"{name.replace('/', '.')}-{self.keys[name][:10]}"


@dataclass(frozen=True)
class Variant:
    """A student: dense, or latent of an init, with a seed that all of its randomness follows.

    ``init`` None is dense; ``untrained`` is the spectral conversion of a dense network of random
    weights, a control.
    """

    init: str | None = None
    d_c: int = 12
    d_rope: int = 8
    seed: int = 0
    tf_steps: int | None = None

    @property
    def name(self) -> str:
        """Such as ``activation-12-s0``; a split or length of its own is told."""
        parts = ["dense"] if self.init is None else [self.init, str(self.d_c)]
        parts += [f"r{self.d_rope}"] if self.d_rope != 8 else []
        parts += [f"t{self.tf_steps}"] if self.tf_steps is not None else []
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def latent(self) -> LatentConfig | None:
        """Sizes of its latent attention."""
        if self.init is None:
            return None
        base = mini(latent=True)
        assert base.latent is not None
        return replace(
            base.latent,
            d_c=self.d_c,
            d_nope=base.head_dim - self.d_rope,
            d_rope=self.d_rope,
            rope_pairs=default_pairs(self.d_rope, base.head_dim),
        )

    @property
    def about(self) -> dict[str, Any]:
        """Columns of tables."""
        return {
            "run": self.name,
            "variant": "dense" if self.init is None else "latent",
            "init": self.init or "none",
            "d_c": 0 if self.init is None else self.d_c,
            "d_rope": 0 if self.init is None else self.d_rope,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Sizes:
    """How much is judged: videos at 1x, 10x and 100x the training length (0: not at all)."""

    short: int = 64
    long: int = 64
    longest: int = 0


def stage_of(objective: str, seed: int, **changes: Any) -> Stage:
    """The miniature's stage with a seed."""
    return replace(stages("mini")[objective], seed=seed, **changes)


def teacher_node(trained_by: Stage | None, sha256: str | None) -> Node:
    """The bidirectional teacher: the shipped file of that hash, or one that is trained."""
    settings = {"sha256": sha256} if trained_by is None else {"stage": plain(trained_by)}
    about = {"run": "teacher", "variant": "teacher", "init": "none", "d_c": 0, "d_rope": 0,
             "seed": 0, "stage": "teacher"}  # fmt: skip
    return Node("teacher", "teacher", settings, about=about)


def plain(value: Any) -> Any:
    """A dataclass as plain values."""
    return dataclasses.asdict(value)


def _start(variant: Variant) -> str:
    """The node of the weights that a student starts from."""
    if variant.init is None:
        return "teacher"
    return f"{replace(variant, tf_steps=None).name}/start"


def _controls(variant: Variant) -> dict[str, str]:
    """What a student's ranks stand beside: a network that has seen nothing, and another init."""
    if variant.init is None:
        return {"untrained": f"untrained-s{variant.seed}"}
    other = "spectral" if variant.init == "activation" else "activation"
    beside = replace(variant, tf_steps=None, init=other)
    return {
        "untrained": _start(replace(beside, init="untrained")),
        f"other.{other}": _start(beside),
    }


def start_nodes(variant: Variant) -> list[Node]:
    """What a student starts from, and what its ranks stand beside."""
    made = [Node(f"untrained-s{variant.seed}", "untrained", {"seed": variant.seed})]
    if variant.init is None:
        return made
    variant = replace(variant, tf_steps=None)
    for name in _controls(variant).values():
        init = next(i for i in ("untrained", "spectral", "activation") if name.startswith(f"{i}-"))
        made += _conversion(replace(variant, init=init))
    return [*made, *_conversion(variant)]


def _conversion(variant: Variant) -> list[Node]:
    made: list[Node] = []
    source, init = "teacher", str(variant.init)
    if init == "untrained":
        source, init = f"untrained-s{variant.seed}", "spectral"
    settings = {"latent": plain(variant.latent), "init": init, "seed": variant.seed}
    about = variant.about | {"stage": "start"}
    made.append(Node(f"{variant.name}/start", "convert", settings, {"teacher": source}, about))
    return made


def training_nodes(variant: Variant) -> list[Node]:
    """Teacher forcing, consistency (by the dense model that the same seed gave), DMD."""
    start = _start(variant)
    watched = {"origin": start, "source": "teacher", **_controls(variant)}
    # the numbers of steps count on, so that ranks can be drawn along all stages
    made: list[Node] = []
    steps = 0
    dense = replace(variant, init=None, tf_steps=None, d_c=12, d_rope=8)
    for short, objective in (
        ("tf", "teacher_forcing"), ("cd", "consistency"), ("dmd", "distribution_matching"),
    ):  # fmt: skip
        changes: dict[str, Any] = {}
        observe = OBSERVED[short]
        if short == "tf" and variant.tf_steps is not None:
            changes["steps"] = variant.tf_steps
            # the shared points, and on beyond them
            observe = sorted({*observe, *range(250, variant.tf_steps + 1, 250)})
        stage = stage_of(objective, variant.seed, **changes)
        needs = {"start": start, **watched}
        if short == "cd":
            needs["teacher"] = f"{dense.name}/tf"
        elif short == "dmd":
            needs["teacher"] = "teacher"
        observe = [step for step in observe if step <= stage.steps]
        settings = {"stage": plain(stage), "observe": observe}
        about = variant.about | {"stage": short, "before": steps}
        made.append(Node(f"{variant.name}/{short}", "train", settings, needs, about))
        start = f"{variant.name}/{short}"
        steps += stage.steps
    return made


def judge_node(model: Node, trial: Trial, label: str) -> Node:
    """A judgement of a node's model; ``label`` is the condition, ``plain`` for none."""
    about = {**model.about, "clips": trial.clips, "condition": label}
    name = f"{model.name}/{label}-{trial.clips}x"
    return Node(name, "judge", {"trial": plain(trial)}, {"model": model.name}, about)


def student(variant: Variant, sizes: Sizes, judged: Iterable[str] = ("cd", "dmd")) -> list[Node]:
    """All nodes of a student; long rollouts are those of its last stage."""
    made = [*start_nodes(variant), *training_nodes(variant)]
    last = made[-1]
    for node in list(made):
        if str(node.about.get("stage")) in judged and sizes.short:
            made.append(judge_node(node, Trial(sizes.short, 1, variant.seed), "plain"))
    for videos, clips in ((sizes.long, 10), (sizes.longest, 100)):
        if videos:
            made.append(judge_node(last, Trial(videos, clips, variant.seed), "plain"))
    return made


def ablations(model: Node, seed: int, videos: int, only: Iterable[str] | None = None) -> list[Node]:
    """The same student rolled out otherwise, at ten times the training length; all, or some."""
    base = Trial(videos, 10, seed)
    other: dict[str, Trial] = {
        "no-clean-pass": replace(base, clean_pass=False),
        "int8-token": replace(base, storage="int8-token"),
        "int8-channel": replace(base, storage="int8-channel"),
        "absolute": replace(base, positions="absolute"),
        "no-sink": replace(base, window=WindowConfig(0, 6, 3)),
        "history-3": replace(base, window=WindowConfig(1, 3, 3)),
        "history-0": replace(base, window=WindowConfig(1, 0, 3)),
        "sink-3": replace(base, window=WindowConfig(3, 4, 3)),
    }
    return [
        judge_node(model, trial, label)
        for label, trial in other.items()
        if only is None or label in only
    ]


def mini_study(teacher: Node) -> Plan:
    """One seed of the dense student and of three inits: minutes on a laptop."""
    nodes = [teacher, judge_node(teacher, Trial(64, 1, 0), "plain")]
    for init in (None, "activation", "spectral", "random"):
        nodes += student(Variant(init), Sizes(64, 64))
    return Plan(nodes)


def full_study(teacher: Node, seeds: Sequence[int] = SEEDS, swept: Sequence[int] = SEEDS) -> Plan:
    """All inits, the sweeps of d_c and of the split, long rollouts, ablations and controls."""
    nodes = [teacher]
    for seed in seeds:
        nodes.append(judge_node(teacher, Trial(256, 1, seed), f"plain-s{seed}"))
        for init in (None, "activation", "spectral", "random", "spectral-raw"):
            longest = 32 if init in (None, "activation") else 0
            made = student(Variant(init, seed=seed), Sizes(256, 256, longest), ("tf", "cd", "dmd"))
            nodes += made
            if init in (None, "activation"):
                last = next(n for n in made if n.about.get("stage") == "dmd" and n.kind == "train")
                nodes += ablations(
                    last, seed, 64, ("absolute", "no-sink") if init is None else None
                )
    for seed in swept:
        for d_c in D_C:
            nodes += student(Variant("activation", d_c, seed=seed), Sizes(256, 0))
        for d_rope in ROPES:
            nodes += student(Variant("activation", d_rope=d_rope, seed=seed), Sizes(256, 0))
        long = stages("mini")["teacher_forcing"].steps * LONG
        nodes += student(Variant("random", seed=seed, tf_steps=long), Sizes(256, 0))
    return Plan(nodes)


STUDIES = {"mini": mini_study, "full": full_study}


def study(name: str, teacher: Node) -> Plan:
    """The plan of that name.

    Raises:
        UserError: there is none.
    """
    if name not in STUDIES:
        raise UserError(f"There is no study '{name}'; there are {', '.join(STUDIES)}.")
    return STUDIES[name](teacher)
