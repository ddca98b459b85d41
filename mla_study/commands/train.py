"""``mla-study train``: one stage of training, on one process or torchrun's many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mla_study.errors import UserError, tell

if TYPE_CHECKING:
    from mla_study.model.transformer import WanTransformer
    from mla_study.training.recipe import Stage

_EXIT_INTERRUPTED = 130
SHIPPED = "shipped:"


@dataclass(frozen=True)
class Train:
    """Train a model by one objective; the same command goes on after an interruption.

    Objectives: flow (bidirectional teacher), teacher_forcing, consistency, distribution_matching,
    or a .py file of your own. On several GPUs: torchrun --nproc-per-node 8 -m mla_study train ...

    Example: mla-study train flow --preset mini --out runs/teacher --set steps=20
    """

    objective: tyro.conf.Positional[str]
    """Which objective."""
    out: Path = Path("runs/train")
    """Folder of checkpoints, log and the trained model."""
    preset: Literal["mini", "small", "wan-1.3b"] = "mini"
    """Whose hyperparameters; the model's shapes too, where it begins from nothing."""
    start: str | None = None
    """Weights of the generator: any checkpoint, or shipped:dense, shipped:latent, shipped:teacher;
    flow alone begins from nothing without it."""
    teacher: str | None = None
    """Frozen weights that consistency (chunk-causal) and distribution_matching (bidirectional)
    learn from."""
    data: str = "world"
    """world, a folder of videos with captions, or a file of prompts."""
    wan: Path | None = None
    """Folder of Wan2.1 with the VAE and the text encoder, for videos and prompts of your own."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE of the stage, such as steps=50 or optimiser.lr=1e-4; may be repeated."""
    device: str = "cpu"
    """cpu or cuda."""
    dry_run: bool = False
    """Print memory a rank and time of the stage, and do nothing."""
    ranks: int = 8
    """Ranks of the dry run."""
    card: str = "H100"
    """Whose time the dry run estimates."""

    def run(self) -> int:
        """Train, and return the exit code."""
        from mla_study.training.recipe import changed, stages

        known = stages(self.preset)
        name = self.objective.replace("-", "_")
        base = known.get(name)
        if base is None and name.endswith(".py"):
            from dataclasses import replace

            base = replace(known["teacher_forcing"], objective=self.objective, options={})
        if base is None:
            raise UserError(
                f"preset {self.preset} has no stage '{self.objective}'; it has {', '.join(known)}, "
                "or give a .py file with an objective"
            )
        stage = changed(base, self.set)
        return self._planned(stage) if self.dry_run else self._trained(stage)

    def _planned(self, stage: Stage) -> int:
        from mla_study.config import preset
        from mla_study.evaluation.efficiency.train_plan import plan_training

        student = preset(self.preset, latent=stage.objective != "flow")
        plan = plan_training(stage, student, preset(self.preset), self.ranks, self.card)
        print(plan.text())
        return 0

    def _trained(self, stage: Stage) -> int:
        from mla_study.config import preset
        from mla_study.training.data.opening import open_data
        from mla_study.training.loop import Run, Trainer
        from mla_study.training.ranks import ranks
        from mla_study.training.start import fresh_model

        inputs = self._checked(stage)
        with ranks(self.device, stage.precision) as here:
            start = self._model("start", self.start, inputs)
            if start is None:
                start = fresh_model(preset(self.preset), stage.seed)
            teacher = self._model("teacher", self.teacher, inputs)
            data = open_data(
                self.data, start.config, stage.seed, frames=stage.frames, wan=self.wan,
                device=self.device, say=tell if here.first else _silent,
            )  # fmt: skip
            trainer = Trainer(Run(stage, self.out, start, data, teacher, inputs=inputs), here)
            try:
                path = trainer.train()
            except KeyboardInterrupt:
                if here.first:
                    latest = trainer.checkpoints.latest()
                    kept = "there is no checkpoint yet" if latest is None else f"{latest} stays"
                    tell(f"interrupted after step {trainer.step}; {kept}; the same command goes on")
                return _EXIT_INTERRUPTED
            if here.first:
                print(path)
        return 0

    def _checked(self, stage: Stage) -> dict[str, str]:
        """What the objective needs is named; the hash of one's own file, before any weights."""
        from mla_study.study.runs import file_sha256
        from mla_study.training.objective import make_objective

        objective = make_objective(stage.objective, stage.options)
        if self.start is None and stage.objective != "flow":
            raise UserError(
                f"{stage.objective} needs weights to begin from: give --start, a checkpoint or "
                "shipped:dense (and mla-study latentize for a latent one)"
            )
        if self.teacher is None and {"teacher", "fake_score"} & set(objective.roles):
            raise UserError(
                f"{stage.objective} learns from a teacher: give --teacher, a checkpoint or "
                "shipped:teacher"
            )
        own = Path(stage.objective)
        return {"objective": file_sha256(own)} if own.suffix == ".py" else {}

    def _model(self, role: str, name: str | None, inputs: dict[str, str]) -> WanTransformer | None:
        if name is None:
            return None
        import torch

        from mla_study.checkpoints.wan.load import load_model
        from mla_study.world.shipped import shipped

        path: Any = shipped(name.removeprefix(SHIPPED)) if name.startswith(SHIPPED) else name
        model = load_model(path, dtype=torch.float32)
        inputs[role] = _digest(model)
        return model


def _digest(model: WanTransformer) -> str:
    """SHA-256 over a model's weights as they were loaded, whatever file they came in."""
    import hashlib

    made = hashlib.sha256()
    for name, value in model.state_dict().items():
        made.update(name.encode())
        made.update(value.contiguous().numpy().tobytes())
    return made.hexdigest()


def _silent(sentence: str) -> None:
    """What ranks after the first say."""
