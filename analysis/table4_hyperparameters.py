"""Table 4: hyperparameters, printed from the presets, beside the paper's.

``wan-1.3b`` is compared, value by value, with what the paper's Table 4 and its text and appendix
state (``results/paper``); what they do not state is this project's choice and says so. ``small``
and ``mini`` stand beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mla_study.config import LatentConfig, ModelConfig, preset
from mla_study.study.plots import style
from mla_study.study.runs import file_sha256, run_record
from mla_study.study.tables import Column, rules_between, save_table
from mla_study.training.recipe import Stage, stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table4_hyperparameters"
TITLE = "Hyperparameters: the presets beside the paper's"
PROVENANCE = ("modelled", "paper-quoted")
DATA = ("results/paper/table4_hyperparameters.csv", "results/paper/training_settings.csv")
ROOT = Path(__file__).resolve().parents[1]
COMPARED = "wan-1.3b"
BESIDE = ("small", "mini")
EQUAL, DIFFERENT, UNSTATED, NO_SETTING = "equal", "different", "not stated", "no setting here"
STAGES = {
    "teacher_forcing": "teacher forcing",
    "consistency": "consistency",
    "distribution_matching": "DMD",
}
PLACES = ("Table 4", "text")
"""Where the paper states what the two files hold."""
COLUMNS = (
    Column("group", "Group"),
    Column("name", "Setting"),
    Column("paper", "Paper", align="right", quoted=True),
    Column("source", "where"),
    Column(COMPARED, "wan-1.3b", align="right"),
    Column("agreement", "against\nthe paper"),
    *(Column(name, name, align="right") for name in BESIDE),
)


@dataclass(frozen=True)
class Preset:
    """A preset's model and stages."""

    model: ModelConfig
    stages: Mapping[str, Stage]

    @property
    def latent(self) -> LatentConfig:
        """Sizes of its latent attention."""
        assert self.model.latent is not None
        return self.model.latent


def preset_of(name: str) -> Preset:
    """The latent model and the stages of that name."""
    return Preset(preset(name, latent=True), stages(name))


def _rate(objective: str) -> Callable[[Preset], str]:
    def told(p: Preset) -> str:
        optimiser = p.stages[objective].optimiser
        return rate(optimiser.lr)

    return told


def _each(value: Callable[[Stage], object]) -> Callable[[Preset], str]:
    """One value if the three stages share it, else theirs in order."""

    def told(p: Preset) -> str:
        held = [str(value(p.stages[objective])) for objective in STAGES]
        return held[0] if len(set(held)) == 1 else " / ".join(held)

    return told


def rate(value: float) -> str:
    """A learning rate as the paper spells it.

    >>> rate(5e-6), rate(4e-7)
    ('5e-6', '4e-7')
    """
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _critic(objective: str) -> Callable[[Preset], str | None]:
    """Its learning rate; None: the stage trains no critic."""

    def told(p: Preset) -> str | None:
        critic = p.stages[objective].critic
        return None if critic is None else rate(critic.lr)

    return told


def _option(objective: str, name: str) -> Callable[[Preset], str]:
    return lambda p: f"{p.stages[objective].options[name]:g}"


def ema_told(stage: Stage) -> str:
    """Decay of a stage's moving average after update s, counted from 0, see the trainer's loop."""
    return f"min({stage.ema:g}, (s+1)/(s+10))" if stage.ema else "none"


def _betas(stage: Stage) -> str:
    return ", ".join(f"{beta:g}" for beta in stage.optimiser.betas)


def _tokens(p: Preset) -> str:
    return " ".join(map(str, p.latent.rope_pairs))


