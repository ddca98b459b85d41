"""The fused kernel compiled ahead of time, without a GPU: tensor cores, no spills, memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mla_study.evaluation.efficiency.kernel_sweep import main
from mla_study.kernels.latent_attention.absorbed_triton import kernels
from mla_study.kernels.latent_attention.aot import MOST_TMEM, Facts, Variant, facts
from mla_study.kernels.latent_attention.triton_tiles import SHARED_LIMIT, tiles


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("d_c", [64, 192, 208, 512])
def test_the_chosen_tiles(arch: int, d_c: int) -> None:
    shape = tiles(arch, d_c, 32, torch.bfloat16)
    found = facts(Variant(arch, d_c, rotate=True, split=True), shape)
    assert found.spill_bytes == 0 and found.registers <= 255
    assert 0 < found.shared_bytes <= SHARED_LIMIT[arch]
    assert found.tmem_columns <= MOST_TMEM
    products = {80: found.mma, 90: found.hgmma, 100: found.tcgen05 or found.mma}[arch]
    assert products > 0


def test_float16_and_int8_compile_like_bfloat16() -> None:
    half = facts(Variant(90, 192, dtype="fp16"), tiles(90, 192, 32, torch.float16))
    assert half.hgmma > 0 and half.spill_bytes == 0
    shape = tiles(90, 192, 32, torch.int8)
    packed = facts(Variant(90, 192, scheme="token", rotate=True, split=True), shape)
    assert packed.hgmma > 0 and packed.spill_bytes == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_step_that_joins_splits_compiles(arch: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = {"mean_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16"}
    signature = {**types, "lines": "i32", "splits": "i32", "D_C": "constexpr", "WIDTH": "constexpr"}
    source = ASTSource(kernels().combine, signature, {"D_C": 192, "WIDTH": 256})
    assert compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]


def test_what_refuses_tiles() -> None:
    good = Facts(200, 0, 100_000, 0, 1, 0, 0)
    assert good.refused(90) is None
    assert Facts(255, 8, 100_000, 0, 1, 0, 0).refused(90) == "spills"
    assert Facts(200, 0, 200_000, 0, 1, 0, 0).refused(80) == "shared memory"
    assert Facts(200, 0, 100_000, 544, 0, 0, 1).refused(100) == "tensor memory"


def test_the_command_shows_one_size(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--d-c", "64", "--arch", "90"])
    head, line = capsys.readouterr().out.splitlines()
    assert "registers" in head and "hgmma" in head and line.split()[0] == "90"
