"""``mla-study train``: one stage of training, on one process or torchrun's many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mla_study.errors import UserError, counted, tell

if TYPE_CHECKING:
    from mla_study.model.transformer import WanTransformer
    from mla_study.training.ranks import Ranks
    from mla_study.training.recipe import Stage

_EXIT_INTERRUPTED = 130
SHIPPED = "shipped:"
_TEACHERS = {
    "consistency": (
        "the dense model after teacher forcing (such as that of mla-study train teacher_forcing "
        "--generator shipped:teacher)"
    ),
    "distribution_matching": "a bidirectional checkpoint or shipped:teacher",
}
_SMALL = 10_000_000
"""Parameters below which threads wait for each other longer than they compute; the miniature has
less than a million."""


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
    generator: str | None = None
    """Weights that training begins from: any checkpoint, or shipped:dense, shipped:latent,
    shipped:teacher; flow alone begins from nothing without it."""
    teacher: str | None = None
    """Frozen weights to learn from: for consistency a chunk-causal model, the dense one after
    teacher_forcing; for distribution_matching a bidirectional one, such as shipped:teacher."""
    data: str = "world"
    """world, a folder of videos with captions, or a file of prompts."""
    wan: Path | None = None
    """Folder of Wan2.1 with the VAE and the text encoder, for videos and prompts of your own."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE of the stage, such as steps=50 or optimiser.lr=1e-4; may be repeated."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int | None = None
    """Threads of torch on the CPU (default: those that the run began with; at first its own choice,
    and one for a model as small as the miniature)."""
    dry_run: bool = False
    """Print memory a rank and time of the stage, and do nothing."""
    ranks: int | None = None
    """Ranks of the dry run (default: 8 for wan-1.3b, else 1)."""
    card: str | None = None
    """Whose memory and time the dry run holds it against (default: H100 for wan-1.3b and for
    --device cuda, else this machine)."""

    def run(self) -> int:
        """Train, and return the exit code."""
        from mla_study.training.recipe import changed, stages

        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads is {self.threads}, but it must be at least 1")
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
        from mla_study.evaluation.efficiency.host import this_host
        from mla_study.evaluation.efficiency.train_plan import plan_training

        wan = self.preset == "wan-1.3b"
        ranks = (8 if wan else 1) if self.ranks is None else self.ranks
        card = self.card or ("H100" if wan or self.device.startswith("cuda") else None)
        student, teacher = (
            preset(self.preset, latent=stage.objective != "flow"),
            preset(self.preset),
        )
        host = None if card else this_host(self.preset, stage, student, teacher, ranks)
        print(plan_training(stage, student, teacher, ranks, card, host).text())
        return 0

    def _trained(self, stage: Stage) -> int:
        from mla_study.config import preset
        from mla_study.training.data.opening import open_data
        from mla_study.training.loop import Run, Trainer
        from mla_study.training.ranks import ranks
        from mla_study.training.start import fresh_model

        inputs = self._checked(stage)
        with ranks(self.device, stage.precision) as here:
            if here.first and self.teacher is not None and stage.objective == "consistency":
                _warn_of_teacher(self.teacher)
            start = self._model("generator", self.generator, inputs)
            if start is None:
                start = fresh_model(preset(self.preset), stage.seed)
            self._use_threads(start, here)
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
        if self.generator is None and stage.objective != "flow":
            raise UserError(
                f"{stage.objective} needs weights to begin from: give --generator, a checkpoint or "
                "shipped:dense (and mla-study latentize for a latent one)"
            )
        if self.teacher is None and {"teacher", "fake_score"} & set(objective.roles):
            which = _TEACHERS.get(stage.objective, "a checkpoint")
            raise UserError(f"{stage.objective} learns from a teacher: give --teacher, {which}")
        own = Path(stage.objective)
        return {"objective": file_sha256(own)} if own.suffix == ".py" else {}

    def _use_threads(self, model: WanTransformer, here: Ranks) -> None:
        """As many as were asked for, or as the run has gone on with so far; changes are told."""
        import torch

        from mla_study.training.checkpoint import complete
        from mla_study.training.folder import observed_in

        if here.device.type != "cpu" and self.threads is None:
            return
        small = sum(p.numel() for p in model.parameters()) < _SMALL
        own = 1 if small else torch.get_num_threads()
        seen = observed_in(self.out) if complete(self.out) else {}
        before = seen.get("threads")
        # threads of other ranks say nothing about how many each should have
        kept = before if seen.get("ranks") == here.count else None
        chosen = self.threads or kept or own
        torch.set_num_threads(chosen)
        if not here.first or before is None:
            return
        if chosen != before:
            tell(
                f"the run goes on with {counted(chosen, 'thread')} in place of {before}, which may "
                "change its last digits"
            )
        elif self.threads is None and chosen != own:
            tell(
                f"the run goes on with {counted(chosen, 'thread')}, as before: --threads changes it"
            )

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


def _warn_of_teacher(name: str) -> None:
    """Tell where consistency's teacher is known to have been trained bidirectionally."""
    if _is_bidirectional(name):
        tell(
            f"{name} is bidirectional, but consistency asks its teacher chunk by chunk, which it "
            "was not trained for: the dense model after teacher_forcing is meant"
        )


def _is_bidirectional(name: str) -> bool:
    """Whether weights are the shipped teacher, or what a run of ``flow`` left."""
    from mla_study.study.runs import RUN_FILE, read_record
    from mla_study.world.shipped import FOLDER

    if name.startswith(SHIPPED):
        return name == f"{SHIPPED}teacher"
    path = Path(name)
    if path.absolute() == FOLDER / "teacher.safetensors":
        return True
    record: Any = read_record((path if path.is_dir() else path.parent) / RUN_FILE)
    try:
        return record["identity"]["config"]["stage"]["objective"] == "flow"
    except (KeyError, TypeError):
        return False


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