QUOTED: dict[str, tuple[str, str, Callable[[Preset], str | None] | None]] = {
    "backbone": ("model", "backbone", None),
    "blocks": ("model", "blocks", lambda p: str(p.model.layers)),
    "width": ("model", "width", lambda p: str(p.model.width)),
    "ffn_width": ("model", "FFN width", lambda p: str(p.model.ffn_width)),
    "heads": ("model", "heads", lambda p: str(p.model.heads)),
    "head_dim": ("model", "channels of a head", lambda p: str(p.model.head_dim)),
    "d_c": ("latent", "d_c", lambda p: str(p.latent.d_c)),
    "d_q": ("latent", "d_q", lambda p: str(p.latent.d_q)),
    "d_nope": ("latent", "d_nope", lambda p: str(p.latent.d_nope)),
    "d_rope": ("latent", "d_rope", lambda p: str(p.latent.d_rope)),
    "rope_pairs_t_h_w": ("latent", "rotary pairs t h w", _tokens),
    "cached_scalars_a_token_a_layer": (
        "latent", "cached scalars, token and layer", lambda p: str(p.latent.cached_scalars)),
    "precision": ("training", "precision", _each(lambda s: s.precision)),
    "gpus": ("training", "GPUs", None),
    "total_batch": ("training", "total batch", _each(lambda s: s.batch)),
    "lr_teacher_forcing": ("training", "learning rate, teacher forcing", _rate("teacher_forcing")),
    "lr_consistency": ("training", "learning rate, consistency", _rate("consistency")),
    "lr_dmd": ("training", "learning rate, DMD", _rate("distribution_matching")),
    "inference_steps": (
        "inference", "denoising steps", lambda p: str(len(p.model.flow.denoise_steps))),
    "optimiser": ("training", "optimiser", _each(
        lambda s: "Muon, AdamW" if s.optimiser.lr_matrix else "AdamW")),
    "adam_betas": ("training", "Adam betas", _each(_betas)),
    "batch_by_stage": ("training", "batch, TF / CD / DMD", _each(lambda s: s.batch)),
    "guidance_consistency": ("training", "guidance, CD", _option("consistency", "guidance")),
    "guidance_dmd": ("training", "guidance, DMD", _option("distribution_matching", "guidance")),
    "lr_critic_consistency": ("training", "learning rate, critic, CD", _critic("consistency")),
    "lr_critic_dmd": ("training", "learning rate, critic, DMD", _critic("distribution_matching")),
    "critic_updates": ("training", "critic updates a generator's, DMD", _option(
        "distribution_matching", "critic_updates")),
    "ema_dmd": ("training", "EMA decay, DMD", lambda p: ema_told(
        p.stages["distribution_matching"])),
    "timestep_shift": ("training", "timestep shift", lambda p: f"{p.model.flow.shift:g}"),
    "training_timesteps": (
        "training", "training timesteps", lambda p: str(p.model.flow.train_timesteps)),
    "denoising_timesteps": (
        "inference", "denoising timesteps", lambda p: " ".join(
            map(str, p.model.flow.denoise_steps))),
    "window_sink_history_chunk": (
        "inference", "window: sink, history, chunk", lambda p: " ".join(
            map(str, (p.model.window.sink, p.model.window.history, p.model.window.chunk)))),
}  # fmt: skip
"""Name in the paper's files -> group, setting, and how a preset spells it (None: no setting)."""

OWN: tuple[tuple[str, str, Callable[[Preset], str]], ...] = (
    ("training", "steps, TF / CD / DMD", _each(lambda s: s.steps)),
    ("training", "latent frames of a clip", _each(lambda s: s.frames)),
    ("training", "samples a pass and rank, TF / CD / DMD",
     _each(lambda s: "all" if s.micro_batch is None else s.micro_batch)),
    ("training", "weight decay", _each(lambda s: f"{s.optimiser.weight_decay:g}")),
    ("training", "largest gradient norm", _each(lambda s: f"{s.optimiser.clip:g}")),
    ("training", "warm-up updates", _each(lambda s: s.optimiser.warmup)),
    ("training", "EMA decay, TF", lambda p: ema_told(p.stages["teacher_forcing"])),
    ("training", "EMA decay, CD", lambda p: ema_told(p.stages["consistency"])),
)  # fmt: skip


