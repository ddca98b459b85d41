"""Accelerated passes against plain ones: graphs by a stand-in that replays operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rollout.rollouts import DENSE, LATENT, model_of, run, same
from rollout.tape import capture
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.rollout import accelerate as under_test
from mla_study.rollout.accelerate import Acceleration, Graphs, accelerate

BOTH = pytest.mark.parametrize("config", [DENSE, LATENT], ids=["dense", "latent"])


@BOTH
@pytest.mark.parametrize("options", [{}, {"storage": "int8-token"}, {"clean_pass": False}])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_recorded_pass_is_the_pass(
    config: ModelConfig, options: dict[str, Any], positions: str
) -> None:
    model = model_of(config)
    predict = accelerate(model, Acceleration(graph=True), capture)
    made = run(model, predict, positions=positions, **options)
    assert all(same(made, run(model, positions=positions, **options)))


def test_a_graph_a_place() -> None:
    model = model_of(LATENT)
    calls = 0

    def counting(call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        nonlocal calls
        calls += 1
        return capture(call)

    plain = accelerate(model, Acceleration())
    graphs = Graphs(plain, counting)

    def predict(*given: Any, **more: Any) -> Tensor:
        return (graphs if under_test.full(more["memory"]) else plain)(*given, **more)

    run(model, predict)
    assert calls == graphs.recorded == 3
    # another rollout's cache lies elsewhere
    run(model, predict)
    assert calls == 6 and graphs.recorded == 3


@pytest.mark.parametrize("forgotten", ["x", "t", "conditioning", "pieces"])
def test_the_stand_in_sees_what_is_not_copied(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("x", "t", "conditioning", "pieces")
    fill = under_test._Buffers.fill

    def forgetful(self: Any, *given: Any) -> None:
        mine = [getattr(self, n) if n == forgotten else g for n, g in zip(names, given)]  # noqa: B905
        fill(self, *mine)

    model = model_of(DENSE)
    wanted = run(model, positions="absolute")
    monkeypatch.setattr(under_test._Buffers, "fill", forgetful)
    made = run(model, accelerate(model, Acceleration(graph=True), capture), positions="absolute")
    assert not all(same(made, wanted))


@pytest.fixture(scope="module")
def compilations() -> dict[str, float]:
    """What compiling gave, in a process of its own: checks of types cannot be compiled."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, root / "tests/rollout/compiling.py"],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["eager dense", "eager latent", "aot_eager latent", "recorded"])
def test_compiled_blocks_agree(name: str, compilations: dict[str, float]) -> None:
    assert compilations[name] < 1e-4


def test_layers_and_places_share_a_compilation(compilations: dict[str, float]) -> None:
    assert 0 < compilations["frames of 2 layers"] == compilations["frames of 5 layers"] < 8


def test_what_a_cpu_cannot_do_is_said() -> None:
    model = model_of(DENSE)
    with pytest.raises(UserError, match="graphs record the work of a GPU"):
        accelerate(model, Acceleration(graph=True))
    with pytest.raises(UserError, match="fp8 needs a GPU"):
        accelerate(model, Acceleration(fp8=True))


def test_names() -> None:
    assert Acceleration().text() == "eager" and not Acceleration().any
    assert Acceleration(compile=True, fp8=True).text() == "compile + fp8"


@pytest.mark.parametrize(("flag", "told"), [("graph", "--graph"), ("fp8", "--fp8")])
def test_generate_says_what_a_cpu_cannot_do(flag: str, told: str, tmp_path: Path) -> None:
    from mla_study.commands.generate import Generate

    options: dict[str, Any] = {flag: True}
    with pytest.raises(UserError, match=f"leave out {told}"):
        Generate(("a red disc",), tmp_path / "a.mp4", random_weights=True, **options).run()


def test_expanded_keys_cannot_be_recorded() -> None:
    model = model_of(LATENT)
    model.blocks[0].self_attn.keep_expanded = True  # type: ignore[union-attr]
    with pytest.raises(UserError, match="turn keep_expanded off"):
        accelerate(model, Acceleration(graph=True), capture)
