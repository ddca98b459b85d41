"""The fused kernel against the float64 oracle: in Triton's interpreter, and natively on a GPU."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
from fused_checks import (
    BASIC,
    MUTANTS,
    TOLERANCE,
    Case,
    Worker,
    caught,
    error_of,
    gradient_error,
)

from mla_study.errors import UserError
from mla_study.kernels.latent_attention import absorbed, absorbed_triton
from mla_study.kernels.latent_attention.absorbed_triton import latent_mean_torch, unavailable
from mla_study.kernels.latent_attention.triton_inputs import Cached
from mla_study.model.quantize import quantize

SIZES = (64, 80, 112, 176, 192, 240, 304, 496, 512)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Worker]:
    pytest.importorskip("triton")
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("case", BASIC, ids=lambda case: f"{case.storage}-{case.d_c}")
def test_basic_cases(interpreter: Worker, case: Case) -> None:
    assert interpreter.error_of(case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("d_c", SIZES)
def test_every_kind_of_latent_size(interpreter: Worker, d_c: int) -> None:
    case = Case(batch=1, queries=1, frames=1, tokens=19, d_c=d_c)
    assert interpreter.error_of(case) < TOLERANCE["float32"]


@pytest.mark.parametrize("d_rope", [2, 16, 22, 32, 48, 64])
@pytest.mark.parametrize("rotation", ["inside", "before"])
def test_every_kind_of_rotary_size(interpreter: Worker, d_rope: int, rotation: str) -> None:
    case = Case(batch=1, queries=2, frames=2, tokens=9, d_rope=d_rope, rotation=rotation)
    assert interpreter.error_of(case) < TOLERANCE["float32"]


@pytest.mark.parametrize("storage", ["token", "channel"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_int8(interpreter: Worker, storage: str, dtype: str, scale: float) -> None:
    case = Case(storage=storage, rotation="inside", d_c=80, dtype=dtype, scale=scale, splits=2)
    assert interpreter.error_of(case) < TOLERANCE[dtype]


def test_at_odd_shapes(interpreter: Worker, seed: int) -> None:
    # float32 only: a single output channel in float16 can be off by more than its norm allows
    pick = random.Random(seed)
    for _ in range(14):
        frames = pick.randint(1, 3)
        case = Case(
            batch=pick.randint(1, 3),
            queries=pick.randint(1, 6),
            heads=pick.randint(1, 6),
            capacity=frames + pick.randint(0, 2),
            frames=frames,
            tokens=pick.randint(1, 14),
            d_nope=pick.randint(0, 9),
            d_rope=2 * pick.randint(1, 20),
            d_v=pick.randint(1, 9),
            d_c=16 * pick.randint(4, 10),
            scale=pick.choice([1.0, 3.0]),
            storage=pick.choice(["float", "token", "channel"]),
            rotation=pick.choice(["none", "inside", "before"]),
            splits=pick.randint(1, 4),
            tile=(pick.choice([16, 32]), pick.choice([16, 32])),
            seed=pick.randint(0, 999),
        )
        assert interpreter.error_of(case) < TOLERANCE[case.dtype], case


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_are_those_of_the_oracle(interpreter: Worker, dtype: str) -> None:
    assert interpreter.ask("gradient", dtype) < {"float32": 1e-5, "float16": 2e-3}[dtype]


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(interpreter: Worker, name: str) -> None:
    assert interpreter.ask("mutant", name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d_c": 72}, "d_c from 64 to 512 in steps of 16, not 72"),
        ({"d_rope": 66}, "even d_rope from 2 to 64, not 66"),
        ({"dtype": "bfloat16"}, "float16 and float32 in Triton's interpreter, not in bfloat16"),
        ({"frames": 0}, "at least one key"),
    ],
)
def test_what_it_does_not_take(interpreter: Worker, change: dict[str, object], words: str) -> None:
    assert words in interpreter.ask("refusal", asdict(replace(BASIC[0], **change)))  # type: ignore[arg-type]


def given() -> tuple[torch.Tensor, ...]:
    shapes = ((1, 2, 3, 8), (1, 2, 3, 4), (1, 5, 64), (1, 5, 4), (3, 8, 64), (3, 8, 64))
    return tuple(torch.randn(shape, dtype=torch.float16) for shape in shapes)


def test_without_a_gpu_it_says_so() -> None:
    pytest.importorskip("triton")
    with pytest.raises(UserError, match=r"CUDA GPU, but these tensors are on 'cpu'.*'absorbed'"):
        absorbed_triton(*given())


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"Triton, which is not installed: pip install"):
        absorbed_triton(*given())
    assert "not installed" in str(unavailable(torch.device("cuda")))


def test_nothing_imports_triton_before_it_is_asked_for() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "sys.modules.setdefault('triton', None)\n"
        "from mla_study.kernels.latent_attention import absorbed, absorbed_triton, triton_tiles\n"
        "x = torch.ones(1, 2, 2, 4); c = torch.ones(1, 3, 8); w = torch.ones(2, 4, 8)\n"
        "absorbed(x, x, c, c[..., :4], w, w); print(before or sys.modules['triton'] is None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_ring_is_viewed_and_other_layouts_are_refused() -> None:
    ring = torch.zeros(2, 5, 7, 64)
    seen = Cached.of("c", ring[:, :3], None).data
    assert seen.data_ptr() == ring.data_ptr() and seen.shape == (2, 21, 64)
    assert seen.stride() == (5 * 7 * 64, 64, 1)
    with pytest.raises(UserError, match=r"channels of c lie 21 elements apart.*contiguous"):
        Cached.of("c", torch.zeros(1, 64, 21).transpose(1, 2), None)
    with pytest.raises(UserError, match="frames of c lie"):
        Cached.of("c", ring[:, :4:2], None)
    packed = quantize(ring, "token")
    with pytest.raises(UserError, match="int8 but came without scales"):
        Cached.of("c", packed.data, None)
    with pytest.raises(UserError, match="it must be int8"):
        Cached.of("c", ring, packed.scales)
    with pytest.raises(UserError, match="do not belong to c"):
        Cached.of("c", packed.data, packed.scales[:, :, :2])


def test_the_maths_of_the_backward_is_absorbed() -> None:
    q_nope, q_rope, c, k_rope, k_up, v_up = (x.double() for x in given())
    latent = torch.einsum("bmhn,hnc->bmhc", q_nope, k_up)
    cached = (Cached.of("c", c, None), Cached.of("k_rope", k_rope, None))
    mean = latent_mean_torch(latent, q_rope, *cached, 12**-0.5, None)
    mine = torch.einsum("bmhc,hvc->bmhv", mean, v_up)
    torch.testing.assert_close(mine, absorbed(q_nope, q_rope, c, k_rope, k_up, v_up))


NATIVE = (
    *(replace(case, tile=None, splits=1) for case in BASIC),
    Case(batch=1, queries=333, heads=12, tokens=517, d_c=192, d_rope=32, d_nope=96, d_v=128),
    Case(batch=3, queries=1, heads=12, tokens=1560, d_c=512, d_rope=64, rotation="inside"),
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", NATIVE, ids=lambda case: f"{case.storage}-{case.d_c}")
@pytest.mark.parametrize("splits", [None, 1, 5])
def test_natively(case: Case, dtype: str, splits: int | None) -> None:
    case = replace(case, dtype=dtype, splits=splits)  # type: ignore[arg-type]
    assert error_of(case, "cuda") < TOLERANCE[dtype]


@pytest.mark.gpu
def test_gradients_natively() -> None:
    assert gradient_error("bfloat16", "cuda") < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught_natively(name: str) -> None:
    assert caught(name, "cuda", "float16")