def rows(*papers: Mapping[str, str]) -> pd.DataFrame:
    """The table; ``agreement`` is whether ``wan-1.3b`` spells what the paper does.

    Args:
        papers: name -> value as the paper's table has them, and as its text does.
    """
    presets = {name: preset_of(name) for name in (COMPARED, *BESIDE)}
    made: list[dict[str, str | None]] = []
    for place, paper in zip(PLACES, papers, strict=False):
        for name, value in paper.items():
            group, told, spelt = QUOTED[name]
            row: dict[str, str | None] = {"group": group, "name": told, "paper": value}
            row |= {n: None if spelt is None else spelt(p) for n, p in presets.items()}
            if name == "backbone":
                row |= {n: p.model.name for n, p in presets.items()}
            own = row[COMPARED]
            same = name == "backbone" and value.lower().endswith(str(own).removeprefix("wan-"))
            agrees = EQUAL if same or own == value else DIFFERENT
            row |= {"source": place, "agreement": NO_SETTING if own is None else agrees}
            made.append(row)
    for group, told, spelt in OWN:
        row = {"group": group, "name": told, "agreement": UNSTATED, "paper": None, "source": None}
        made.append(row | {n: spelt(p) for n, p in presets.items()})
    order = list(dict.fromkeys(row["group"] for row in made))
    made.sort(key=lambda row: order.index(row["group"]))
    return pd.DataFrame(made)


def quoted(source: Path) -> dict[str, str]:
    """What a file has of the paper."""
    frame = pd.read_csv(source, dtype=str)
    return dict(zip(frame["name"], frame["value"], strict=True))


def draw(out_dir: str) -> Figure:
    """Print, compare, and save ``table4_hyperparameters.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
    """
    sources = [ROOT / name for name in DATA]
    run = run_record(
        config={
            "figure": ID,
            "presets": {
                name: {"model": held.model, "stages": dict(held.stages)}
                for name in (COMPARED, *BESIDE)
                if (held := preset_of(name))
            },
        },
        inputs={source.name: file_sha256(source) for source in sources},
        seed=None,
        modules=(f"analysis.{ID}",),
        provenance="modelled",
        validity="full",
    )
    table = rows(*map(quoted, sources))
    breaks = rules_between(table, "group")
    table["group"] = table["group"].where(~table["group"].duplicated(), "")
    updates = stages(COMPARED)["distribution_matching"].steps
    notes = [
        "Printed from the presets. 'text': stated in the paper's text or appendix, not in its "
        "Table 4; 'not stated': in neither as far as results/paper quotes them, our choice; 'no "
        "setting here': the number of ranks is that of the launch, and our CD trains no critic. "
        "TF: teacher forcing, CD: consistency, DMD: distribution matching; one value holds for all "
        "three.",
        "Where the preset differs: of batches the paper's table says 128 and its appendix "
        "2 / 2 / 16, and the preset follows the table and accumulates passes; its moving average "
        "gives the first updates (s = 0, 1, ...) more weight, and its decay is at "
        f"{updates / (updates + 9):.3f} by the last of the {updates} updates of DMD, where the "
        "paper's is .99 from the first.",
        "Guidance of 3 is read as uncond + 3 (cond − uncond) in CD and as cond + 3 (cond − uncond) "
        "in DMD, as is usual in code of either. The paper does not say whether its history of 6 "
        "holds the chunk that is being made; ours does not. small and mini are the miniature's "
        "(GPU, CPU).",
    ]
    with style():
        return save_table(
            table,
            Path(out_dir) / ID,
            COLUMNS,
            provenance=PROVENANCE,
            validity="full",
            run_hash=run["run_hash"],
            title=TITLE,
            notes=notes,
            rule_before=breaks,
        )
