"""A state dict read as a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_study.checkpoints.formats.container import Container
from mla_study.checkpoints.held import Held, checkpoint_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_are_those_of_the_moment(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(5, 3).to(dtype))
    state = {"module.blocks.0.self_attn.k.weight": weight}
    held = Held(state, "a model")
    assert isinstance(held, Container)
    checkpoint = checkpoint_of(state, "a model")
    name = "blocks.0.self_attn.k.weight"
    info = checkpoint.tensors[name]
    assert info.shape == (5, 3) and info.nbytes == 15 * weight.element_size()
    read = checkpoint.read(name, 1, 4)
    assert read.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_array_equal(read, weight.detach()[1:4].to(torch.float64).numpy())
    before = checkpoint.fingerprint, checkpoint.raw_sha256(name)
    with torch.no_grad():
        weight[2, 1] = 7
    assert checkpoint.read(name)[2, 1] == 7
    assert checkpoint.fingerprint != before[0] and checkpoint.raw_sha256(name) != before[1]
