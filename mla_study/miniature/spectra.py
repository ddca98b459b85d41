"""Singular values of what a finished study trained, for figures of whole spectra.

The operator is [W_k_up; W_v_up] diag(g) W_kv_down of latent self-attention and [W_K; W_V] of dense
one, as :mod:`mla_study.probes.tracker` measures it along training; here stand all singular values,
of students before and after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.miniature.plan import Node, Plan
from mla_study.miniature.store import MODEL, Store

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from mla_study.probes.tracker import State

INPUT_CLIPS = 8
"""Held-out clips that the teacher's inputs come from, as those of the tracked ranks."""


def state_of(node: Node) -> str:
    """``teacher``, ``start``, ``untrained`` or ``trained`` (the last stage); '' for all others."""
    if node.kind == "teacher":
        return "teacher"
    if node.kind == "convert":
        return "untrained" if node.about["init"] == "untrained" else "start"
    return "trained" if node.kind == "train" and node.about["stage"] == "dmd" else ""


def spectra(plan: Plan, store: Store) -> pd.DataFrame:
    """A row a singular value of a finished plan.

    Columns: what describes the node, ``state`` (see :func:`state_of`), ``layer``, ``operator``
    (``kv`` or ``composed``), ``gauge`` (``raw``; of the teacher also ``weighted-raw``, outputs on
    the inputs of held-out clips), ``index`` from 1, ``sigma``, and the operator's sizes ``m, n``.
    """
    import pandas as pd
    from safetensors.torch import load_file

    rows: list[dict[str, Any]] = []
    for node in plan:
        if not (state := state_of(node)):
            continue
        folder = store.place(plan, node.name)
        roots = _roots(folder, store.codec) if state == "teacher" else {}
        about = {name: value for name, value in node.about.items() if name != "before"}
        for row in singular_values_of(load_file(folder / MODEL), roots):
            rows.append({**about, "state": state, **row})
    return pd.DataFrame(rows)


def singular_values_of(
    state: State, roots: dict[int, np.ndarray] | None = None
) -> Iterator[dict[str, Any]]:
    """``layer, operator, gauge, index, sigma, m, n`` of every self-attention of a state dict.

    Args:
        roots: layer -> root [n, c] of its inputs' second moment; gives the weighted gauge too.
    """
    from mla_study.checkpoints.held import checkpoint_of
    from mla_study.checkpoints.operators.find import find_operators
    from mla_study.probes.block import measure_block
    from mla_study.probes.layer import Request
    from mla_study.probes.stacks import Weights

    checkpoint = checkpoint_of(state, "the model")
    request = Request(("kv", "composed"), ("raw",))
    for attention in find_operators(checkpoint).attentions:
        if attention.kind != "self":
            continue
        root = (roots or {}).get(attention.layer)
        for found in measure_block(Weights(checkpoint), attention, request, root).spectra:
            held = found.sigma if found.inner is None else found.sigma[: found.inner]
            for index, sigma in enumerate(held, 1):
                yield {
                    "layer": attention.layer, "operator": found.operator, "gauge": found.gauge,
                    "index": index, "sigma": float(sigma), "m": found.m, "n": found.n,
                }  # fmt: skip


def _roots(folder: Path, codec: Path) -> dict[int, np.ndarray]:
    """Roots of the second moments of what enters the teacher's self-attention, by layer."""
    from mla_study.checkpoints.wan.load import load_model
    from mla_study.miniature.watch import HeldOutLoss
    from mla_study.miniature.work import data
    from mla_study.probes.block import root_of
    from mla_study.probes.tracker import attention_inputs

    model = load_model(folder / MODEL)
    loss = HeldOutLoss(data(0, codec), model.config, INPUT_CLIPS)
    found: dict[int, np.ndarray] = {}
    for layer, tokens in attention_inputs(model, lambda: loss(model)).items():
        x = tokens.double()
        found[layer] = root_of((x.T @ x / len(x)).numpy())[0]
    return found
