"""Projections in fp8 against float64 products of the same rounded factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rollout.rollouts import LATENT, model_of, run
from torch import nn

from mla_study.config import LatentConfig
from mla_study.errors import UserError
from mla_study.model.fp8 import Fp8Linear, quantize_rows, require_fp8, to_fp8


@pytest.mark.parametrize("bias", [True, False])
def test_fp8_is_the_product_of_the_rounded_factors(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    x = torch.randn(2, 5, 64) * torch.logspace(-3, 3, 5)[:, None]
    made = Fp8Linear(linear)(x)
    (a, sa), (b, sb) = quantize_rows(x.flatten(0, 1)), quantize_rows(linear.weight.detach())
    wanted = ((a.double() * sa.double()) @ (b.double() * sb.double()).T).unflatten(0, (2, 5))
    exact = x.double() @ linear.weight.detach().double().T
    if bias:
        wanted, exact = wanted + linear.bias.double(), exact + linear.bias.double()
    assert made.dtype == x.dtype and made.shape == (2, 5, 48)
    errors = [((made - truth).norm(dim=-1) / truth.norm(dim=-1)).max() for truth in (wanted, exact)]
    assert errors[0] < 4e-3 and errors[1] < 6e-2


def test_fp8_of_zeros_and_of_nothing_finite() -> None:
    layer = Fp8Linear(nn.Linear(16, 16, bias=False))
    assert not layer(torch.zeros(3, 16)).any()
    assert not torch.isfinite(layer(torch.full((3, 16), torch.nan))).any()


def test_fp8_takes_over_what_it_may() -> None:
    config = replace(LATENT, latent=LatentConfig(16, 16, 10, 6, (1, 1, 1)))
    model = model_of(config)
    wanted = run(model)
    done = to_fp8(model)
    assert {name.partition(".")[2] for name in done} == {
        "self_attn.o", "self_attn.q_down", "self_attn.kv_down", "cross_attn.q", "cross_attn.o",
        "ffn.0", "ffn.2",
    }  # fmt: skip
    assert isinstance(model.blocks[0].self_attn.k_up, nn.Linear)  # type: ignore[union-attr]
    made = run(model)
    gap = float((made[0] - wanted[0]).norm() / wanted[0].norm())
    assert 1e-4 < gap < 0.2


def test_an_older_gpu_has_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match=r"A100 has 8\.0"):
        require_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    require_fp8(torch.device("cuda"))
