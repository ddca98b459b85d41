"""Muon against float64 by hand, and who gets which optimiser."""

from __future__ import annotations

import numpy as np
import torch
from training.runs import DENSE

from mla_study.training.optimisers import (
    COEFFICIENTS,
    Muon,
    make_optimisers,
    orthogonalised,
    set_rates,
)
from mla_study.training.recipe import Optimiser
from mla_study.training.start import fresh_model


def test_singular_values_come_near_one(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for shape in ((24, 24), (48, 24), (7, 31)):
        made = orthogonalised(torch.randn(shape, generator=draw))
        values = torch.linalg.svdvals(made.double())
        assert made.shape == shape
        assert float(values.max()) < 1.3
        assert float(values.median()) > 0.6


def by_hand(w: np.ndarray, grads: list[np.ndarray], lr: float, beta: float) -> np.ndarray:
    a, b, c = COEFFICIENTS
    held = np.zeros_like(w)
    for g in grads:
        held = beta * held + g
        u, s, vt = np.linalg.svd(g + beta * held, full_matrices=False)
        x = s / np.linalg.norm(s)
        for _ in range(5):
            x = a * x + b * x**3 + c * x**5
        w = w - lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * (u * x) @ vt
    return w


def test_updates_are_those_of_float64(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for shape in ((9, 5), (5, 9)):
        start, grads = draw.normal(size=shape), [draw.normal(size=shape) for _ in range(3)]
        p = torch.nn.Parameter(torch.from_numpy(start.copy()))
        muon = Muon([p], lr=0.02, momentum=0.95)
        for g in grads:
            p.grad = torch.from_numpy(g)
            muon.step()
        np.testing.assert_allclose(p.detach(), by_hand(start, grads, 0.02, 0.95), atol=1e-10)


def test_muon_gets_the_blocks_matrices_alone() -> None:
    model = fresh_model(DENSE)
    adam, muon = make_optimisers(model, Optimiser(1e-3, 2e-2))
    named = {id(p): n for n, p in model.named_parameters()}
    mine = {named[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {named[id(p)] for group in adam.param_groups for p in group["params"]}
    assert all(n.startswith("blocks.") for n in mine) and mine | rest == set(named.values())
    assert not mine & rest and "blocks.0.self_attn.k.weight" in mine
    assert {"head.head.weight", "blocks.0.self_attn.k.bias"} <= rest
    set_rates([adam, muon], Optimiser(1e-3, 2e-2), 0.5)
    assert (adam.param_groups[0]["lr"], muon.param_groups[0]["lr"]) == (5e-4, 1e-2)
    assert len(make_optimisers(model, Optimiser(1e-3))) == 1
