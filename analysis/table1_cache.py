"""Table 1: memory and compute of four attention variants, the paper's formulas and our own counts.

The formulas are read from ``results/paper/table1_costs.csv`` and evaluated at Wan 1.3B: N tokens of
21 frames, W of the window 1 + 6 + chunk, D = 1536, n = 12 heads. Beside them stand the bytes that
the cost model counts and those that the cache allocates, and the multiply-adds of attention a token
over those of causal local attention. The paper's formula gives 1.75 for the latent: that counts
values d_c + d_rope wide, as scaled_dot_product_attention computes them; d_c alone is 1.625.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mla_study.config import ModelConfig, WindowConfig, wan_1_3b
from mla_study.evaluation.efficiency.memory import cache_bytes
from mla_study.evaluation.efficiency.model_cost import WINDOWS, chunk_cost, frame_tokens
from mla_study.model.cache import RollingCache
from mla_study.study.formulas import evaluated
from mla_study.study.plots import style
from mla_study.study.runs import file_sha256, round_significant, run_record
from mla_study.study.tables import Column, save_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "table1_cache"
TITLE = "Memory and compute of causal full, local, linear and latent attention"
PROVENANCE = ("modelled", "paper-quoted")
DATA = ("results/paper/table1_costs.csv",)
ROOT = Path(__file__).resolve().parents[1]
FULL, LOCAL = WINDOWS["21 frames"], WINDOWS["1 + 6 + chunk"]
COLUMNS = (
    Column("attention", "Attention"),
    Column("memory_formula", "memory", under="the paper's formulas", quoted=True),
    Column("token_formula", "n-th token", under="the paper's formulas", quoted=True),
    Column("sequence_formula", "N tokens", under="the paper's formulas", quoted=True),
    Column("memory_mb", "memory\n(MB)", ".1f", under="evaluated", quoted=True),
    Column("token_ratio", "compute\n/ local", ".3f", under="evaluated", quoted=True),
    Column("counted_mb", "cost model\n(MB)", ".1f", under="counted here"),
    Column("allocated_mb", "cache\n(MB)", ".1f", under="counted here"),
    Column("flop_ratio", "compute\n/ local", ".3f", under="counted here"),
)
# row -> (column of the paper's table, window, how our model runs it, SDPA's wide values)
ROWS: dict[str, tuple[str | None, WindowConfig, str | None, bool]] = {
    "causal full": ("causal_full", FULL, "dense", False),
    "causal local": ("causal_local", LOCAL, "dense", False),
    "causal linear": ("causal_linear", LOCAL, None, False),
    "latent local, absorbed": ("mla_local", LOCAL, "absorbed", False),
    "the same through SDPA": (None, LOCAL, "absorbed", True),
    "latent local, reconstructed": (None, LOCAL, "reconstruct", False),
}


def symbols(config: ModelConfig) -> dict[str, float]:
    """What the letters of the formulas are at this model."""
    assert config.latent is not None
    tokens = frame_tokens(config)
    return {
        "N": FULL.key_frames * tokens,
        "W": LOCAL.key_frames * tokens,
        "D": config.width,
        "n": config.heads,
        "d_h": config.head_dim,
        "d_c": config.latent.d_c,
        "d_rope": config.latent.d_rope,
    }


def rows(paper: pd.DataFrame) -> pd.DataFrame:
    """The table, bytes a layer and a request in bf16.

    Args:
        paper: a row a metric, a column a variant, formulas as text.
    """
    latent = replace(wan_1_3b(True), layers=1)
    dense = replace(latent, latent=None)
    values, told = symbols(latent), paper.set_index("metric")
    local = _attention_flops(dense, LOCAL, "dense", False)
    local_formula = evaluated(str(told.loc["compute_nth_token", "causal_local"]), values)
    made: list[dict[str, Any]] = []
    for name, (variant, window, form, wide) in ROWS.items():
        row: dict[str, Any] = {"attention": name}
        if variant is not None:
            memory, token, sequence = (
                str(told.loc[metric, variant])
                for metric in ("memory", "compute_nth_token", "compute_n_tokens")
            )
            row |= {
                "memory_formula": memory,
                "token_formula": token,
                "sequence_formula": sequence,
                "memory_mb": 2 * evaluated(memory, values) / 1e6,
                "token_ratio": evaluated(token, values) / local_formula,
            }
        if form is not None:
            config = dense if form == "dense" else latent
            meta = torch.device("meta")
            tokens = frame_tokens(config)
            cache = RollingCache(config, window, 1, tokens, "bf16", meta)
            row |= {
                "counted_mb": cache_bytes(config, window.key_frames) / 1e6,
                "allocated_mb": cache.nbytes / 1e6,
                "flop_ratio": _attention_flops(config, window, form, wide) / local,
            }
        made.append(row)
    return round_significant(pd.DataFrame(made))


def _attention_flops(config: ModelConfig, window: WindowConfig, form: str, wide: bool) -> float:
    """Attention proper; for reconstruction with the expansion that it cannot do without."""
    cost = chunk_cost(config, window, form, passes=1, value_is_key=wide).block["self-attention"]
    if form == "reconstruct":
        return cost.flops
    return sum(phase.flops for phase in cost.phases if phase.kind == "attention")


def draw(out_dir: str) -> Figure:
    """Evaluate, count, and save ``table1_cache.{pdf,png,svg,csv,md}``.

    Args:
        out_dir: where the files go.
    """
    source = ROOT / DATA[0]
    latent = wan_1_3b(True)
    run = run_record(
        config={"figure": ID, "model": latent, "full": FULL, "local": LOCAL},
        inputs={source.name: file_sha256(source)},
        seed=None,
        modules=(f"analysis.{ID}",),
        provenance="modelled",
        validity="full",
    )
    values = {name: f"{value:g}" for name, value in symbols(latent).items()}
    notes = [
        "At Wan 1.3B, bf16, one layer and request: "
        + ", ".join(f"{name} = {value}" for name, value in values.items())
        + ". N are 21 latent frames, W is the window 1 + 6 + chunk (10 frames).",
        "Compute is that of attention a query token over causal local attention. The latent's gain "
        "is memory, not arithmetic: absorbed it does 1.625 times the multiply-adds with values "
        "d_c wide, 1.75 times as the formula has it and as SDPA computes it, where values are "
        "d_c + d_rope wide. Reconstructed it does those of local attention and the expansion of "
        "the latent, shared by the 4680 queries of a chunk.",
    ]
    table = rows(pd.read_csv(source))
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
            rule_before=(3,),
        )
