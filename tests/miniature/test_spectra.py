"""Singular values of whole models against dense float64 matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from model.tiny import BOTH, make

from mla_study.checkpoints.wan.save import save_model
from mla_study.config import mini
from mla_study.miniature.plan import Node, Plan, Variant, start_nodes, training_nodes
from mla_study.miniature.spectra import singular_values_of, spectra, state_of
from mla_study.miniature.store import MODEL, Store
from mla_study.training.start import fresh_model
from mla_study.world.shipped import shipped


def operator(state: Mapping[str, torch.Tensor], layer: int) -> np.ndarray:
    """[W_K; W_V] or the composed operator, dense in float64."""
    at = {
        name.removeprefix(f"blocks.{layer}.self_attn."): value.double().numpy()
        for name, value in state.items()
        if name.startswith(f"blocks.{layer}.self_attn.")
    }
    if "k.weight" in at:
        return np.concatenate([at["k.weight"], at["v.weight"]])
    up = np.concatenate([at["k_up.weight"], at["v_up.weight"]])
    return up @ (at["kv_norm.weight"][:, None] * at["kv_down.weight"])


@pytest.mark.parametrize(
    ("kind", "name", "count"), [("dense", "kv", 36), ("latent", "composed", 11)]
)
def test_values_are_those_of_dense_float64_matrices(
    kind: str, name: str, count: int, seed: int
) -> None:
    state = make(BOTH[kind], seed).state_dict()
    root = np.random.default_rng(seed).normal(size=(36, 5))
    table = pd.DataFrame(singular_values_of(state, {1: root}))
    assert set(table["operator"]) == {name}
    assert set(table[table["layer"] == 0]["gauge"]) == {"raw"}
    for layer, gauge, right in ((0, "raw", np.eye(36)), (1, "weighted-raw", root)):
        mine = table[(table["layer"] == layer) & (table["gauge"] == gauge)]
        assert mine["index"].tolist() == list(range(1, count + 1))
        want = np.linalg.svd(operator(state, layer) @ right, compute_uv=False)[:count]
        want = np.pad(want, (0, count - len(want)))
        np.testing.assert_allclose(mine["sigma"], want, rtol=1e-5, atol=1e-6 * want[0])


def test_students_before_and_after_and_the_teacher_on_its_inputs(tmp_path: Path) -> None:
    teacher = {"run": "teacher", "variant": "teacher", "init": "none", "d_c": 0, "d_rope": 0,
               "seed": 0, "stage": "teacher"}  # fmt: skip
    student = Variant("activation", 4, seed=1)
    nodes = [Node("teacher", "teacher", {}, about=teacher), *start_nodes(student)]
    dense = [dataclasses.replace(node, needs={}) for node in training_nodes(Variant(seed=1))]
    plan = Plan([*nodes, *dense, *training_nodes(student)])
    store = Store(tmp_path, shipped("codec"))
    states = {node.name: state_of(node) for node in plan}
    assert (
        states["activation-4-s1/start"] == "start" and states["untrained-4-s1/start"] == "untrained"
    )
    assert states["activation-4-s1/dmd"] == "trained" and states["activation-4-s1/tf"] == ""
    latent = dataclasses.replace(mini(latent=True), latent=student.latent)
    for number, (name, state) in enumerate(states.items()):
        config = mini() if name.startswith(("teacher", "dense")) else latent
        if state:
            target = store.place(plan, name) / MODEL
            save_model(fresh_model(config, number), target, "latent")
    found = spectra(plan, store)
    by = found.groupby(["run", "state", "operator", "gauge"])["index"].agg(["max", "size"])
    at = {key: tuple(value) for key, value in zip(by.index, by.to_numpy().tolist(), strict=True)}
    assert at["activation-4-s1", "trained", "composed", "raw"] == (4, 16)
    assert at["dense-s1", "trained", "kv", "raw"] == (96, 384)
    assert at["teacher", "teacher", "kv", "weighted-raw"] == (96, 384)
    assert len(at) == 7 and "before" not in found
