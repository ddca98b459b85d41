"""Table 4: hyperparameters, printed from the presets, beside the paper's.

``wan-1.3b`` is compared with ``results/paper/table4_hyperparameters.csv``, value by value; what the
paper does not state is this project's choice and says so. ``small`` and ``mini`` stand beside.
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
DATA = ("results/paper/table4_hyperparameters.csv",)
ROOT = Path(__file__).resolve().parents[1]
COMPARED = "wan-1.3b"
BESIDE = ("small", "mini")
EQUAL, DIFFERENT, UNSTATED, NO_SETTING = "equal", "different", "not stated", "no setting here"
STAGES = {
    "teacher_forcing": "teacher forcing",
    "consistency": "consistency",
    "distribution_matching": "DMD",
}
COLUMNS = (
    Column("group", "Group"),
    Column("name", "Setting"),
    Column("paper", "Paper", align="right", quoted=True),
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


def _critic(p: Preset) -> str:
    stage = p.stages["distribution_matching"]
    return rate((stage.critic or stage.optimiser).lr)


def _betas(stage: Stage) -> str:
    return ", ".join(f"{beta:g}" for beta in stage.optimiser.betas)


def _tokens(p: Preset) -> str:
    return " ".join(map(str, p.latent.rope_pairs))


QUOTED: dict[str, tuple[str, str, Callable[[Preset], str] | None]] = {
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
}  # fmt: skip
"""Name in the paper's table -> group, setting, and how a preset spells it (None: no setting)."""

OWN: tuple[tuple[str, str, Callable[[Preset], str]], ...] = (
    ("training", "steps, TF / CD / DMD", _each(lambda s: s.steps)),
    ("training", "latent frames of a clip", _each(lambda s: s.frames)),
    ("training", "samples a pass and rank, TF / CD / DMD",
     _each(lambda s: "all" if s.micro_batch is None else s.micro_batch)),
    ("training", "Adam betas", _each(_betas)),
    ("training", "weight decay", _each(lambda s: f"{s.optimiser.weight_decay:g}")),
    ("training", "largest gradient norm", _each(lambda s: f"{s.optimiser.clip:g}")),
    ("training", "warm-up updates", _each(lambda s: s.optimiser.warmup)),
    ("training", "EMA, TF / CD / DMD", _each(lambda s: f"{s.ema:g}")),
    ("training", "guidance, CD / DMD", lambda p: " / ".join(
        f"{p.stages[o].options['guidance']:g}" for o in list(STAGES)[1:])),
    ("training", "learning rate, critic", _critic),
    ("training", "critic updates a generator's", lambda p: str(
        p.stages["distribution_matching"].options["critic_updates"])),
    ("inference", "timestep shift", lambda p: f"{p.model.flow.shift:g}"),
    ("inference", "window: sink, history, chunk", lambda p: " ".join(
        map(str, (p.model.window.sink, p.model.window.history, p.model.window.chunk)))),
)  # fmt: skip


def rows(paper: Mapping[str, str]) -> pd.DataFrame:
    """The table; ``agreement`` is whether ``wan-1.3b`` spells what the paper does.

    Args:
        paper: name -> value as the paper's table has them.
    """
    presets = {name: preset_of(name) for name in (COMPARED, *BESIDE)}
    made: list[dict[str, str | None]] = []
    for name, value in paper.items():
        group, told, spelt = QUOTED[name]
        row: dict[str, str | None] = {"group": group, "name": told, "paper": value}
        row |= {n: None if spelt is None else spelt(p) for n, p in presets.items()}
        if name == "backbone":
            row |= {n: p.model.name for n, p in presets.items()}
        own = row[COMPARED]
        same = name == "backbone" and value.lower().endswith(str(own).removeprefix("wan-"))
        agrees = EQUAL if same or own == value else DIFFERENT
        made.append(row | {"agreement": NO_SETTING if own is None else agrees})
    for group, told, spelt in OWN:
        row = {"group": group, "name": told, "paper": None, "agreement": UNSTATED}
        made.append(row | {n: spelt(p) for n, p in presets.items()})
    order = list(dict.fromkeys(row["group"] for row in made))
    made.sort(key=lambda row: order.index(row["group"]))
    return pd.DataFrame(made)


def quoted(source: Path) -> dict[str, str]:
    """The paper's table."""
    frame = pd.read_csv(source, dtype=str)
    return dict(zip(frame["name"], frame["value"], strict=True))


def draw(out_dir: str) -> Figure:
    """Print, compare, and save ``table4_hyperparameters.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
    """
    source = ROOT / DATA[0]
    run = run_record(
        config={
            "figure": ID,
            "presets": {
                name: {"model": held.model, "stages": dict(held.stages)}
                for name in (COMPARED, *BESIDE)
                if (held := preset_of(name))
            },
        },
        inputs={source.name: file_sha256(source)},
        seed=None,
        modules=(f"analysis.{ID}",),
        provenance="modelled",
        validity="full",
    )
    table = rows(quoted(source))
    breaks = rules_between(table, "group")
    table["group"] = table["group"].where(~table["group"].duplicated(), "")
    notes = [
        "Printed from the presets. 'not stated': the paper's table has no such row; 'no setting "
        "here': the number of ranks is that of the launch. TF: teacher forcing, CD: consistency, "
        "DMD: distribution matching; one value holds for all three.",
        "Of batches the paper's table says 128 and its appendix 2 / 2 / 16: the preset follows the "
        "table and accumulates passes. small and mini are the miniature's (GPU, CPU).",
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
